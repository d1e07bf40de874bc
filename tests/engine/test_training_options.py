"""Options of a training: early stopping, precision, TensorBoard, daily warm starts; and input that is of little use."""

import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.model import DAY, START, LogParts, SourceRows, planted_log, tiny_model, write_log

from alure.engine.config import TrainingConfig
from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.events import Events
from alure.engine.model import AlureModel, Catalog
from alure.engine.model.checkpoint import CheckpointConfig, read_checkpoint
from alure.engine.training import TrainReport, train
from alure.engine.training.selection import watched
from alure.engine.training.validation import Validation

QUICK = {"steps": 8, "batch_users": 24, "negatives": 16, "max_events": 8, "exposures": 2, "threads": 1}


def run(
    events: Events, out: Path, warm_start: Path | None = None, as_of: int | None = None, **changes: object
) -> TrainReport:
    config = TrainingConfig.model_validate({**QUICK, **changes})
    return train(events, tiny_model(), config, out, as_of=as_of, warm_start=warm_start)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("training") / "events", num_users=60)


def test_the_best_model_is_kept_and_patience_ends_the_training(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores rise to the second validation and fall from there."""
    values = iter([0.2, 0.5, 0.4, 0.5, 0.3])  # level is not better
    checkpoints = []

    def measure(self: Validation, model: AlureModel, catalog: Catalog) -> dict:
        assert not model.training
        checkpoints.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"retrieval": {"recall": {"10": next(values)}}, "tasks": {}}

    monkeypatch.setattr(Validation, "measure", measure)
    report = run(events, tmp_path, steps=20, validate_every=2, patience=3)
    assert report.validations == [
        {"step": step, "recall@10": value} for step, value in ((2, 0.2), (4, 0.5), (6, 0.4), (8, 0.5), (10, 0.3))
    ]
    assert (report.best_step, report.stopped_at) == (4, 10)
    assert report.curve[-1]["step"] == 10
    assert report.validation == {"retrieval": {"recall": {"10": 0.5}}, "tasks": {}}
    assert CheckpointConfig.read(tmp_path).step == 4
    for name, tensor in read_checkpoint(tmp_path)[1].items():
        assert torch.equal(tensor, checkpoints[1][name]), name


def test_a_warm_start_that_gets_worse_keeps_the_model_it_started_from(events: Events, tmp_path: Path) -> None:
    run(events, tmp_path / "first")
    report = run(
        events, tmp_path / "second", tmp_path / "first", steps=8, validate_every=2, patience=2, learning_rate=0.5
    )
    assert (report.best_step, report.stopped_at) == (0, 4)
    assert [point["step"] for point in report.validations] == [0, 2, 4]
    first, second = (read_checkpoint(tmp_path / name)[1] for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_validation_on_the_way_changes_no_step(events: Events, tmp_path: Path) -> None:
    plain = run(events, tmp_path / "plain")
    watched = run(events, tmp_path / "watched", validate_every=1)
    assert watched.curve == plain.curve
    assert [point["step"] for point in watched.validations] == list(range(1, 9))
    assert max(point["recall@10"] for point in watched.validations) == watched.validation["retrieval"]["recall"]["10"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 2}, "set validate_every too"),
        ({"validate_every": 2, "validation_share": 0}, "needs a validation_share above 0"),
        ({"precision": "float16"}, "precision"),
        ({"item_probability": "streaming", "labels": "next_event"}, "streaming needs labels all_action"),
    ],
)
def test_options_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.model_validate(changes)


def test_bfloat16_keeps_float32_weights_and_the_curve(events: Events, tmp_path: Path) -> None:
    full, mixed = (run(events, tmp_path / name, precision=name) for name in ("float32", "bfloat16"))
    assert mixed.curve != full.curve
    for a, b in zip(full.curve, mixed.curve):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
    _, kept = read_checkpoint(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    halves = [(tensor != tensor.bfloat16().float()).float().mean() for tensor in kept.values() if tensor.numel() > 100]
    assert min(halves) > 0.2  # nothing was rounded to bfloat16 on the way; tables of rows never used keep zeros


def test_every_event_in_bfloat16(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 8)
    rows = SourceRows(users, START + generator.integers(0, 30 * DAY, len(users)), generator.integers(0, 30, len(users)))
    events = write_log(tmp_path / "events", LogParts(40, 30, {"click": rows}))
    model = tiny_model(causal=True, encoders=["frequency", "gap", "cyclic"])
    config = {**QUICK, "labels": "next_event", "held_out": "last_event", "validate_every": 4}
    losses = []
    for precision in ("float32", "bfloat16"):
        settings = TrainingConfig.model_validate({**config, "precision": precision})
        report = train(events, model, settings, tmp_path / precision)
        assert [list(point) for point in report.validations] == [["step", "ndcg@10"]] * 2
        losses.append([point["loss"] for point in report.curve])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_tensorboard_shows_what_the_curve_has(events: Events, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tmp_path / "board"
    report = run(events, tmp_path / "model", tensorboard=board, validate_every=4)
    found = accumulator.EventAccumulator(str(board)).Reload()
    assert [event.step for event in found.Scalars("loss/total")] == list(range(1, 9))
    np.testing.assert_allclose(
        [event.value for event in found.Scalars("loss/retrieval")],
        [point["retrieval"] for point in report.curve],
        rtol=1e-6,
    )
    assert [event.step for event in found.Scalars("validation/recall@10")] == [4, 8]
    assert found.Scalars("learning_rate")[-1].value < found.Scalars("learning_rate")[1].value


def test_tensorboard_that_is_missing(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'alure\[tensorboard\]'"):
        run(events, tmp_path / "model", tensorboard=tmp_path / "board")
    assert not (tmp_path / "model").exists()


def test_nothing_to_learn(events: Events, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to learn: retrieval_weight is 0 and there is no binary task"):
        run(events, tmp_path, retrieval_weight=0.0, exposures=0)


def test_labels_that_are_missing_or_of_one_class(tmp_path: Path) -> None:
    """Only views: no task, retrieval learns from the views. Every view clicked: NE has no base rate, and says so."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 8)
    time, items = START + generator.integers(0, 30 * DAY, len(users)), generator.integers(0, 30, len(users))
    view = SourceRows(users, time, items, np.zeros(len(users), int))
    click = SourceRows(users, time + 60, items, np.ones(len(users), int))
    lone = write_log(tmp_path / "lone", LogParts(40, 30, {"view": view}, ["view"]))
    report = run(lone, tmp_path / "model")
    assert report.validation is not None
    assert report.validation["tasks"] == {}
    both = write_log(tmp_path / "both", LogParts(40, 30, {"view": view, "click": click}, ["view", "click"]))
    report = run(both, tmp_path / "model2", max_events=4)
    assert report.validation is not None
    ctr = report.validation["tasks"]["ctr"]
    assert ctr["ne"] is None
    assert ctr["base_rate"] == 1.0
    assert ctr["note"] == "all labels are positive, so their rate has no entropy to divide by"
    with pytest.raises(InputError, match="neither targets nor exposures of both labels"):
        watched({"retrieval": {"users": 0}, "tasks": {"ctr": ctr}})


def test_constant_features_train(tmp_path: Path) -> None:
    """One time a user, one item content, one account: nothing divides by a spread that is zero."""
    users = np.repeat(np.arange(30), 6)
    time = np.tile([0, 0, 0, 60, 60, 120], 30) + START
    rows = SourceRows(users, time, np.arange(len(users)) % 12, dense=np.ones((len(users), 3)))
    parts = LogParts(30, 12, {"click": rows}, item_accounts=np.zeros(12, int), dense=np.full((12, 4), 7.0, np.float32))
    report = run(write_log(tmp_path / "events", parts), tmp_path / "model")
    assert all(math.isfinite(point["loss"]) for point in report.curve)


def test_a_batch_that_fails_is_named(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alure.engine.training.step import compute_losses

    drawn = []

    def fails(*arguments: object) -> object:
        drawn.append(arguments[2])
        parts = compute_losses(*arguments)  # type: ignore[arg-type]
        return {name: replace(part, mean=part.mean * math.inf) for name, part in parts.items()}

    monkeypatch.setattr("alure.engine.training.loop.compute_losses", fails)
    with pytest.raises(AlureError, match=r"step 1 of 8 \(loss inf") as error:
        run(events, tmp_path)
    (sample,) = drawn
    first = int(sample.users[0])
    named = f"its batch: users {first} (id {events.users['user_id'][first]}), "
    assert named in str(error.value)
    assert f"and {len(sample.users) - 8} more, at times {sample.as_of.min()} to {sample.as_of.max()}" in str(
        error.value
    )


def test_warm_starts_day_after_day_go_on_improving(tmp_path: Path) -> None:
    """Four nights of 5 steps, each from the night before, in the model's own folder; beside as many from nothing."""
    events = planted_log(tmp_path / "events", num_users=150)
    warm, cold = [], []
    for night in range(4):
        day = {"as_of": START + (18 + 4 * night) * DAY, "steps": 5, "batch_users": 48, "validation_share": 0.2}
        start = tmp_path / "model" if night else None
        warm.append(recall(run(events, tmp_path / "model", start, **day)))
        cold.append(recall(run(events, tmp_path / "cold", **day)))
    assert warm[0] == cold[0]
    assert min(w - c for w, c in zip(warm[1:], cold[1:])) > 0
    assert np.mean(warm[1:]) > np.mean(cold[1:]) + 0.05


def test_a_warm_start_with_other_dropout(events: Events, tmp_path: Path) -> None:
    run(events, tmp_path / "first", steps=1)
    config = TrainingConfig.model_validate({**QUICK, "steps": 1})
    train(events, tiny_model(dropout=0.3), config, tmp_path / "second", warm_start=tmp_path / "first")
    assert CheckpointConfig.read(tmp_path / "second").model.dropout == 0.3


def recall(report: TrainReport) -> float:
    assert report.validation is not None
    return float(report.validation["retrieval"]["recall"]["10"])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 5e-3), ("bfloat16", 3e-2)])
def test_a_gpu_learns_as_a_cpu_does_and_goes_on(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float
) -> None:
    from alure.engine.training.step import compute_losses

    config = TrainingConfig.model_validate({**QUICK, "precision": precision})
    on_cpu = train(events, tiny_model(), config, tmp_path / "cpu", device="cpu")

    def signalled(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return compute_losses(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("alure.engine.training.loop.compute_losses", signalled)
    with pytest.raises(Interrupted):
        train(events, tiny_model(), config, tmp_path / "gpu", device="cuda")
    monkeypatch.setattr("alure.engine.training.loop.compute_losses", compute_losses)
    on_gpu = train(events, tiny_model(), config, tmp_path / "gpu", device="cuda")
    assert on_gpu.resumed_at == 1
    for a, b in zip(on_cpu.curve, on_gpu.curve):
        assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
