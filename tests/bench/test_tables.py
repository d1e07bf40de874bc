"""The paper's tables on worlds small enough for a test: what is counted, what leaks, what a page says."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from alure.bench.quality import ablations, freshness, scaling, table1, table2
from alure.bench.quality.ranker import Examples, fit_and_score
from alure.bench.quality.results import Results, matching
from alure.bench.quality.snapshots import world_log
from alure.engine.config import ModelConfig
from alure.engine.model import UserModel
from alure.engine.model.flops import ForwardFlops
from alure.engine.model.schema import EventSchema
from alure.engine.training import train

TINY = {"steps": 2, "threads": 1, "batch_users": 16, "validation_share": 0.0}


def brute_before(past, times, asked, now):
    return [int(((past == key) & (times < t)).sum()) for key, t in zip(asked, now)]


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_of_strictly_earlier_events(seed: int) -> None:
    rng = np.random.default_rng(seed)
    past, times = rng.integers(-1, 4, 60), rng.integers(100, 120, 60)
    asked, now = rng.integers(-2, 6, 40), rng.integers(95, 125, 40)
    assert table1.before(past, times, asked, now).tolist() == brute_before(past, times, asked, now)


def test_counts_of_nothing() -> None:
    none = np.empty(0, np.int64)
    assert table1.before(none, none, np.array([1, 2]), np.array([5, 6])).tolist() == [0, 0]
    assert table1.before(np.array([1]), np.array([5]), none, none).tolist() == []


def examples(rng: np.random.Generator, n: int = 1_500) -> Examples:
    """Labels that only the product of the two embeddings tells."""
    users, ads = (torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)) for _ in range(2))
    odds = torch.sigmoid(4 * torch.nn.functional.cosine_similarity(users, ads)).numpy()
    return Examples(
        ids=rng.integers(-1, 1_000, (n, 4)),
        counts=rng.normal(size=(n, 3)).astype(np.float32),
        users=users / 2,
        ads=ads / 2,
        labels=(rng.random(n) < odds).astype(np.float32),
        times=np.arange(n),
    )


def test_the_ranker_finds_what_the_embeddings_tell_and_finds_nothing_without_them() -> None:
    data = examples(np.random.default_rng(0))
    found = table1.compare(data, np.arange(len(data.labels)) % 200, test=999, seed=0)
    assert found["ne"]["without"] > 0.97
    assert found["gain"]["low"] > 0
    assert found["test_exposures"] == 500
    assert found["train_exposures"] == 1_000


def test_scores_do_not_see_the_tested_labels() -> None:
    data = examples(np.random.default_rng(1), 400)
    tested = data.times > 300
    flipped = Examples(**{**vars(data), "labels": np.where(tested, 1 - data.labels, data.labels)})
    assert np.array_equal(fit_and_score(data, tested, True, 0), fit_and_score(flipped, tested, True, 0))


@pytest.mark.parametrize(
    ("module", "small"),
    [
        (table1, {"users": 150, "training": TINY}),
        (freshness, {"users": 150, "training": TINY}),
        pytest.param(table2, {"users": 150, "training": {"steps": 2, "threads": 1}}, marks=pytest.mark.slow),
    ],
)
def test_a_run_leaves_rows_and_a_section_and_is_not_done_again(
    module: ModuleType, small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | small)
    results = Results(tmp_path, module.EXPERIMENT)
    assert "Not yet measured." in module.section(results)
    module.run(None, results, (0,))
    rows = results.rows()
    assert rows
    assert "Not yet measured." not in module.section(results)
    module.run(None, results, (0,))
    assert results.rows() == rows


def test_ablations_say_which_sets_are_absent_and_pair_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "TRAINING", {"steps": 2, "threads": 1, "batch_users": 16})
    monkeypatch.setattr(ablations, "WORLD_USERS", 150)
    chosen = (ablations.WHOLE, "no time bias", "last layer's taps only", "ad sources only")
    monkeypatch.setattr(ablations, "PARTS", {name: ablations.PARTS[name] for name in chosen})
    results = Results(tmp_path, ablations.EXPERIMENT)
    ablations.run(tmp_path, results, (0,))
    assert [row["variant"] for row in results.rows()] == list(chosen)
    shown = capsys.readouterr()
    assert f"checkins left out: {tmp_path / 'checkins'} has no events.parquet" in shown.out + shown.err
    assert "one seed" in ablations.section(results)


def test_scaling_trains_equal_sizes_once_and_counts_the_flops_of_the_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"users": 150, "training": {"steps": 2, "threads": 1, "batch_users": 16, "max_events": 128}}
    monkeypatch.setattr(scaling, "SETTINGS", settings)
    monkeypatch.setattr(scaling, "AXES", {"length": [8, 128], "width": [16, 64], "depth": [2]})
    trained = []
    monkeypatch.setattr(scaling, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    results = Results(tmp_path, scaling.EXPERIMENT)
    scaling.run(None, results, (0,))
    rows = {row["variant"]: row for row in results.rows()}
    assert list(rows) == ["length 8", "length 128", "width 16", "width 64", "depth 2"]
    assert len(trained) == 3
    flops = {name: row["flops_a_user"] for name, row in rows.items()}
    assert flops["length 128"] == flops["width 64"] == flops["depth 2"]
    assert flops["length 8"] < flops["length 128"] / 3
    assert flops["width 64"] / 16 < flops["width 16"] < flops["width 64"] / 4
    assert "width 16 | " in scaling.section(results)
    scaling.draw(results, tmp_path / "scaling.svg")
    assert "MFLOP a user" in (tmp_path / "scaling.svg").read_text()


def test_flops_are_a_mean_over_the_users_of_what_one_batch_takes(tmp_path: Path) -> None:
    events = world_log(tmp_path, 40, 0)
    model = UserModel(ModelConfig(layers=1), EventSchema.of(events.manifest)).eval()
    batch = events.batch(range(events.num_users), events.manifest.last_timestamp, 16)
    whole = ForwardFlops(model)({name: sequence.lengths.numpy() for name, sequence in batch.sequences.items()})
    assert scaling.flops_a_user(model, events, 16) == pytest.approx(whole / events.num_users)


def test_an_interval_that_includes_zero_is_said_to() -> None:
    assert ablations.difference([0.1, -0.1, 0.05]).endswith("includes zero")
    assert ablations.difference([0.1, 0.11, 0.105]).endswith("excludes zero")


def test_the_page_says_in_words_what_was_shown() -> None:
    def rows(name: str, recalls: list[float]) -> list[dict]:
        found = [{"retrieval": {"recall": {"50": recall}}, "tasks": {"ctr": {"ne": 0.9}}} for recall in recalls]
        return [{"variant": name, "seed": seed, "validation": v} for seed, v in enumerate(found)]

    whole = rows(ablations.WHOLE, [0.50, 0.51, 0.52])
    worse, same = rows("k = 1", [0.40, 0.41, 0.43]), rows("k = 4", [0.51, 0.49, 0.52])
    parts = {name: {} for name in (ablations.WHOLE, "k = 1", "k = 4")}
    said = ablations.verdict(whole + worse + same, parts)
    assert said == (
        "Worse than the whole: k = 1. For all others the interval includes zero: they are not shown to matter here."
    )
    assert ablations.verdict(whole + same, parts).startswith("For all of them the interval includes zero")


def test_only_rows_of_these_settings_count_and_the_newest_wins(tmp_path: Path) -> None:
    results = Results(tmp_path, "x")
    results.append("a", 0, {"n": 1}, {"figure": 1})
    results.append("a", 0, {"n": 2}, {"figure": 2})
    results.append("a", 0, {"n": 1}, {"figure": 3})
    assert [row["figure"] for row in matching(results, {"n": 1})] == [3]
