"""A training that dies goes on, run again, to the bits of an undisturbed one; what it left behind is checked."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.crash_lab import CrashLab, Fault, Mode, Outcome, crash_lab
from support.model import planted_log, tiny_model

from alure.engine.config import TrainingConfig
from alure.engine.errors import InputError, Interrupted
from alure.engine.events import Events
from alure.engine.files import sha256
from alure.engine.model.checkpoint import CONFIG, METRICS, TENSORS, CheckpointConfig
from alure.engine.training import TrainReport, train
from alure.engine.training.state import FOLDER, STATE, Saved, TrainingState
from alure.engine.training.step import Part, compute_losses

QUICK = {"steps": 9, "batch_users": 16, "negatives": 8, "max_events": 6, "exposures": 2, "threads": 1}
STEP = "alure.engine.training.loop.compute_losses"


def noisy(*arguments: object) -> dict[str, Part]:
    """A loss that draws from torch's generator, as dropout does."""
    parts = compute_losses(*arguments)  # type: ignore[arg-type]
    return {name: replace(part, mean=part.mean * (1 + torch.rand(()))) for name, part in parts.items()}


def run(events: Events, out: Path, **changes: object) -> TrainReport:
    return train(events, tiny_model(layers=1), TrainingConfig.model_validate({**QUICK, **changes}), out, seed=3)


def die_in_step(patch: pytest.MonkeyPatch, step: int, work: Callable[[], object]) -> None:
    """Do `work` in a fork that is killed in the `step`-th step it takes."""
    child = os.fork()
    if not child:
        taken = iter(range(step - 1, -1, -1))

        def deadly(*arguments: object) -> dict[str, Part]:
            if not next(taken):
                os.kill(os.getpid(), signal.SIGKILL)
            return noisy(*arguments)

        try:
            patch.setattr(STEP, deadly)
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("resume") / "events", num_users=40)


@pytest.mark.parametrize(
    ("changes", "kills", "resumed_at"),
    [
        ({}, [1], None),
        ({}, [3, 1, 4], 4),
        ({}, [9], 8),
        ({"validate_every": 3}, [4, 5], 6),
        ({"validate_every": 2, "patience": 1}, [3], 2),
        ({"item_probability": "streaming"}, [3, 4], 4),
    ],
)
def test_killed_at_any_step_it_goes_on_to_the_same_curve(
    events: Events,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    kills: list[int],
    resumed_at: int | None,
) -> None:
    monkeypatch.setattr(STEP, noisy)
    undisturbed = run(events, tmp_path / "whole", **changes)
    for step in kills:
        die_in_step(monkeypatch, step, lambda: run(events, tmp_path / "model", **changes))
    report = run(events, tmp_path / "model", **changes)
    assert report.resumed_at == resumed_at
    for name in ("curve", "validations", "validation", "best_step", "stopped_at", "temperature"):
        assert getattr(report, name) == getattr(undisturbed, name), name
    assert sha256(tmp_path / "model" / TENSORS) == sha256(tmp_path / "whole" / TENSORS)
    assert not (tmp_path / "model" / FOLDER).exists()


def test_a_signal_loses_no_step(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(*arguments: object) -> dict[str, Part]:
        os.kill(os.getpid(), signal.SIGTERM)
        return noisy(*arguments)

    monkeypatch.setattr(STEP, signalled)
    for done in range(1, 10):
        with pytest.raises(Interrupted, match="training: stopped by SIGTERM; run the same command again to go on"):
            run(events, tmp_path)
        assert json.loads((tmp_path / FOLDER / STATE).read_text())["step"] == done
    monkeypatch.setattr(STEP, noisy)
    assert run(events, tmp_path).resumed_at == 9
    run(events, tmp_path / "whole")
    assert sha256(tmp_path / TENSORS) == sha256(tmp_path / "whole" / TENSORS)


@pytest.fixture(scope="module")
def killed(events: Events, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder whose training was killed in its fourth step."""
    folder = tmp_path_factory.mktemp("killed") / "model"
    die_in_step(pytest.MonkeyPatch(), 4, lambda: run(events, folder))
    return folder


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.001}, r"training.learning_rate: 0.005 then, 0.001 now"),
        ({"batch_users": 17}, r"training.batch_users: 16 then, 17 now"),
    ],
)
def test_another_training_starts_anew_and_says_why(
    events: Events, interrupted: Path, capfd: pytest.CaptureFixture[str], change: dict, said: str
) -> None:
    report = run(events, interrupted, **change)
    assert report.resumed_at is None
    err = capfd.readouterr().err
    assert "is of another training and is not used, this one starts anew" in err
    assert said in err
    run(events, interrupted.parent / "fresh", **change)
    assert sha256(interrupted / TENSORS) == sha256(interrupted.parent / "fresh" / TENSORS)


def test_another_log_starts_anew(
    events: Events, interrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(planted_log(tmp_path / "events", num_users=41), interrupted).resumed_at is None
    assert "log: " in capfd.readouterr().err


def test_threads_may_change(events: Events, interrupted: Path) -> None:
    assert run(events, interrupted, threads=None).resumed_at == 2


def test_only_the_newest_state_is_kept(tmp_path: Path) -> None:
    state = TrainingState(tmp_path, {})
    for step in (1, 2):
        state.save(Saved(step, {}, {"x": torch.zeros(1)}))
    assert sorted(path.name for path in state.folder.iterdir()) == ["state.json", "step-2.safetensors"]
    found = state.load()
    assert found is not None
    assert found.step == 2


def truncate(folder: Path) -> None:
    path = next(folder.glob("step-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder: Path) -> None:
    path = next(folder.glob("step-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def edit(folder: Path, **changes: object) -> None:
    path = folder / STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged: expected SHA-256"),
        (flip, "is damaged: expected SHA-256"),
        (lambda folder: next(folder.glob("step-*")).unlink(), "got no file"),
        (lambda folder: (folder / STATE).write_text('{"made_from": {'), "state.json is damaged"),
        (lambda folder: (folder / STATE).write_text("[]"), "state.json is damaged"),
        (lambda folder: (folder / STATE).write_bytes(b"\xff"), "state.json is damaged"),
        (lambda folder: edit(folder, file="../model.safetensors"), "is damaged"),
        (lambda folder: edit(folder, facts={}), "state.json is damaged"),
        (lambda folder: edit(folder, step="many"), "state.json is damaged"),
    ],
)
def test_a_damaged_state_is_refused(
    events: Events, interrupted: Path, damage: Callable[[Path], object], message: str
) -> None:
    before = sha256(interrupted / TENSORS)
    damage(interrupted / FOLDER)
    with pytest.raises(InputError, match=message) as error:
        run(events, interrupted)
    assert f"remove {interrupted / FOLDER} to train from the first step" in str(error.value)
    assert sha256(interrupted / TENSORS) == before


def test_other_files_beside_the_state_stay(events: Events, interrupted: Path) -> None:
    (interrupted / FOLDER / "mine.txt").write_text("keep")
    run(events, interrupted)
    assert [path.name for path in (interrupted / FOLDER).iterdir()] == ["mine.txt"]


def test_a_warm_start_in_its_own_folder_goes_on(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint it started from was replaced, and even torn, on the way."""

    def warm(out: Path, start: Path) -> TrainReport:
        return train(events, tiny_model(layers=1), TrainingConfig.model_validate(QUICK), out, warm_start=start)

    run(events, tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "model")
    warm(tmp_path / "whole", tmp_path / "first")
    die_in_step(monkeypatch, 4, lambda: warm(tmp_path / "model", tmp_path / "model"))
    assert CheckpointConfig.read(tmp_path / "model").step == 2
    (tmp_path / "model" / TENSORS).write_bytes(b"torn")
    monkeypatch.setattr(STEP, noisy)
    assert warm(tmp_path / "model", tmp_path / "model").resumed_at == 2
    monkeypatch.setattr(STEP, compute_losses)
    warm(tmp_path / "model2", tmp_path / "first")
    assert sha256(tmp_path / "model2" / TENSORS) == sha256(tmp_path / "whole" / TENSORS)


UNHARMED = Fault()


class Lab:
    """Trains in a warm process, with a fault in one of the file operations below the model's folder."""

    def __init__(self, folder: Path, lab: CrashLab) -> None:
        self.lab, self.folder = lab, folder
        planted_log(folder / "events", num_users=40)
        model = {"width": 16, "layers": 1, "heads": 2, "seeds": 2, "attribute_width": 8, "hash_rows": 512}
        text = json.dumps({"model": {**model, "max_position": 64}, "training": {**QUICK, "steps": 6}})
        (folder / "config.yaml").write_text(text)
        self.undisturbed = self.train("undisturbed")
        assert self.undisturbed.code == 0, self.undisturbed.error

    def train(self, name: str, fault: Fault = UNHARMED) -> Outcome:
        root = self.folder / name
        words = ["train", self.folder / "events", "--out", root / "model", "--config", self.folder / "config.yaml"]
        return self.lab.run(root, words, fault)

    def tensors(self, name: str) -> str:
        CheckpointConfig.read(self.folder / name / "model")
        return sha256(self.folder / name / "model" / TENSORS)

    def survives(self, fault: Fault) -> None:
        name = f"{fault.mode.name}-{fault.at}"
        assert self.train(name, fault).code == -signal.SIGKILL
        again = self.train(name)
        assert again.code == 0, again.error
        assert self.tensors(name) == self.tensors("undisturbed"), name
        assert {path.name for path in (self.folder / name / "model").iterdir()} == {CONFIG, METRICS, TENSORS}
        shutil.rmtree(self.folder / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with crash_lab(folder) as server:
        yield Lab(folder, server)


DEADLY = [Mode.KILL_BEFORE, Mode.KILL_AFTER, Mode.TEAR_AND_KILL]


def test_killed_at_file_operations(lab: Lab) -> None:
    """Spread over the run; and at the last, whatever it is."""
    last = lab.undisturbed.operations
    for number, at in enumerate([*range(2, last, last // 5), last]):
        lab.survives(Fault(at, DEADLY[number % len(DEADLY)]))


@pytest.mark.parametrize("at", [7, 13, 32])
def test_a_disk_that_is_full_is_named_and_loses_nothing(lab: Lab, at: int) -> None:
    """In the write of a state's tensors, of its JSON, of a checkpoint's."""
    full = lab.train(f"full-{at}", Fault(at, Mode.FAIL, errno.ENOSPC))
    assert full.code == 1, full.error
    assert "alure: " in full.error
    assert "Traceback" not in full.error
    assert "No space left" in full.error
    assert lab.train(f"full-{at}").code == 0
    assert lab.tensors(f"full-{at}") == lab.tensors("undisturbed")


@pytest.mark.slow
def test_killed_at_every_file_operation(lab: Lab) -> None:
    """312 kills when this was written."""
    for at in range(1, lab.undisturbed.operations + 1):
        for mode in DEADLY:
            lab.survives(Fault(at, mode))
