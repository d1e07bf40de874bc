"""What is read ahead and written behind, as on a GPU: the same rows, and nothing that fails is lost."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.model import DAY, START
from support.refresh import jagged_log, rows_of, save_model

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError
from alure.engine.model import UserModel
from alure.engine.model.prepared import PreparedBatch
from alure.engine.refresh import RefreshJob, embedder, shard
from alure.engine.refresh.leases import FileLeases
from alure.engine.refresh.overlap import Behind, ahead
from alure.engine.refresh.planner import Unit
from alure.engine.refresh.transfer import Packed
from alure.engine.refresh.watch import Watch
from alure.engine.store import EmbeddingStore

SMALL = RefreshConfig(unit_users=16, token_budget=60, precision="float32")


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "overlap_depth", lambda device: 2)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("alure")] == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_things_come_in_order_and_no_more_than_depth_are_made_beforehand(depth: int) -> None:
    made: list[int] = []
    where = ContextVar("where", default="nowhere")
    where.set("here")

    def make(thing: int) -> tuple[int, str]:
        made.append(thing)
        return thing * thing, where.get()

    for count, (thing, (square, context), ready) in enumerate(ahead(make, iter(range(9)), depth), start=1):
        assert (thing, square, context) == (count - 1, (count - 1) ** 2, "here")
        assert ready <= min(depth, 9 - count)
        time.sleep(0.005)
        assert len(made) <= count + depth
        assert sorted(made) == list(range(len(made)))
    assert sorted(made) == list(range(9))


@pytest.mark.parametrize("depth", [0, 2])
def test_what_making_raises_is_raised_in_its_place(depth: int) -> None:
    def make(thing: int) -> float:
        return 1 / (thing - 3)

    things = ahead(make, range(9), depth)
    assert [next(things)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(things)


def test_a_closed_iterator_makes_nothing_more() -> None:
    made: list[int] = []
    things = ahead(lambda thing: (made.append(thing), time.sleep(0.01)), range(100), 2)
    next(things)
    things.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count <= 3


@pytest.mark.parametrize("depth", [0, 1])
def test_tasks_run_one_at_a_time_and_are_counted_by_the_caller(depth: int) -> None:
    log: list[str] = []
    caller = threading.get_ident()

    def task(name: str) -> str:
        log.append(f"begin {name}")
        time.sleep(0.01)
        log.append(f"end {name}")
        return name

    def then(name: str) -> None:
        assert threading.get_ident() == caller
        log.append(f"count {name}")

    with Behind(depth) as behind:
        for name in "abc":
            behind.run(lambda name=name: task(name), then)
    assert [word for word in log if not word.startswith("count")] == [
        f"{w} {n}" for n in "abc" for w in ("begin", "end")
    ]
    assert [word for word in log if word.startswith("count")] == ["count a", "count b", "count c"]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_task_that_fails_is_not_counted_and_raises_by_the_end(depth: int) -> None:
    counted: list[object] = []

    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind(depth) as behind:
        behind.run(fail, counted.append)
    assert counted == []


def test_the_failure_of_the_block_wins_and_its_task_has_ended() -> None:
    counted: list[object] = []

    def fail_both() -> None:
        with Behind(1) as behind:
            behind.run(lambda: 1 / 0, counted.append)
            raise KeyError

    with pytest.raises(KeyError):
        fail_both()
    assert counted == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events"))
    RefreshJob(folder / "model", folder / "events", folder / "store", config=SMALL).run()
    return folder


def refresh(world: Path, store: Path, dtype: str = "float32") -> EmbeddingStore:
    config = SMALL.model_copy(update={"output_dtype": dtype})
    RefreshJob(world / "model", world / "events", store, config=config).run()
    return EmbeddingStore(store)


@pytest.mark.usefixtures("overlapped")
def test_rows_are_those_of_a_refresh_that_does_one_thing_at_a_time(world: Path, tmp_path: Path) -> None:
    assert rows_of(refresh(world, tmp_path)) == rows_of(EmbeddingStore(world / "store"))


class HostSender:
    """As `Sender`, to a device that is the host."""

    def __init__(self) -> None:
        self.sent = 0

    def pack(self, batch: PreparedBatch) -> Packed:
        return Packed.of(batch, pinned=False)

    def send(self, packed: Packed) -> PreparedBatch:
        self.sent += 1
        buffer = packed.buffer.clone()
        packed.buffer.fill_(0xFF)
        return packed.unpacked(buffer)


@pytest.mark.usefixtures("overlapped")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_packed_and_sent_batches_give_the_same_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    expected = rows_of(refresh(world, tmp_path / "a", dtype))
    sender, start = HostSender(), embedder.Embedder.__init__

    def with_sender(self: embedder.Embedder, *inputs: Any) -> None:
        start(self, *inputs)
        self.sender = sender  # type: ignore[assignment]

    monkeypatch.setattr(embedder.Embedder, "__init__", with_sender)
    assert rows_of(refresh(world, tmp_path / "b", dtype)) == expected
    assert sender.sent > 6


@pytest.mark.usefixtures("overlapped")
def test_what_is_read_ahead_and_not_yet_written_is_watched(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = RefreshJob(world / "model", world / "events", tmp_path, config=SMALL)
    seen: list[dict[str, Any]] = []
    add = Watch.add
    monkeypatch.setattr(Watch, "add", lambda watch, work: (add(watch, work), seen.append(watch.figures())))
    pool = UserModel.pool
    monkeypatch.setattr(UserModel, "pool", lambda *inputs: (time.sleep(0.02), pool(*inputs))[1])
    report = job.run()
    assert {0, 1} <= {figures["batches_ready"] for figures in seen} <= {0, 1, 2}
    assert max(figures["users_pending"] for figures in seen) > 16  # a unit is written while the next is embedded
    assert (seen[-1]["batches_ready"], seen[-1]["users_pending"]) == (0, 0)
    assert seen[-1]["units_written_total"] == report.units


@pytest.mark.usefixtures("overlapped")
def test_units_without_news_are_watched_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first users have news; what follows has nothing to read, which never counts as read ahead at the end."""
    log = jagged_log(tmp_path / "events", late=np.arange(3))
    kept: list[int] = []
    keep = FileLeases.keep
    monkeypatch.setattr(FileLeases, "keep", lambda leases: (kept.append(1), keep(leases))[1])
    for as_of in (START + 8 * DAY, START + 10 * DAY):
        kept.clear()
        job = RefreshJob(world / "model", log, tmp_path / "store", as_of=as_of, incremental=True, config=SMALL)
        report = job.run()
    assert (report.units, report.embedded) == (4, 3)
    assert (job.watch.done.ready, job.watch.done.pending) == (0, 0)
    assert len(kept) == report.batches + 3  # of the others one each


@pytest.mark.parametrize("depth", [0, 2])
def test_with_depth_a_unit_is_begun_before_the_last_batches_of_the_one_before(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    monkeypatch.setattr(embedder, "overlap_depth", lambda device: depth)
    log: list[tuple[str, str]] = []
    begin, rows, pool = embedder.Embedder.begin, embedder.Embedder.rows, UserModel.pool
    thread = threading.current_thread()

    def of_rows(self: embedder.Embedder, task: embedder.UnitTask) -> embedder.UnitResult:
        assert (threading.current_thread() is thread) == (depth == 0)
        assert task.awaited == 0
        log.append(("rows", task.unit.name))
        return rows(self, task)

    monkeypatch.setattr(
        embedder.Embedder, "begin", lambda s, unit, x: (log.append(("begin", unit.name)), begin(s, unit, x))[1]
    )
    monkeypatch.setattr(embedder.Embedder, "rows", of_rows)
    monkeypatch.setattr(UserModel, "pool", lambda *inputs: (log.append(("batch", "")), pool(*inputs))[1])
    refresh(world, tmp_path)
    units = [name for what, name in log if what == "begin"]
    assert [name for what, name in log if what == "rows"] == units
    assert len(units) > 2
    for unit, following in itertools.pairwise(units):
        if depth == 0:
            assert log.index(("rows", unit)) < log.index(("begin", following))
        else:
            begun = log.index(("begin", following))
            assert begun < log.index(("rows", unit))
            assert ("batch", "") in log[begun : log.index(("rows", unit))]  # the device has work in between


@pytest.mark.usefixtures("overlapped")
def test_a_failure_in_the_unit_ahead_releases_both_and_loses_none(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    begin = embedder.Embedder.begin

    def fail(self: embedder.Embedder, unit: Unit, store: EmbeddingStore) -> embedder.UnitTask:
        begun.append(unit.name)
        if len(begun) == 3:
            raise AlureError("unreadable")
        return begin(self, unit, store)

    monkeypatch.setattr(embedder.Embedder, "begin", fail)
    with pytest.raises(AlureError, match="unreadable"):
        refresh(world, tmp_path)
    assert not [path for path in (tmp_path / "leases").rglob("*") if path.is_file()]
    monkeypatch.setattr(embedder.Embedder, "begin", begin)
    assert rows_of(refresh(world, tmp_path)) == rows_of(EmbeddingStore(world / "store"))


@pytest.mark.usefixtures("overlapped")
def test_bytes_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows_of(refresh(world, tmp_path / "a", "int8"))
    monkeypatch.setattr(embedder, "overlap_depth", lambda device: 0)
    assert found == rows_of(refresh(world, tmp_path / "b", "int8"))


@pytest.mark.usefixtures("overlapped")
@pytest.mark.parametrize("broken", [0, 1, 3])
def test_a_unit_that_cannot_be_written_ends_the_job_and_is_written_by_the_next(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    written: list[str] = []
    write = shard.write_unit

    def fail(store, generation, unit, result) -> None:
        if len(written) == broken:
            raise AlureError("disk full")
        written.append(unit.name)
        write(store, generation, unit, result)

    monkeypatch.setattr(shard, "write_unit", fail)
    with pytest.raises(AlureError, match="disk full"):
        refresh(world, tmp_path)
    assert EmbeddingStore(tmp_path).generations() == []
    assert not [path for path in (tmp_path / "leases").rglob("*") if path.is_file()]
    monkeypatch.setattr(shard, "write_unit", write)
    assert rows_of(refresh(world, tmp_path)) == rows_of(EmbeddingStore(world / "store"))


@pytest.mark.usefixtures("overlapped")
def test_users_that_do_not_fit_in_memory_go_in_halves_after_those_under_way_have_arrived(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = UserModel.pool

    def crowded(self: UserModel, batch, catalog):
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return pool(self, batch, catalog)

    monkeypatch.setattr(UserModel, "pool", crowded)
    found, expected = (store.read_matrix() for store in (refresh(world, tmp_path), EmbeddingStore(world / "store")))
    np.testing.assert_allclose(found.values, expected.values, atol=2e-6)
