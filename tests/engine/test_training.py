"""Losses, metrics, optimizers and the training loop."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.model import DAY, START, LogParts, SourceRows, planted_log, tiny_model, write_log

from alure.engine.config import TrainingConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.model import UserModel, model_digest
from alure.engine.model.checkpoint import METRICS, TENSORS, CheckpointConfig
from alure.engine.training import TrainReport, train
from alure.engine.training.curve import Curve
from alure.engine.training.losses import CandidateItems, sampled_softmax
from alure.engine.training.metrics import item_rates, normalized_entropy, recall_at, top_columns
from alure.engine.training.optimizer import RowwiseAdagrad, schedule
from alure.engine.training.train import number_of_steps, split_time


def test_log_q_on_the_negatives_only_gives_the_gradient_of_the_full_softmax() -> None:
    """One user, 200 items of Zipf frequency, a frequent and a rare positive; the mean over many draws."""
    generator = torch.Generator().manual_seed(0)
    num_items, draws, rounds = 200, 64, 500
    z = torch.randn(num_items, generator=generator, dtype=torch.float64)
    q = 1.0 / torch.arange(1, num_items + 1, dtype=torch.float64)
    q /= q.sum()
    for positive in (0, num_items - 1):
        z[positive] = torch.cat([z[:positive], z[positive + 1 :]]).logsumexp(0) + math.log(0.3 / 0.7)  # P = 0.3
        full = z.clone().requires_grad_(True)
        (-full.log_softmax(0)[positive]).backward()
        assert full.grad is not None
        assert float(full.grad[positive]) == pytest.approx(-0.7)
        total = torch.zeros_like(z)
        for _ in range(rounds):
            drawn = torch.multinomial(q, draws, replacement=True, generator=generator)
            items, counts = torch.cat([drawn, torch.tensor([positive])]).unique(return_counts=True)
            here = (items == positive).nonzero()[0]
            logits = z[items][None].clone().requires_grad_(True)
            candidates = CandidateItems(items, counts.to(z.dtype), draws * q[items])
            sampled_softmax(logits, candidates, torch.zeros(1, dtype=torch.int64), here).backward()
            assert logits.grad is not None
            total.index_add_(0, items, logits.grad[0])
        mean = total / rounds
        assert float(mean[positive]) == pytest.approx(-0.7, abs=0.04)  # with Q on the positive too: -0.09 where rare
        frequent = torch.arange(num_items) != positive
        frequent[10:] = False
        torch.testing.assert_close(mean[frequent], full.grad[frequent], atol=0.01, rtol=0.2)


def test_accidental_hits_are_masked_and_a_lone_positive_costs_nothing() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    candidates = CandidateItems(torch.arange(4), torch.ones(4), torch.ones(4))
    rows, columns = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 3, 2])
    loss = sampled_softmax(logits, candidates, rows, columns)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[0] == 0).all()  # every candidate is this user's own
    assert torch.isfinite(logits.grad).all()
    expected = -logits[1].log_softmax(0)[2] / 2
    torch.testing.assert_close(loss, expected)


def test_users_weigh_the_same_however_many_positives_they_have() -> None:
    logits = torch.zeros(2, 6, requires_grad=True)
    candidates = CandidateItems(torch.arange(6), torch.ones(6), torch.ones(6))
    sampled_softmax(logits, candidates, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, :2].sum(), torch.tensor(-0.5 * 4 / 5))
    torch.testing.assert_close(logits.grad[1, 2], torch.tensor(-0.5 * 5 / 6))


def test_normalized_entropy() -> None:
    labels = np.array([1.0, 0, 0, 0])
    assert normalized_entropy(np.full(4, 0.25), labels) == pytest.approx(1.0)
    assert normalized_entropy(np.array([0.9, 0.1, 0.1, 0.1]), labels) == pytest.approx(
        -math.log(0.9) / -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    assert normalized_entropy(np.array([0.0, 1, 1, 1]), labels) > 10  # sure and wrong: large, not infinite
    assert normalized_entropy(np.ones(3), np.ones(3)) is None
    assert normalized_entropy(np.empty(0), np.empty(0)) is None


def test_item_rates_are_pulled_to_the_base_rate() -> None:
    rates = item_rates(np.array([0] * 80 + [1]), np.array([1.0] * 40 + [0] * 40 + [1]), 3)
    base = 41 / 81
    np.testing.assert_allclose(rates, [(40 + 20 * base) / 100, (1 + 20 * base) / 21, base])


def test_recall_over_all_items() -> None:
    users = torch.nn.functional.normalize(torch.randn(7, 2, 4), dim=-1)
    ads = torch.nn.functional.normalize(torch.randn(30, 2, 4), dim=-1)
    top = top_columns(users, ads, 5, scores_held=100)
    cosines = torch.einsum("bkd,nkd->bn", users, ads)
    assert torch.equal(top, cosines.topk(5, dim=1).indices)
    assert top_columns(users, ads[:3], 5).shape == (7, 3)  # k > items
    top = np.array([[4, 2, 0], [1, 3, 2]])
    rows, columns = np.array([0, 0, 1]), np.array([2, 9, 1])
    assert recall_at(top, rows, columns, 1) == pytest.approx((0 + 1) / 2)
    assert recall_at(top, rows, columns, 3) == pytest.approx((0.5 + 1) / 2)


def test_rowwise_adagrad_touches_only_the_rows_of_the_batch() -> None:
    table = torch.nn.Parameter(torch.randn(6, 3))
    before, total = table.detach().clone(), torch.zeros(6)
    optimizer = RowwiseAdagrad([table], lr=0.1)
    for ids in ([0, 2, 2], [2, 5]):
        torch.nn.functional.embedding(torch.tensor(ids), table, sparse=True).square().sum().backward()
        assert table.grad is not None
        grad = table.grad.to_dense()
        total += grad.square().mean(dim=1)
        expected = table.detach() - 0.1 * grad / (total.sqrt() + 1e-8)[:, None]
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(table.detach(), expected)
    assert torch.equal(table.detach()[[1, 3, 4]], before[[1, 3, 4]])


def test_schedule_warms_up_and_falls() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.05 <= rates[-1] < 0.06
    assert schedule(0, 1) == 1.0


def test_steps_grow_with_the_users_within_bounds() -> None:
    assert number_of_steps(TrainingConfig(steps=0), 10**9) == 0
    assert number_of_steps(TrainingConfig(), 40) == 120
    assert number_of_steps(TrainingConfig(batch_users=100), 10_001) == 401
    assert number_of_steps(TrainingConfig(), 10**9) == 600


def test_validation_is_the_newest_share_of_the_targets() -> None:
    times = np.random.default_rng(0).permutation(np.concatenate([[3], START + np.arange(999), [START + 10**9]]))
    split = split_time(times, 0.1, START + 2 * 10**9)
    assert (times > split).sum() == 100
    assert split_time(times, 0.0, 77) == 77
    assert split_time(np.full(5, 9), 0.1, 9) == 8  # all at one time: all of them


QUICK = {"steps": 8, "batch_users": 24, "negatives": 16, "max_events": 8, "exposures": 2, "threads": 1}


def run(events: Events, out: Path, seed: int = 0, as_of: int | None = None, **changes: object) -> TrainReport:
    return train(events, tiny_model(), TrainingConfig.model_validate({**QUICK, **changes}), out, as_of=as_of, seed=seed)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("training") / "events", num_users=60)


def tensors(folder: Path) -> str:
    return hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()


def test_training_finds_the_planted_structure(tmp_path: Path) -> None:
    events = planted_log(tmp_path / "events", num_users=150, events=10)
    report = run(events, tmp_path / "model", steps=60, batch_users=48, negatives=30, learning_rate=5e-3)
    losses = [point["retrieval"] for point in report.curve]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert report.validation is not None
    retrieval = report.validation["retrieval"]
    assert retrieval["recall"]["10"] > 2 * retrieval["popularity_recall"]["10"]
    metrics = json.loads((tmp_path / "model" / METRICS).read_text())
    assert metrics["validation"] == report.validation
    assert metrics["curve"] == report.curve
    assert report.validation["tasks"]["ctr"]["exposures"] > 0
    assert CheckpointConfig.read(tmp_path / "model").step == 60


def test_a_planted_leak_is_not_found(tmp_path: Path) -> None:
    """Clicks of no pattern, each announced by an event of the same second: recall must stay at chance."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(150), 8)
    time, items = START + generator.integers(0, 30 * DAY, len(users)), generator.integers(0, 100, len(users))
    rows = {name: SourceRows(users, time, items) for name in ("leak", "click")}
    events = write_log(tmp_path / "events", LogParts(150, 100, rows))
    report = run(events, tmp_path / "model", steps=40, batch_users=48, learning_rate=5e-3)
    assert report.validation is not None
    assert report.validation["retrieval"]["recall"]["10"] < 0.2  # 0.1 by chance


def test_events_after_the_snapshot_change_nothing(events: Events, tmp_path: Path) -> None:
    """Two logs that are equal up to as_of train the same model, bit for bit, and get the same figures."""
    as_of = START + 18 * DAY
    generator = np.random.default_rng(1)
    rows = {}
    for number, name in enumerate(events.manifest.sources):
        c = events.source(name)
        user = np.repeat(np.arange(events.num_users), np.diff(c.offsets))
        item, time = np.array(c.item), np.array(c.timestamp)
        later = time > as_of
        item[later] = generator.integers(0, 60, later.sum())
        rows[name] = SourceRows(user, time, item, np.full(len(user), number))
    index = np.arange(60)
    changed = write_log(tmp_path / "events", LogParts(60, 60, rows, ["view", "click"], index // 2, index % 4))
    reports = [run(e, tmp_path / f"model{i}", as_of=as_of) for i, e in enumerate((events, changed))]
    assert tensors(tmp_path / "model0") == tensors(tmp_path / "model1")
    assert reports[0].validation == reports[1].validation
    assert reports[0].validation is not None
    assert reports[0].validation["as_of"] == as_of


def test_validation_events_do_not_train(events: Events, tmp_path: Path) -> None:
    """With the validation time held out, its events leave the tensors as they are."""
    last = events.manifest.last_timestamp
    split = run(events, tmp_path / "a", validation_share=0.3).validation
    assert split is not None
    run(events, tmp_path / "b", as_of=split["split"], validation_share=0)
    assert split["split"] < last
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")


def test_the_same_seed_gives_the_same_bytes(events: Events, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for folder, seed in (("a", 7), ("b", 7), ("c", 8)):
        run(events, tmp_path / folder, seed)
    assert torch.equal(state, torch.get_rng_state())
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    assert tensors(tmp_path / "a") != tensors(tmp_path / "c")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(events: Events, tmp_path: Path) -> None:
    run(events, tmp_path, steps=2)
    before = tensors(tmp_path)
    with pytest.raises(
        AlureError, match=r"stopped being finite at step [12] of 8 .*no checkpoint was written.*"
    ) as error:
        run(events, tmp_path, learning_rate=1e30)
    assert not isinstance(error.value, InputError)
    assert tensors(tmp_path) == before
    batch = events.batch(range(5), events.manifest.last_timestamp)
    model = UserModel.load(tmp_path)
    assert torch.isfinite(model(batch, model.catalog(events))).all()


def test_checkpoints_on_the_way_are_usable(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alure.engine.training.step import compute_losses

    calls = []

    def fails_at_six(*arguments: object) -> object:
        calls.append(1)
        parts = compute_losses(*arguments)  # type: ignore[arg-type]
        factor = math.nan if len(calls) == 6 else 1.0
        return {name: replace(part, mean=part.mean * factor) for name, part in parts.items()}

    monkeypatch.setattr("alure.engine.training.loop.compute_losses", fails_at_six)
    with pytest.raises(AlureError, match=rf"at step 6 of 8 .*the checkpoint of step 4 is in {tmp_path}"):
        run(events, tmp_path)
    assert CheckpointConfig.read(tmp_path).step == 4
    UserModel.load(tmp_path)


def test_no_steps_write_a_model_that_embeds(events: Events, tmp_path: Path) -> None:
    report = run(events, tmp_path, steps=0, validation_share=0)
    assert report.curve == []
    assert report.validation is None
    UserModel.load(tmp_path)


def test_warm_start_goes_on_from_the_checkpoint(events: Events, tmp_path: Path) -> None:
    run(events, tmp_path / "first")
    report = train(
        events, tiny_model(), TrainingConfig.model_validate({**QUICK, "steps": 0}), tmp_path / "second",
        seed=9, warm_start=tmp_path / "first",
    )  # fmt: skip
    assert tensors(tmp_path / "first") == tensors(tmp_path / "second")
    assert report.warm_start == str(tmp_path / "first")


def test_warm_start_names_what_differs(events: Events, tmp_path: Path) -> None:
    run(events, tmp_path / "first", steps=1)
    config = TrainingConfig.model_validate({**QUICK, "exposures": 0})
    with pytest.raises(InputError) as error:
        train(events, tiny_model(seeds=3), config, tmp_path / "second", warm_start=tmp_path / "first")
    assert "model.seeds: 2 in the checkpoint, 3 here" in str(error.value)
    assert "training.tasks: ['ctr'] in the checkpoint, [] here" in str(error.value)
    assert not (tmp_path / "second").exists()
    with pytest.raises(InputError, match="does not exist"):
        train(events, tiny_model(), config, tmp_path / "second", warm_start=tmp_path / "nowhere")


def test_the_curve_ends_with_the_last_step() -> None:
    curve = Curve(steps=250)
    for step in range(1, 251):
        curve.add(step, {"loss": float(step), **({"ctr": 1.0} if step % 2 else {})})
    assert [point["step"] for point in curve.points] == [*range(3, 250, 3), 250]
    assert curve.points[0] == {"step": 3, "loss": 2.0, "ctr": 1.0}
    assert curve.points[-1] == {"step": 250, "loss": 250.0}


def test_a_file_in_place_of_the_models_folder(events: Events, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("not a folder")
    with pytest.raises(InputError, match="is a file, expected a folder"):
        run(events, tmp_path / "model")


def test_somebody_elses_files_are_not_replaced(events: Events, tmp_path: Path) -> None:
    for text in ('{"architectures": ["Other"]}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json is not of a model of alure, so it is not replaced"):
            run(events, tmp_path)
        assert (tmp_path / "config.json").read_text() == text
    (tmp_path / "config.json").write_text('{"format_version": 2, "mod')  # a checkpoint that was cut
    run(events, tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_log_that_ends_before_as_of_begins(events: Events, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no user has a target event"):
        run(events, tmp_path, as_of=START - 1)


@pytest.mark.parametrize("changes", [{"retrieval_weight": 0.0}, {"exposures": 0}, {"negatives": 0}])
def test_parts_of_the_loss_can_be_left_out(events: Events, tmp_path: Path, changes: dict) -> None:
    report = run(events, tmp_path, steps=2, **changes)
    assert all(math.isfinite(point["loss"]) for point in report.curve)
    assert ("retrieval" in report.curve[0]) == (changes.get("retrieval_weight") != 0.0)
