"""Embeds units: packs users by token budget, runs the model, puts the rows back in order, carries unchanged users."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.profiler import record_function

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.refresh.earlier import Earlier, earlier_rows
from alure.engine.refresh.planner import Unit, count_events, pack
from alure.engine.store import EmbeddingStore
from alure.engine.store.rows import embedding_schema
from alure.kernels.backend import native_instruction_set

STAGES = READ, EMBED = ("alure.read", "alure.embed")  # as a profiler names them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bfloat16 where it multiplies bfloat16 itself, float32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or native_instruction_set() in ("amx", "avx512 bf16")
    return "bfloat16" if fast else "float32"


@dataclass(frozen=True)
class Snapshot:
    """What a generation is made from, and how far the work may go.

    base: the generation to carry users forward from. most_bad: users without a finite embedding that a job puts up
    with. least_unseen, deadline (unix seconds): under a time limit, users whose embedding has seen all but a smaller
    share of their history are carried forward, and after the deadline all are.
    """

    generation: str
    as_of: int
    model: str
    base: str | None
    config: RefreshConfig
    most_bad: int = 0
    least_unseen: float = 0.0
    deadline: float | None = None


@dataclass
class Work:
    """How much was done. bad: users whose embedding was not finite."""

    embedded: int = 0
    tokens: int = 0
    batches: int = 0
    bad: int = 0

    def add(self, other: "Work") -> None:
        self.embedded += other.embedded
        self.tokens += other.tokens
        self.batches += other.batches
        self.bad += other.bad


@dataclass(frozen=True)
class UnitResult:
    """rows: of the embeddings table; bad: ids of users whose embedding is not finite, who have no row."""

    rows: pa.Table
    bad: list[Any]
    work: Work


class Embedder:
    """One model on one device, over one event log."""

    def __init__(self, model: UserModel, events: Events, snapshot: Snapshot, device: torch.device) -> None:
        dtype = DTYPES[resolve_precision(snapshot.config.precision, device)]
        if dtype != model.dtype:
            model = copy.deepcopy(model)  # the caller's keeps its own
        self.model = model.to(device, dtype).eval()
        self.catalog = self.model.catalog(events)
        self.events, self.snapshot, self.device = events, snapshot, device
        self.width = model.config.num_embeddings * model.config.width

    def embed(
        self, users: np.ndarray, tokens: np.ndarray, after_batch: Callable[[int, int], None]
    ) -> tuple[np.ndarray, Work]:
        """float32 [n, k·d] of `users` (indices), in their order, whatever batches they shared.

        after_batch(users, tokens) is called after each batch; what it raises ends the work.
        """
        values = np.empty((len(users), self.width), dtype=np.float32)
        batches = pack(tokens, self.snapshot.config.token_budget)
        with torch.inference_mode():
            for places in batches:
                values[places] = self._batch(users[places])
                after_batch(len(places), int(tokens[places].sum()))
        return values, Work(len(users), int(tokens.sum()), len(batches))

    def _batch(self, users: np.ndarray) -> np.ndarray:
        """float32 [n, k·d]. Users that do not fit in memory together go in halves."""
        with record_function(READ):
            batch = self.events.batch(users, self.snapshot.as_of, self.snapshot.config.max_events)
        try:
            with record_function(EMBED):
                found = self.model(batch.to(self.device), self.catalog)
                return found.float().reshape(len(users), self.width).cpu().numpy()
        except (torch.OutOfMemoryError, MemoryError):
            if len(users) == 1:
                raise AlureError(
                    f"refresh: the {batch.total:,} events of one user do not fit in the memory of {self.device}; "
                    "limit histories by max_events in the configuration's section refresh"
                ) from None
        half = len(users) // 2  # outside the handler, which would hold on to the failed pass's tensors
        return np.concatenate([self._batch(users[:half]), self._batch(users[half:])])

    def unit_rows(self, unit: Unit, store: EmbeddingStore, after_batch: Callable[[int, int], None]) -> UnitResult:
        """The unit's users that have an event up to as_of: those who need it embedded, the others carried forward."""
        snapshot = self.snapshot
        num_events, tokens = count_events(self.events, unit, snapshot.as_of, snapshot.config.max_events)
        earlier = earlier_rows(store, snapshot.base, self.events, unit)
        present = num_events > 0
        chosen = present & needs_refresh(snapshot, earlier, num_events)
        places = np.flatnonzero(chosen)
        values, work = self.embed(places + unit.first, tokens[places], after_batch)
        finite = np.isfinite(values).all(axis=1)
        work.bad = len(places) - int(finite.sum())
        known = self.events.users.slice(unit.first, unit.last - unit.first)
        rows = self._rows(known.take(places[finite]), num_events[places[finite]], values[finite])
        carried = earlier.keep(present & ~chosen)
        if len(carried):
            rows = pa.concat_tables([rows, carried.cast(rows.schema)])
        return UnitResult(rows, known["user_id"].take(places[~finite]).to_pylist(), work)

    def _rows(self, users: pa.Table, num_events: np.ndarray, values: np.ndarray) -> pa.Table:
        count, schema = len(users), embedding_schema(users["user_id"].type)
        columns = {
            "user_id": users["user_id"],
            "country": users["country"].cast(pa.string()),
            "generation": pa.repeat(self.snapshot.generation, count),
            "embedding": as_lists(values),
            "as_of": pa.repeat(self.snapshot.as_of, count),
            "model": pa.repeat(self.snapshot.model, count),
            "num_events": pa.array(num_events),
            "refreshed_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC")), count),
        }
        return pa.table([columns[name] for name in schema.names], schema=schema)


def needs_refresh(snapshot: Snapshot, earlier: Earlier, num_events: np.ndarray) -> np.ndarray:
    """bool [n]: users with events that their embedding has not seen, or with one older than max_age."""
    unseen = earlier.unseen_share(num_events)
    needed = unseen > 0
    if snapshot.config.max_age is not None:
        needed |= earlier.older_than(snapshot.as_of - snapshot.config.max_age)
    if snapshot.deadline is None:
        return needed
    return needed & (unseen >= snapshot.least_unseen) & (time.time() < snapshot.deadline)


def as_lists(values: np.ndarray) -> pa.ListArray:
    """float32 [n, width] → list<float32> [n]."""
    count, width = values.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int64) * width, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
