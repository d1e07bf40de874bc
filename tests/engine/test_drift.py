"""The drift gate: what is measured before a generation is published, what is refused, and that nothing is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.command_line import CommandLine
from support.model import DAY, START
from support.refresh import jagged_log, rename_log, rows_of, save_model
from support.store import generation, unit

from alure.engine.config import DriftConfig, RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.model import model_digest
from alure.engine.refresh import RefreshJob, RefreshReport
from alure.engine.refresh.align import align
from alure.engine.refresh.drift import TIE, check_drift, neighbor_overlap
from alure.engine.store import EmbeddingStore

SMALL = RefreshConfig(unit_users=16, token_budget=150, precision="float32")
GATE = DriftConfig(k=5, min_cosine=0.9, min_overlap=0.5)


def gated(**changes: Any) -> RefreshConfig:
    return SMALL.model_copy(update={"drift": GATE, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    events = jagged_log(folder / "events")
    for name, seed in (("first", 0), ("second", 1)):
        save_model(folder / name, events, seed)
    return folder


def refresh(model: Path, world: Path, store: Path, day: int, config: RefreshConfig, **options: Any) -> RefreshReport:
    return RefreshJob(model, world / "events", store, as_of=START + day * DAY, config=config, **options).run()


def test_the_figures_are_those_of_both_generations(world: Path, tmp_path: Path) -> None:
    first = refresh(world / "first", world, tmp_path, 8, SMALL)
    second = refresh(world / "first", world, tmp_path, 9, gated())
    assert first.drift is None
    drift = second.drift
    assert drift is not None
    store = EmbeddingStore(tmp_path)
    a, b = (store.read_matrix(r.generation).values.reshape(-1, 2, 16).astype(np.float64) for r in (first, second))
    cosines = (a * b).sum(2).mean(1)
    assert (drift.earlier, drift.anchors, drift.unchanged) == (first.generation, 58, 58)
    assert drift.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert drift.low_cosine == pytest.approx(np.quantile(cosines, 0.05), abs=1e-6)
    near = [np.argsort(-x.reshape(58, -1) @ x.reshape(58, -1).T + 9 * np.eye(58), axis=1)[:, :5] for x in (a, b)]
    kept = np.mean([len(np.intersect1d(*pair)) / 5 for pair in zip(*near)])
    assert drift.neighbor_overlap == pytest.approx(kept, abs=0.01)
    assert 0.5 < kept < 1


def test_another_model_trips_the_gate_and_a_run_that_allows_it_goes_on(world: Path, tmp_path: Path) -> None:
    before = refresh(world / "first", world, tmp_path, 8, SMALL)
    with pytest.raises(AlureError) as refused:
        refresh(world / "second", world, tmp_path, 9, gated())
    message = str(refused.value)
    for part in ("mean_cosine -0.", "neighbor_overlap 0.", "refresh.drift.min_cosine", "alure align", "--allow-drift"):
        assert part in message, part
    store = EmbeddingStore(tmp_path)
    assert [g.generation for g in store.generations()] == [before.generation]
    with pytest.raises(AlureError, match="has drifted from"):  # asked again it says the same, with nothing to embed
        refresh(world / "second", world, tmp_path, 9, gated())
    report = refresh(world / "second", world, tmp_path, 9, gated(drift=GATE.reported()))
    assert (report.embedded_now, report.units_reused, report.already_published) == (0, 4, False)
    assert report.drift is not None
    assert report.drift.mean_cosine < 0.9
    again = refresh(world / "second", world, tmp_path, 9, gated())  # published is published
    assert (again.already_published, again.drift) == (True, None)


def test_an_aligned_model_passes_where_it_is_the_same_but_turned(world: Path, tmp_path: Path) -> None:
    """first → second's space and back: nothing but a rotation, which the cosines see and the neighbours do not."""
    events = Events.open(world / "events")
    align(world / "first", world / "second", events, tmp_path / "turned")
    align(tmp_path / "turned", world / "first", events, tmp_path / "back")
    refresh(world / "first", world, tmp_path / "store", 9, SMALL)
    with pytest.raises(AlureError, match="mean_cosine") as refused:
        refresh(tmp_path / "turned", world, tmp_path / "store", 9, gated())
    assert "neighbor_overlap" not in str(refused.value)
    report = refresh(tmp_path / "back", world, tmp_path / "store", 9, gated())
    assert report.drift is not None
    assert report.drift.mean_cosine > 1 - 1e-5
    assert report.drift.neighbor_overlap > 0.99
    properties = EmbeddingStore(tmp_path / "store").latest("embeddings").properties
    assert properties["space"] == model_digest(world / "first")


class Crash(Exception):
    pass


def test_a_job_that_dies_at_the_gate_ends_with_the_same_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh(world / "first", world, tmp_path / "a", 8, SMALL)
    refresh(world / "first", world, tmp_path / "b", 8, SMALL)
    whole = refresh(world / "first", world, tmp_path / "a", 9, gated())
    with monkeypatch.context() as patch:
        patch.setattr("alure.engine.refresh.drift.measure_drift", lambda *a: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            refresh(world / "first", world, tmp_path / "b", 9, gated())
    report = refresh(world / "first", world, tmp_path / "b", 9, gated())
    assert (report.embedded_now, report.drift) == (0, whole.drift)
    assert rows_of(EmbeddingStore(tmp_path / "a")) == rows_of(EmbeddingStore(tmp_path / "b"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_users_without_news_are_compared_first(world: Path, tmp_path: Path, dtype: str) -> None:
    """Users 3 (new), 11, 30 and 59 have an event on day 9; the others are carried forward."""
    config = gated(output_dtype=dtype)
    refresh(world / "first", world, tmp_path / "store", 8, config)
    jagged_log(tmp_path / "events", late=np.array([3, 11, 30, 59]))
    rename_log(tmp_path / "events", "the next day's")
    options: dict[str, Any] = {"incremental": True}
    for anchors, unchanged in ((55, 55), (57, 55), (2_000, 55)):
        few = config.model_copy(update={"drift": GATE.model_copy(update={"anchors": anchors})})
        store = tmp_path / f"{anchors}"
        refresh(world / "first", world, store, 8, config)
        drift = RefreshJob(world / "first", tmp_path / "events", store, config=few, **options).run().drift
        assert drift is not None
        assert (drift.anchors, drift.unchanged) == (min(anchors, 58), unchanged)
        assert drift.low_cosine == pytest.approx(1, abs=1e-9) if anchors == 55 else drift.mean_cosine < 1


def test_an_earlier_moment_is_compared_with_what_came_before_it(world: Path, tmp_path: Path) -> None:
    days = {day: refresh(world / "first", world, tmp_path, day, SMALL) for day in (5, 9, 7)}
    drift = days[7].drift
    assert drift is not None
    assert drift.earlier == days[5].generation
    none = SMALL.model_copy(update={"drift": DriftConfig(anchors=0)})
    assert refresh(world / "first", world, tmp_path, 8, none).drift is None


def test_shapes_and_users_that_do_not_compare(world: Path, tmp_path: Path, capfd: Any) -> None:
    events = Events.open(world / "events")
    save_model(tmp_path / "wide", events, num_embeddings=3)
    refresh(world / "first", world, tmp_path / "store", 8, SMALL)
    with pytest.raises(InputError, match=r"it has 2 × 16 values a user, this one 3 × 16; nothing was published"):
        refresh(tmp_path / "wide", world, tmp_path / "store", 9, gated())
    assert refresh(tmp_path / "wide", world, tmp_path / "store", 9, SMALL).drift is None
    assert "cannot be compared" in capfd.readouterr().err

    store = EmbeddingStore(tmp_path / "others", create=True)
    store.write_unit("a", "0", unit([1, 2, 3]))
    store.publish(generation(3, "a"))
    store.write_unit("b", "0", unit([4, 5, 6]))
    new = generation(3, "b")
    assert check_drift(store, new, [1, 2, 3, 4, 5, 6], DriftConfig()) is None
    with pytest.raises(InputError, match="no two users have an embedding in both"):
        check_drift(store, new, [1, 2, 3, 4, 5, 6], GATE)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 12), st.integers(0, 10))
def test_overlap_is_that_of_sorted_lists(seed: int, n: int, k: int, moved: int) -> None:
    """Distinct cosines; and turning all rows changes nothing."""
    generator = np.random.default_rng(seed)
    before = generator.standard_normal((n, 6))
    after = before.copy()
    after[:moved] = generator.standard_normal((min(moved, n), 6))
    before, after = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (before, after))
    k_found = min(k, n - 1)
    near = []
    for x in (before, after):
        products = x @ x.T
        np.fill_diagonal(products, -np.inf)
        order = np.argsort(-products, axis=1)
        near.append(order[:, :k_found])
        last, next_ = np.take_along_axis(products, order[:, k_found - 1 : k_found + 1], 1).T
        assume((last - next_ > 2 * TIE).all())
    expected = np.mean([len(np.intersect1d(*pair)) / k_found for pair in zip(*near)])
    assert neighbor_overlap(before, after, k) == pytest.approx(expected, abs=1e-9)
    rotation, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    assert neighbor_overlap(before, before @ rotation, k) == 1
    assert neighbor_overlap(np.ones((n, 2)), np.ones((n, 2)), k) == 1  # all are as near as all


def test_thresholds_need_anchors() -> None:
    with pytest.raises(ValidationError, match="thresholds need some"):
        DriftConfig(anchors=0, min_cosine=0.5)


def test_the_command(world: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alure = CommandLine(capfd, monkeypatch)
    (tmp_path / "c.yaml").write_text("refresh: {precision: float32, drift: {min_cosine: 0.99}}\n")
    common = (world / "events", "--store", tmp_path / "store", "--config", tmp_path / "c.yaml", "--json")
    assert alure("refresh", world / "first", *common, "--as-of", START + 8 * DAY).code == 0
    later = (*common, "--as-of", START + 9 * DAY)
    refused = alure("refresh", world / "second", *later)
    assert (refused.code, len(EmbeddingStore(tmp_path / "store").generations())) == (1, 1)
    assert "(refresh.drift.min_cosine)" in refused.json["error"]
    figures = tmp_path / "refresh.prom"
    allowed = alure("refresh", world / "second", *later, "--allow-drift", "--metrics", figures)
    assert (allowed.code, allowed.json["drift"]["anchors"]) == (0, 58)
    assert 'alure_refresh_drift{of="mean_cosine"} ' in figures.read_text()
