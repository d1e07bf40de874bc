"""Embeds units: packs users by token budget, runs the model, puts the rows back in order, carries unchanged users."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.refresh.planner import Unit, count_events, pack
from alure.engine.store import EmbeddingStore
from alure.engine.store.rows import embedding_schema
from alure.kernels.backend import native_instruction_set

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bfloat16 where matrix units multiply it, float32 elsewhere."""
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or native_instruction_set() == "amx"
    return "bfloat16" if fast else "float32"


@dataclass(frozen=True)
class Snapshot:
    """What a generation is made from. base: the generation to carry unchanged users forward from."""

    generation: str
    as_of: int
    model: str
    base: str | None
    config: RefreshConfig


@dataclass
class Work:
    """How much was done."""

    embedded: int = 0
    tokens: int = 0
    batches: int = 0

    def add(self, other: "Work") -> None:
        self.embedded += other.embedded
        self.tokens += other.tokens
        self.batches += other.batches


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
        self, users: np.ndarray, tokens: np.ndarray, after_batch: Callable[[int], None]
    ) -> tuple[np.ndarray, Work]:
        """float32 [n, k·d] of `users` (indices), in their order, whatever batches they shared.

        after_batch(users) is called after each batch; what it raises ends the work.
        Raises AlureError naming users whose embedding is not finite.
        """
        values = np.empty((len(users), self.width), dtype=np.float32)
        batches = pack(tokens, self.snapshot.config.token_budget)
        with torch.inference_mode():
            for places in batches:
                batch = self.events.batch(users[places], self.snapshot.as_of, self.snapshot.config.max_events)
                found = self.model(batch.to(self.device), self.catalog)
                values[places] = found.float().reshape(len(places), self.width).cpu().numpy()
                self._check_finite(users[places], values[places])
                after_batch(len(places))
        return values, Work(len(users), int(tokens.sum()), len(batches))

    def unit_rows(self, unit: Unit, store: EmbeddingStore, after_batch: Callable[[int], None]) -> tuple[pa.Table, Work]:
        """The unit's rows of the embeddings table; users without an event up to as_of are left out."""
        snapshot = self.snapshot
        num_events, tokens = count_events(self.events, unit, snapshot.as_of, snapshot.config.max_events)
        known = self.events.users.slice(unit.first, unit.last - unit.first).append_column("now", pa.array(num_events))
        carried = self._unchanged(unit, known, store)
        fresh = (num_events > 0) & ~carried.changed_nothing
        places = np.flatnonzero(fresh)
        values, work = self.embed(places + unit.first, tokens[places], after_batch)
        chosen = known.take(places)
        count, schema = len(places), embedding_schema(known["user_id"].type)
        columns = {
            "user_id": chosen["user_id"],
            "country": chosen["country"].cast(pa.string()),
            "generation": pa.repeat(snapshot.generation, count),
            "embedding": as_lists(values),
            "as_of": pa.repeat(snapshot.as_of, count),
            "model": pa.repeat(snapshot.model, count),
            "num_events": chosen["now"],
            "refreshed_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC")), count),
        }
        rows = pa.table([columns[name] for name in schema.names], schema=schema)
        return pa.concat_tables([rows, carried.rows.cast(schema)]) if len(carried.rows) else rows, work

    def _unchanged(self, unit: Unit, known: pa.Table, store: EmbeddingStore) -> "Carried":
        """Who keeps the base generation's row: whose number of events up to as_of is the row's.

        Then no event lies between the row's as_of and this one, nor has an older one come late.
        """
        nobody = Carried(np.zeros(len(known), bool), embedding_schema(known["user_id"].type).empty_table())
        if self.snapshot.base is None:
            return nobody
        rows = []
        for country in pc.unique(known["country"]).to_pylist():
            ids = known.filter(pc.equal(known["country"], country))["user_id"]
            rows.append(store.read_range(self.snapshot.base, country, (ids[0], ids[-1])))  # the log is sorted by id
        before = pa.concat_tables(rows)
        if before["user_id"].type != known["user_id"].type or not len(before):
            return nobody
        place = pc.index_in(before["user_id"], value_set=known["user_id"].combine_chunks())
        now = known["now"].take(place)
        same = pc.fill_null(pc.equal(now, before["num_events"]), False)
        kept = np.zeros(len(known), bool)
        kept[place.filter(same).to_numpy()] = True
        return Carried(kept, before.filter(same))

    def _check_finite(self, users: np.ndarray, values: np.ndarray) -> None:
        bad = users[~np.isfinite(values).all(axis=1)]
        if len(bad):
            named = ", ".join(str(i) for i in self.events.users["user_id"].take(bad[:5]).to_pylist())
            raise AlureError(
                f"refresh: the embeddings of {len(bad)} users are not finite, among them {named}; nothing was "
                "published. The model's weights or these users' dense vectors hold NaN, Inf or huge numbers"
            )


@dataclass(frozen=True)
class Carried:
    """changed_nothing: bool per user of the unit; rows: theirs in the base generation."""

    changed_nothing: np.ndarray
    rows: pa.Table


def as_lists(values: np.ndarray) -> pa.ListArray:
    """float32 [n, width] → list<float32> [n]."""
    count, width = values.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int64) * width, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
