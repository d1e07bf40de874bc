"""Embeds units: packs users by token budget, runs the model, puts the rows back in order, carries unchanged users."""

import copy
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError
from alure.engine.events import EventBatch, Events
from alure.engine.model import UserModel
from alure.engine.model.flops import ForwardFlops
from alure.engine.model.prepared import PreparedBatch
from alure.engine.ranges import op
from alure.engine.refresh.earlier import Earlier, earlier_rows
from alure.engine.refresh.overlap import ahead
from alure.engine.refresh.planner import Unit, count_events, pack
from alure.engine.refresh.reuse import KvFolders, Reuse, Reused
from alure.engine.refresh.transfer import Packed, Sender
from alure.engine.store import EmbeddingStore
from alure.engine.store.kv_cache import SegmentWriter
from alure.engine.store.rows import FINGERPRINT
from alure.engine.store.vectors import Vectors
from alure.kernels.backend import native_instruction_set

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bfloat16 where it multiplies bfloat16 itself, float32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or native_instruction_set() in ("amx", "avx512 bf16")
    return "bfloat16" if fast else "float32"


def token_budget(config: RefreshConfig, device: torch.device) -> int:
    """Events a batch. A GPU takes so many that it computes for longer than the host needs for launches and plans."""
    return config.token_budget or (262_144 if device.type == "cuda" else 32_768)


def overlap_depth(device: torch.device) -> int:
    """Batches that are read ahead, and that may be on their way back: see `alure.engine.refresh.overlap`."""
    return 4 if device.type == "cuda" else 0


@dataclass(frozen=True)
class Snapshot:
    """What a generation is made from, and how far the work may go.

    base: the generation to carry users forward from. most_bad: users without a finite embedding that a job puts up
    with. least_unseen, deadline (unix seconds): under a time limit, users whose embedding has seen all but a smaller
    share of their history are carried forward, and after the deadline all are. kv_cache: where keys and values are
    kept, None where they are not.
    """

    generation: str
    as_of: int
    model: str
    base: str | None
    config: RefreshConfig
    most_bad: int = 0
    least_unseen: float = 0.0
    deadline: float | None = None
    kv_cache: KvFolders | None = None


@dataclass
class Work:
    """How much was done. tokens: events read, of which `reused` had keys and values from before. flops: of the model's
    products. bad: users whose embedding was not finite. pending: users embedded in units that are not written yet;
    ready: batches read ahead. Of these two, the change.
    """

    embedded: int = 0
    tokens: int = 0
    reused: int = 0
    batches: int = 0
    flops: float = 0.0
    units: int = 0
    bad: int = 0
    pending: int = 0
    ready: int = 0

    def add(self, other: "Work") -> None:
        for name, more in vars(other).items():
            setattr(self, name, getattr(self, name) + more)


@dataclass(frozen=True)
class UnitResult:
    """rows: of the embeddings table; bad: ids of users whose embedding is not finite, who have no row."""

    rows: pa.Table
    bad: list[Any]
    work: Work


@dataclass(eq=False, kw_only=True)
class Task:
    """Users (indices) to embed, in their order, and what there is of that."""

    users: np.ndarray
    tokens: np.ndarray
    vectors: Vectors
    work: Work = field(default_factory=Work)
    writer: SegmentWriter | None = None  # takes the new keys and values where they are kept
    resources: ExitStack = field(default_factory=ExitStack)  # closed once all is there

    def __post_init__(self) -> None:
        self.awaited = len(self.users)  # whose embeddings are not there yet


@dataclass(eq=False, kw_only=True)
class UnitTask(Task):
    """A unit's users who need to be embedded; its other rows are carried forward."""

    unit: Unit
    num_events: np.ndarray  # of `users`
    carried: pa.Table


TaskKind = TypeVar("TaskKind", bound=Task)


@dataclass(frozen=True)
class Read:
    """A batch, and what the forward pass takes of it; None where keys and values of earlier are to be reused."""

    batch: EventBatch
    ready: PreparedBatch | Packed | None


@dataclass(frozen=True)
class Arriving:
    """Embeddings on their way from the device; on the CPU they are there."""

    task: Task
    places: np.ndarray
    values: Tensor
    scales: Tensor | None
    sent: torch.cuda.Event | None

    @classmethod
    def send(cls, task: Task, places: np.ndarray, values: Tensor, scales: Tensor | None) -> "Arriving":
        """values [n, k·d], scales [n, k]."""
        host = values.to("cpu", non_blocking=True)
        host_scales = None if scales is None else scales.to("cpu", non_blocking=True)
        sent = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        return cls(task, places, host, host_scales, sent)

    def store(self) -> None:
        vectors = self.task.vectors
        if self.sent is not None:
            self.sent.synchronize()
        vectors.values[self.places] = self.values.numpy()
        if self.scales is not None and vectors.scales is not None:
            vectors.scales[self.places] = self.scales.numpy()
        self.task.awaited -= len(self.places)


class Embedder:
    """One model on one device, over one event log."""

    def __init__(self, model: UserModel, events: Events, snapshot: Snapshot, device: torch.device) -> None:
        self.depth, self.token_budget = overlap_depth(device), token_budget(snapshot.config, device)
        dtype = DTYPES[resolve_precision(snapshot.config.precision, device)]
        if dtype != model.dtype:
            model = copy.deepcopy(model)  # the caller's keeps its own
        self.model = model.to(device, dtype).eval()
        self.host_catalog = self.model.catalog(events, torch.device("cpu"))  # batches are prepared on the host
        self.catalog = self.host_catalog.to(device)
        self.sender = Sender(device) if device.type == "cuda" else None
        self.flops = ForwardFlops(self.model)
        self.events, self.snapshot, self.device = events, snapshot, device
        self.reuse = None
        if snapshot.kv_cache is not None:
            self.reuse = Reuse(self.model, self.catalog, events, snapshot.kv_cache, snapshot.config.max_events)

    def embed(self, users: np.ndarray, tokens: np.ndarray, after_batch: Callable[[Work], None]) -> tuple[Vectors, Work]:
        """The embeddings of `users` (indices), in their order, whatever batches they shared.

        after_batch is called with what each batch was; what it raises ends the work.
        """
        (task,) = self.embed_all([Task(users=users, tokens=tokens, vectors=self._empty(len(users)))], after_batch)
        return task.vectors, task.work

    def embed_all(
        self, tasks: Iterable[TaskKind], after_batch: Callable[[Work], None]
    ) -> Generator[TaskKind, None, None]:
        """The tasks in their order, each once all of it is there. On a GPU the first batches of the next one are read
        and launched before that, so that between two tasks the device has work. after_batch is called for a task
        without users, too.
        """
        begun: deque[TaskKind] = deque()
        arriving: deque[Arriving] = deque()
        were_ready = 0

        def batches() -> Iterator[tuple[TaskKind, np.ndarray]]:
            for task in tasks:
                begun.append(task)
                resources.push(task.resources)
                for places in pack(task.tokens, self.token_budget) or [np.empty(0, np.int64)]:
                    yield task, places

        def read(batch: tuple[TaskKind, np.ndarray]) -> Read | None:
            task, places = batch
            return self._read(task.users[places]) if len(places) else None

        def complete() -> Iterator[TaskKind]:
            while begun and not begun[0].awaited:
                begun[0].resources.close()
                yield begun.popleft()

        with ExitStack() as resources, closing(ahead(read, batches(), self.depth)) as in_turn:
            for (task, places), found, ready in in_turn:
                work = Work(len(places), int(task.tokens[places].sum()), ready=ready - were_ready)
                were_ready = ready
                if found is not None:
                    with torch.inference_mode():
                        work.add(self._fill(task, arriving, places, found))
                    work.batches = 1
                    while len(arriving) > self.depth:
                        arriving.popleft().store()
                task.work.add(work)
                after_batch(work)
                yield from complete()
            while arriving:
                arriving.popleft().store()
            yield from complete()

    def _empty(self, users: int) -> Vectors:
        model = self.model.config
        return Vectors.empty(users, model.num_embeddings, model.width, self.snapshot.config.output_dtype)

    def _read(self, users: np.ndarray) -> Read:
        with op("read"), torch.inference_mode():
            batch = self.events.batch(users, self.snapshot.as_of, self.snapshot.config.max_events)
            if self.reuse is not None:
                return Read(batch.pin_memory() if self.sender else batch, None)
            prepared = self.model.prepare(batch, self.host_catalog)
            return Read(batch, self.sender.pack(prepared) if self.sender else prepared)

    def _fill(self, task: Task, arriving: deque[Arriving], places: np.ndarray, read: Read) -> Work:
        """Embed users[places] of the task, who were read; FLOPs and reused events. Users that do not fit in memory
        together go in halves.
        """
        try:
            work = Work(flops=self.flops({name: s.lengths.numpy() for name, s in read.batch.sequences.items()}))
            arriving.append(self._embed(task, places, read, work))
            return work
        except (torch.OutOfMemoryError, MemoryError):
            if len(places) == 1:
                raise AlureError(
                    f"refresh: the {read.batch.total:,} events of one user do not fit in the memory of {self.device}; "
                    "limit histories by max_events in the configuration's section refresh"
                ) from None
        while arriving:  # what is under way has memory too
            arriving.popleft().store()
        done = Work()
        for half in np.array_split(places, 2):  # outside the handler, which would hold on to the failed pass's tensors
            done.add(self._fill(task, arriving, half, self._read(task.users[half])))
        return done

    def _embed(self, task: Task, places: np.ndarray, read: Read, work: Work) -> Arriving:
        """work: of the whole histories; what cached keys and values spare is taken off."""
        scales = plan = grown = None
        batch = self._to_device(read)
        with op("embed"):
            if isinstance(batch, PreparedBatch):
                pooled, plan = self.model.pool(batch, self.catalog), batch.compression
            else:
                grown = self._pool_grown(batch, work)
                pooled = grown.pooled
            if self.snapshot.config.output_dtype == "int8":
                found, scales = self.model.compress_int8(pooled, plan)
            else:
                found = self.model.compress(pooled, plan).to(DTYPES[self.snapshot.config.output_dtype])
        with op("to_host"):
            arriving = Arriving.send(task, places, found.flatten(1), scales)
        if grown is not None and task.writer is not None:  # not before nothing can be too large any more
            with op("write"):
                for segments in grown.segments:
                    task.writer.add(segments)
        return arriving

    def _to_device(self, read: Read) -> EventBatch | PreparedBatch:
        with op("to_device"):
            if read.ready is None:
                return read.batch.to(self.device, non_blocking=True)
            if isinstance(read.ready, Packed):
                assert self.sender is not None
                return self.sender.send(read.ready)
            return read.ready

    def _pool_grown(self, batch: EventBatch, work: Work) -> Reused:
        assert self.reuse is not None
        found = self.reuse.pool(batch)
        work.reused += sum(int(events.sum()) for events in found.cached.values())
        work.flops -= self.flops.saved(found.cached)
        return found

    def begin(self, unit: Unit, store: EmbeddingStore) -> UnitTask:
        """The unit's users with an event up to as_of: those who need to be embedded, the others carried forward."""
        snapshot = self.snapshot
        num_events, tokens = count_events(self.events, unit, snapshot.as_of, snapshot.config.max_events)
        earlier = earlier_rows(store, snapshot.base, self.events, unit, num_events)
        present = num_events > 0
        chosen = present & needs_refresh(snapshot, earlier, num_events)
        places, resources = np.flatnonzero(chosen), ExitStack()
        return UnitTask(
            users=places + unit.first,
            tokens=tokens[places],
            vectors=self._empty(len(places)),
            writer=None if self.reuse is None else resources.enter_context(self.reuse.writer(unit)),
            resources=resources,
            unit=unit,
            num_events=num_events[places],
            carried=earlier.keep(present & ~chosen),
        )

    def rows(self, task: UnitTask) -> UnitResult:
        """What is written of an embedded unit; a GPU takes no part in it."""
        unit, finite = task.unit, task.vectors.finite()
        users = self.events.users.slice(unit.first, unit.last - unit.first).take(task.users - unit.first)
        fingerprints = self.events.fingerprints(self.snapshot.as_of, task.users[finite])
        rows = self._rows(users.filter(finite), task.num_events[finite], fingerprints, task.vectors.columns(finite))
        if len(task.carried):
            rows = pa.concat_tables([rows, task.carried.select(rows.schema.names).cast(rows.schema)])
        bad = users["user_id"].filter(~finite).to_pylist()
        return UnitResult(rows, bad, replace(task.work, bad=len(bad)))

    def _rows(
        self, users: pa.Table, num_events: np.ndarray, fingerprints: np.ndarray, embeddings: dict[str, pa.Array]
    ) -> pa.Table:
        count, now = len(users), pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC"))
        return pa.table(
            {
                "user_id": users["user_id"],
                "country": users["country"].cast(pa.string()),
                "generation": pa.repeat(self.snapshot.generation, count),
                **embeddings,
                "as_of": pa.repeat(self.snapshot.as_of, count),
                "model": pa.repeat(self.snapshot.model, count),
                "num_events": pa.array(num_events),
                "refreshed_at": pa.repeat(now, count),
                FINGERPRINT: pa.array(fingerprints),
            }
        )


def needs_refresh(snapshot: Snapshot, earlier: Earlier, num_events: np.ndarray) -> np.ndarray:
    """bool [n]: users with events that their embedding has not seen, or with one older than max_age."""
    unseen = earlier.unseen_share(num_events)
    needed = unseen > 0
    if snapshot.config.max_age is not None:
        needed |= earlier.older_than(snapshot.as_of - snapshot.config.max_age)
    if snapshot.deadline is None:
        return needed
    return needed & (unseen >= snapshot.least_unseen) & (time.time() < snapshot.deadline)
