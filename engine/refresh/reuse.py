"""Histories that grew since an earlier generation: keys and values that it kept, and the new events' for the next."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alure.engine.events import EventBatch, Events
from alure.engine.model import UserModel
from alure.engine.model.catalog import Catalog
from alure.engine.model.key_values import EventHashes, KeyValues, check_reusable, extend, key_value_width
from alure.engine.refresh.planner import Unit
from alure.engine.store.kv_cache import KvCache, Segments, SegmentWriter


@dataclass(frozen=True)
class KvFolders:
    """read: of the generations that a chain of incremental refreshes began with, oldest first; write: of this one."""

    read: tuple[Path, ...]
    write: Path


def row_bytes(model: UserModel, dtype: torch.dtype) -> dict[str, int]:
    """By source, what the keys and values of one event take."""
    return {s.source: dtype.itemsize * key_value_width(s, model.config.width) for s in model.sources()}


class Reused(NamedTuple):
    """pooled [B, n, d]; cached: by source, how many events of each user did not run through the layers, int64 [B]."""

    pooled: Tensor
    cached: dict[str, np.ndarray]
    segments: list[Segments]  # of the events that did


class Reuse:
    """What the taps of a model find in histories, by the keys and values of an earlier generation where they are the
    same to their end.

    max_events: of a source; a history of so many loses its oldest event with every new one, so nothing of it is kept.
    """

    def __init__(
        self, model: UserModel, catalog: Catalog, events: Events, folders: KvFolders, max_events: int | None
    ) -> None:
        check_reusable(model.config)
        self.model, self.catalog, self.events = model, catalog, events
        self.folders, self.max_events = folders, max_events
        self.row_bytes = row_bytes(model, model.dtype)
        self.ids = events.users.schema.field("user_id").type
        self.cache = KvCache(folders.read, self.row_bytes, self.ids, events.num_users, events.user_indices)

    def writer(self, unit: Unit) -> SegmentWriter:
        return SegmentWriter(self.folders.write / f"{unit.name}.arrow", self.ids)

    def pool(self, batch: EventBatch) -> Reused:
        hashes = {source: EventHashes(self.catalog, source, batch.sequences[source]) for source in self.row_bytes}
        known = {source: self._read(source, batch, of_source) for source, of_source in hashes.items()}
        pooled = extend(self.model, batch, self.catalog, known)
        segments = [self._segments(source, batch, known[source], of_source) for source, of_source in hashes.items()]
        return Reused(pooled, {source: kv.cached.numpy(force=True) for source, kv in known.items()}, segments)

    def _may_keep(self, lengths: Tensor) -> Tensor:
        return torch.ones_like(lengths, dtype=torch.bool) if self.max_events is None else lengths < self.max_events

    def _read(self, source: str, batch: EventBatch, hashes: EventHashes) -> KeyValues:
        """What is cached of histories that begin with the same events."""
        sequence, users = batch.sequences[source], batch.users.numpy(force=True)
        events, fingerprints = (torch.from_numpy(x).to(self.model.device) for x in self.cache.cached(source, users))
        same = self._may_keep(sequence.lengths) & (events <= sequence.lengths)
        same &= hashes.of_first(events) == fingerprints
        cached = (events * same).numpy(force=True)
        values = torch.empty(
            sequence.total, self.row_bytes[source] // self.model.dtype.itemsize, dtype=self.model.dtype
        )
        places = np.flatnonzero(cached)
        starts = sequence.offsets.numpy(force=True)[places]
        cached[places] *= self.cache.read(source, users[places], values.view(torch.uint8).numpy(), starts)
        return KeyValues(torch.from_numpy(cached).to(self.model.device), values.to(self.model.device))

    def _segments(self, source: str, batch: EventBatch, known: KeyValues, hashes: EventHashes) -> Segments:
        sequence = batch.sequences[source]
        chosen = self._may_keep(sequence.lengths) & (sequence.lengths > known.cached)
        ends = known.cached, sequence.lengths
        first, last = (x[chosen].numpy(force=True) for x in ends)
        before_first, before_last = (hashes.of_first(x)[chosen].numpy(force=True) for x in ends)
        new = chosen[hashes.users] & (hashes.places >= known.cached[hashes.users])
        values = known.values if bool(new.all()) else known.values[new]
        users = self.events.users["user_id"].take(batch.users[chosen].numpy(force=True)).combine_chunks()
        rows = values.view(torch.uint8).numpy(force=True)
        return Segments(source, users, first, last, before_first, before_last, rows)
