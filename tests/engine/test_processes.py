"""Training in several processes with gloo: the same steps as one process makes on the same batches."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.model import DAY, START, LogParts, SourceRows, planted_log, tiny_model, write_log

from alure.engine.config import TrainingConfig
from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.events import Events
from alure.engine.files import sha256
from alure.engine.model.checkpoint import METRICS, TENSORS
from alure.engine.training import TrainReport, train
from alure.engine.training.optimizer import Optimization
from alure.engine.training.processes import Processes
from alure.engine.training.state import FOLDER, STATE

QUICK = {"steps": 6, "batch_users": 15, "negatives": 8, "max_events": 6, "exposures": 2, "threads": 1}
FAILED = 70


def together(folder: Path, size: int, work: Callable[[int], object]) -> None:
    """`work(rank)` in `size` forks that form a gloo group; one that raises fails the test with its traceback."""
    meeting = folder / f"meeting-{len(list(folder.iterdir()))}"
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = FAILED
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(minutes=2)
            )
            work(rank)
            code = 0
        except BaseException:  # noqa: BLE001 (reported, and the child ends)
            (folder / f"error-{rank}").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * size, "\n".join(path.read_text() for path in folder.glob("error-*"))


def run(events: Events, out: Path, **changes: object) -> TrainReport:
    config = TrainingConfig.model_validate({**QUICK, **changes})
    return train(events, tiny_model(layers=1), config, out, seed=3)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("processes") / "events", num_users=40)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"retrieval_weight": 0.0},
        {"validate_every": 2, "patience": 1},
        {"item_probability": "streaming", "validation_share": 0.0},
    ],
)
def test_two_processes_make_the_steps_of_one(events: Events, tmp_path: Path, changes: dict) -> None:
    alone = run(events, tmp_path / "alone", **changes)
    together(tmp_path, 2, lambda rank: run(events, tmp_path / "both", **changes))
    both = json.loads((tmp_path / "both" / METRICS).read_text())
    assert len(both["curve"]) == len(alone.curve)
    for expected, got in zip(alone.curve, both["curve"]):
        assert got == pytest.approx(expected, rel=1e-4), expected["step"]
    for name in ("best_step", "stopped_at"):
        assert both[name] == getattr(alone, name)
    expected, got = load_file(tmp_path / "alone" / TENSORS), load_file(tmp_path / "both" / TENSORS)
    for name, tensor in expected.items():
        # Adam makes whole steps of gradients that are nothing but rounding, so not every element agrees
        assert (got[name] - tensor).norm() <= 0.02 * tensor.norm() + 1e-6, name
    assert not (tmp_path / "both" / FOLDER).exists()


def test_the_gradients_of_two_are_those_of_one(events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both optimizers scale their gradients, so weights and curves would not show a factor."""

    def first_gradients(file: str) -> None:
        def keep(self: Optimization, number: int) -> bool:
            named = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            if not (tmp_path / file).exists():
                save_file({name: grad.to_dense() for name, grad in named.items()}, tmp_path / file)
            return step(self, number)

        monkeypatch.setattr(Optimization, "step", keep)
        run(events, tmp_path / f"{file}-model", steps=1)

    step = Optimization.step
    together(tmp_path, 2, lambda rank: first_gradients("both" if rank == 0 else "ignored"))
    first_gradients("alone")
    expected, got = load_file(tmp_path / "alone"), load_file(tmp_path / "both")
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


def test_three_processes_are_the_same_to_the_bit_every_time(events: Events, tmp_path: Path) -> None:
    for name in ("first", "second"):
        together(tmp_path, 3, lambda rank: run(events, tmp_path / name))  # noqa: B023 (called at once)
    assert sha256(tmp_path / "first" / TENSORS) == sha256(tmp_path / "second" / TENSORS)


@pytest.mark.parametrize("changes", [{"view_weight": 0.5}, {"labels": "next_event", "held_out": "last_event"}])
def test_losses_that_draw_leave_the_processes_in_step(tmp_path: Path, changes: dict) -> None:
    """Dropout, times and in-batch negatives are each process's own; the weights are compared on the way."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 8)
    rows = SourceRows(users, START + generator.integers(0, 30 * DAY, len(users)), generator.integers(0, 30, len(users)))
    events = write_log(tmp_path / "events", LogParts(40, 30, {"click": rows}))
    model = tiny_model(layers=1, causal=True, dropout=0.2, encoders=["frequency", "gap", "cyclic"])
    config = TrainingConfig.model_validate({**QUICK, **changes, "learning_rate": 0.01})
    together(tmp_path, 2, lambda rank: train(events, model, config, tmp_path / "both"))
    both = json.loads((tmp_path / "both" / METRICS).read_text())
    alone = train(events, model, config, tmp_path / "alone")
    assert both["processes"] == 2
    for expected, got in zip(alone.curve, both["curve"]):
        assert got["loss"] == pytest.approx(expected["loss"], rel=0.25)


def test_a_signal_to_one_stops_all_and_one_goes_on_for_two(
    events: Events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alure.engine.training.loop import compute_losses

    def interrupted(rank: int) -> None:
        def signalled(*arguments: object) -> object:
            os.kill(os.getpid(), signal.SIGTERM)
            return compute_losses(*arguments)  # type: ignore[arg-type]

        if rank == 1:
            monkeypatch.setattr("alure.engine.training.loop.compute_losses", signalled)
        with pytest.raises(Interrupted):
            run(events, tmp_path / "model")

    together(tmp_path, 2, interrupted)
    assert json.loads((tmp_path / "model" / FOLDER / STATE).read_text())["step"] == 1
    assert run(events, tmp_path / "model").resumed_at == 1


def test_gradients_of_rows_are_gathered_in_the_order_of_ranks(tmp_path: Path) -> None:
    """Also from a process that has none, and of a parameter that only one process used."""
    rows = [[4, 1, 4], [], [1, 0]]

    def check(rank: int) -> None:
        table, used, unused = (torch.nn.Parameter(torch.zeros(6, 2)) for _ in range(3))
        if rows[rank]:
            found = torch.nn.functional.embedding(torch.tensor(rows[rank]), table, sparse=True)
            (found * (rank + 1)).sum().backward()
        if rank == 1:
            used.sum().backward()
        Processes(torch.device("cpu"), rank, 3).sum_gradients([used, unused], table)
        assert table.grad is not None
        assert table.grad._indices().tolist() == [[1, 4, 0, 1]]
        expected = torch.zeros(6, 2)
        expected[4], expected[1], expected[0] = 2, 1 + 3, 3
        assert torch.equal(table.grad.to_dense(), expected)
        assert torch.equal(used.grad, torch.ones(6, 2))
        assert unused.grad is None

    together(tmp_path, 3, check)


def test_weights_that_part_are_noticed(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, 1.0 + rank)
        with pytest.raises(AlureError, match="the checksum of the weights is"):
            Processes(torch.device("cpu"), rank, 2).check_in_step(model)

    together(tmp_path, 2, check)


def test_more_processes_than_users_of_a_batch(events: Events, tmp_path: Path) -> None:
    def check(rank: int) -> None:
        with pytest.raises(InputError, match="3 processes share batches of 2 users"):
            run(events, tmp_path / "model", batch_users=2)

    together(tmp_path, 3, check)


def test_shares_are_the_batch(events: Events) -> None:
    from alure.engine.training.sampling import Sampler
    from alure.engine.training.targets import AdEvents, find_exposures, find_targets, first_times

    config = TrainingConfig.model_validate(QUICK)
    last = events.manifest.last_timestamp
    ads = AdEvents.read(events, last)
    sampler = Sampler(find_targets(ads, config), find_exposures(ads, config), first_times(events), config, last, 0)
    sample = sampler.draw()
    shares = [sample.share(rank, 4) for rank in range(4)]
    pairs = [(s.users[s.positives.rows], s.positives.items) for s in shares]
    whole = sorted(zip(sample.users[sample.positives.rows], sample.positives.items))
    assert sorted(pair for users, items in pairs for pair in zip(users, items)) == whole
    for share in shares:
        candidates = np.concatenate([share.positives.items, share.other_positives])
        assert sorted(candidates) == sorted(sample.positives.items)
        assert np.array_equal(share.negatives, sample.negatives)
    shown = [(s.users[e.rows], e.items, e.timestamps, e.labels) for s in shares for e in s.shown]
    (whole_shown,) = sample.shown
    expected = zip(sample.users[whole_shown.rows], whole_shown.items, whole_shown.timestamps, whole_shown.labels)
    assert sorted(row for part in shown for row in zip(*part)) == sorted(expected)


@pytest.mark.slow
def test_torchrun(events: Events, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"training": QUICK}))
    words = ["train", events.path, "--out", tmp_path / "model", "--config", tmp_path / "config.yaml", "--json"]
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, "-m", "alure.engine.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["processes"] == 2
    assert (tmp_path / "model" / TENSORS).exists()
