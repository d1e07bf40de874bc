"""The refresh under fire: killed at random moments and at every file operation, refused by the disk, stopped, raced.

Whatever happens to it, run again it ends with the rows of an undisturbed run, none lost and none twice, and a reader
that looks all the time sees whole generations only. `make crash` runs the long form: 1,000 kills, every operation with
every fault. A seed or an operation that fails is in the test's name.
"""

import errno
import random
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.crash_lab import CrashLab, Fault, Mode, Outcome, crash_lab
from support.model import DAY, START
from support.refresh import jagged_log, rows_of, save_model

from alure.engine.store import EmbeddingStore
from alure.engine.store.upkeep import verify

FAULTS = [
    Fault(mode=Mode.FAIL, errno=errno.ENOSPC), Fault(mode=Mode.FAIL, errno=errno.EIO),
    Fault(mode=Mode.FAIL, errno=errno.EACCES), Fault(mode=Mode.TEAR), Fault(mode=Mode.TEAR_AND_KILL),
    Fault(mode=Mode.KILL_BEFORE), Fault(mode=Mode.KILL_AFTER),
]  # fmt: skip
MOST_OPERATIONS = 60  # of the run below, 49 when this was written; 75 where keys and values are kept
KILLED = -signal.SIGKILL


class Reader(threading.Thread):
    """Reads the newest generation over and over, and keeps what it saw that no reader should."""

    def __init__(self, expected: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.expected, self.wrong, self.reads = expected, list[str](), 0
        self.lock, self.stopped = threading.Lock(), False
        self.store: Path | None = None

    def run(self) -> None:
        while not self.stopped:
            with self.lock:
                if self.store is not None:
                    self.look(self.store)
            threading.Event().wait(0.05)

    def look(self, path: Path) -> None:
        try:
            store = EmbeddingStore(path)
            newest = store.latest("embeddings").generation
            if rows_of(store, newest) != self.expected[newest]:
                self.wrong.append(f"{newest}: not the rows of an undisturbed run")
            self.reads += 1
        except Exception as error:  # noqa: BLE001 (whatever it is, a reader must not see it)
            self.wrong.append(f"{type(error).__name__}: {error}")


class Range:
    """Stores that hold a generation of day 5, and the command that adds an incremental one of day 9."""

    def __init__(self, folder: Path, lab: CrashLab, settings: str = "", **model: Any) -> None:
        self.folder, self.lab = folder, lab
        save_model(folder / "model", jagged_log(folder / "events", num_users=24), layers=1, **model)
        every = "unit_users: 12, token_budget: 150, precision: float32"
        (folder / "config.yaml").write_text(f"refresh: {{{every}{settings}}}\n")
        first = lab.run(folder, self.words(folder / "seed", 5))
        assert first.code == 0, first.error
        shutil.copytree(folder / "seed", folder / "undisturbed")
        self.undisturbed = lab.run(folder / "undisturbed", self.words(folder / "undisturbed", 9))
        assert self.undisturbed.code == 0, self.undisturbed.error
        self.most_operations = MOST_OPERATIONS * 3 // 2 if settings else MOST_OPERATIONS
        assert self.undisturbed.operations < self.most_operations
        store = EmbeddingStore(folder / "undisturbed")
        self.expected = {g.generation: rows_of(store, g.generation) for g in store.generations("embeddings")}
        self.outcomes = Counter[str]()
        self.reader = Reader(self.expected)
        self.reader.start()

    def words(self, store: Path, day: int) -> list[Any]:
        options = ["--config", self.folder / "config.yaml", "--incremental", "--as-of", START + day * DAY]
        return ["refresh", self.folder / "model", self.folder / "events", "--store", store, *options]

    def stop(self) -> None:
        self.reader.stopped = True
        self.reader.join()
        assert self.reader.reads > 10

    @contextmanager
    def store(self) -> Iterator[Path]:
        """A store that the reader watches, and whose job is run to its end and checked afterwards."""
        path = self.folder / "store"
        shutil.copytree(self.folder / "seed", path)
        self.reader.store = path
        try:
            yield path
            self.finish(path)
            assert not self.reader.wrong
        finally:
            with self.reader.lock:
                self.reader.store = None
                shutil.rmtree(path)

    def run(self, store: Path, fault: Fault) -> Outcome:
        outcome = self.lab.run(store, self.words(store, 9), fault)
        where = " ".join(part for part in outcome.last.replace("/", " ").split()[:2] if not part[0].isdigit())
        self.outcomes[f"exit {outcome.code}" + (f" at {where}" if outcome.code else "")] += 1
        assert outcome.code != 70, outcome.error  # something that the command line does not know
        return outcome

    def finish(self, store: Path) -> None:
        again = self.lab.run(store, self.words(store, 9))
        assert again.code == 0, again.error
        opened = EmbeddingStore(store)
        for generation, rows in self.expected.items():
            assert rows_of(opened, generation) == rows
            assert opened.count_written(generation) == len(rows)
        assert len(opened.generations()) == len(self.expected)
        verify(opened)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    folder = tmp_path_factory.mktemp("crash")
    with crash_lab(folder) as lab:
        ground = Range(folder, lab)
        yield ground
        ground.stop()


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Range]:
    """The same with keys and values kept."""
    folder = tmp_path_factory.mktemp("keeping")
    with crash_lab(folder) as lab:
        ground = Range(folder, lab, ", kv_cache: true", causal=True, encoders=["frequency", "gap"])
        yield ground
        ground.stop()


def kill_at_random(ground: Range, seed: int, kills: int) -> None:
    """Up to eight kills a store, so that resumed runs are killed too."""
    moments, done = random.Random(seed), 0
    while done < kills:
        with ground.store() as store:
            for _ in range(moments.randint(1, 8)):
                after_s = moments.uniform(0, ground.undisturbed.seconds)
                outcome = ground.run(store, Fault(signal=signal.SIGKILL, after_s=after_s))
                done += outcome.code == KILLED
                if outcome.code == 0:
                    break


def test_killed_at_random_moments(ground: Range) -> None:
    kill_at_random(ground, seed=0, kills=21)


def test_file_operations_fail_or_are_the_last(ground: Range) -> None:
    """A fault of each kind, spread over the operations; every operation with every fault is in the long form."""
    for place, fault in enumerate(FAULTS):
        strike(ground, (2 * place + 1) * ground.undisturbed.operations // (2 * len(FAULTS)), fault)


def test_keys_and_values_are_kept_or_made_again(keeping: Range) -> None:
    operations = keeping.undisturbed.operations
    for place, fault in enumerate(FAULTS):
        strike(keeping, (2 * place + 1) * operations // (2 * len(FAULTS)), fault)
    assert not list(keeping.folder.glob("undisturbed/kv_cache/*/*#*"))


def strike(ground: Range, at: int, fault: Fault) -> None:
    with ground.store() as store:
        outcome = ground.run(store, Fault(at, fault.mode, fault.errno))
        kills = fault.mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER, Mode.TEAR_AND_KILL)
        if outcome.operations >= at and kills:
            assert outcome.code == KILLED
        elif outcome.code:
            assert outcome.code == 1
            assert outcome.error.splitlines()[-1].startswith("alure: "), outcome.error


def test_stopped_by_a_signal_it_says_so(ground: Range) -> None:
    for share in (0.4, 0.7):
        with ground.store() as store:
            outcome = ground.run(store, Fault(signal=signal.SIGTERM, after_s=share * ground.undisturbed.seconds))
            assert outcome.code in (0, 75)
            assert outcome.code == 0 or "run the same command again to go on" in outcome.error
            assert not list((store / "leases").glob("*/*-*"))  # what it had at hand is given back


def test_two_jobs_at_once_share_the_work(ground: Range) -> None:
    for signal_number in (0, signal.SIGKILL):
        with ground.store() as store:
            faults = [Fault(signal=signal_number, after_s=ground.undisturbed.seconds / 2), Fault()]
            killed, other = ground.lab.run_together(store, [(ground.words(store, 9), fault) for fault in faults])
            assert other.code == 0, other.error
            assert killed.code in (0, KILLED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_a_hundred_kills(ground: Range, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    ground.outcomes.clear()
    kill_at_random(ground, seed, kills=100)
    with capsys.disabled():
        outcomes = ", ".join(f"{count}× {what}" for what, count in ground.outcomes.most_common())
        sys.stdout.write(f"\nseed {seed}: {outcomes}; {ground.reader.reads} reads, all whole\n")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.mode.name}-{errno.errorcode[fault.errno]}")
@pytest.mark.parametrize("name", ["ground", "keeping"])
def test_every_file_operation(request: pytest.FixtureRequest, name: str, fault: Fault) -> None:
    ground: Range = request.getfixturevalue(name)
    for at in range(1, ground.most_operations):
        strike(ground, at, fault)
