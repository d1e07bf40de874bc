"""Events after a snapshot, in memory: what an online reader adds to the log. Bounded, and safe for threads."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from alure.engine.errors import InputError
from alure.engine.events.batch import EventBatch, EventSequence
from alure.engine.events.ordering import Rows, occurrences
from alure.engine.events.reader import Events, SourceColumns
from alure.engine.events.recent_input import RowReader

MOST_A_USER = 4096  # newest events of one user that are looked at, so that a bot slows nobody down
DTYPES = {
    "timestamp": "<i8", "source": "<i2", "item": "<i4", "event_type": "<i2", "account": "<i4", "category": "<i4",
    "value": "<f4", "utc_offset": "<i4", "country": "O",
}  # fmt: skip
ORDER = ("timestamp", "source", "item", "event_type", "account", "category", "value", "utc_offset")  # a log's


class Added(NamedTuple):
    """What became of the rows of one `add`."""

    added: int
    before_snapshot: int  # the log's own
    unknown_items: int  # of ads the log does not know; they come with the next ingest


@dataclass(frozen=True)
class RecentRows:
    """Events of some users, in the order of a log: user u's are rows offsets[u] to offsets[u + 1]."""

    offsets: np.ndarray  # int64 [users + 1]
    columns: Rows  # of DTYPES, and dense float32 [n, dim] and semantic_ids int32 [n, levels] where the log has them

    def __len__(self) -> int:
        return len(self.columns["timestamp"])

    def of_sources(self, sources: Sequence[int]) -> "RecentRows":
        kept = np.isin(self.columns["source"], sources)
        before = np.concatenate([[0], np.cumsum(kept)])
        return RecentRows(before[self.offsets], {name: column[kept] for name, column in self.columns.items()})


class RecentEvents:
    """The newest `capacity` events after `snapshot` (unix seconds), in the order in which they came.

    A later event drops the oldest. About 80 bytes an event, and its vectors where the log's events have any.
    """

    def __init__(self, events: Events, snapshot: int, capacity: int) -> None:
        if capacity < 1:
            raise InputError(f"capacity: expected at least 1 event, got {capacity}")
        self.events, self.snapshot, self.capacity = events, snapshot, capacity
        self._reader = RowReader(events)
        self._columns: Rows = {name: np.empty(capacity, dtype) for name, dtype in DTYPES.items()}
        for name, widths in self._reader.vectors.items():
            self._columns[name] = np.empty((capacity, max(widths.values())), "<f4" if name == "dense" else "<i4")
        # event number n lies in slot n % capacity; a user's events are a chain from its newest back
        self._user_ids: list[Any] = []
        self._before = np.empty(capacity, np.int64)
        self._newest: dict[Any, int] = {}
        self._total = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._total, self.capacity)

    def add(self, table: pa.Table | pa.RecordBatch) -> Added:
        """Add rows with the columns of an event log; all of them become visible at once.

        Events up to the snapshot are the log's, so a feed may be played again from an earlier time. Equal rows count
        once, as in a log. Raises InputError, and adds nothing, for a column, type or value that a log would refuse.
        """
        user_ids, rows = self._reader.read(table)
        late = rows["timestamp"] > self.snapshot
        kept = late & (rows["item"] >= 0)
        users = [user_ids[row] for row in np.flatnonzero(kept)]
        rows = {name: column[kept] for name, column in rows.items()}
        with self._lock:
            for first in range(0, len(users), self.capacity):
                block = slice(first, first + self.capacity)
                self._append(users[block], {name: column[block] for name, column in rows.items()})
        return Added(len(users), int((~late).sum()), int((late & ~kept).sum()))

    def read(self, user_ids: Sequence[Any], since: int, until: int) -> RecentRows:
        """Events of these users with since < timestamp <= until."""
        with self._lock:
            slots = [self._slots(user) for user in user_ids]
            take = np.array([slot for own in slots for slot in own], np.int64)
            rows = {name: column[take] for name, column in self._columns.items()}
        user = np.repeat(np.arange(len(slots)), np.array([len(own) for own in slots], np.int64))
        order = np.lexsort([*(rows[name] for name in reversed(ORDER)), user])
        order = order[(rows["timestamp"][order] > since) & (rows["timestamp"][order] <= until)]
        again = np.zeros(len(order), bool)
        if len(order) > 1:
            again[1:] = user[order[1:]] == user[order[:-1]]
            for name in (*ORDER, *self._reader.vectors):
                equal = rows[name][order[1:]] == rows[name][order[:-1]]
                again[1:] &= equal.reshape(len(equal), -1).all(axis=1)
        order = order[~again]
        offsets = np.searchsorted(user[order], np.arange(len(slots) + 1))
        return RecentRows(offsets.astype(np.int64), {name: column[order] for name, column in rows.items()})

    def join(self, user: int, recent: RecentRows, as_of: int, max_events: int | None = None) -> EventBatch:
        """The batch that the log would give for `user` at `as_of`, had it been made with the rows of `recent`.

        user: its index, −1 for one that the log does not know. recent: of this user alone.
        """
        log = self.events.batch(range(max(user, 0), max(user, 0) + 1), self.snapshot, max_events if user >= 0 else 0)
        sequences = {}
        for number, (name, sequence) in enumerate(log.sequences.items()):
            rows = recent.of_sources([number])
            if len(rows):
                sequence = self._extended(name, sequence, user, rows.columns, max_events)
            sequences[name] = sequence
        return EventBatch(log.users, torch.tensor([as_of]), sequences)

    def _extended(self, name: str, log: EventSequence, user: int, rows: Rows, max_events: int | None) -> EventSequence:
        source, count = self.events.source(name), len(rows["timestamp"])
        ids = {
            "items": rows["item"], "accounts": rows["account"], "categories": rows["category"],
            "event_types": rows["event_type"], "timestamps": rows["timestamp"],
            "counts": self._counts(source, user, rows),
        }  # fmt: skip
        new = {column: torch.from_numpy(values.astype(np.int64)) for column, values in ids.items()}
        new["values"] = torch.from_numpy(rows["value"])
        if log.utc_offsets is not None or rows["utc_offset"].any():
            new["utc_offsets"] = torch.from_numpy(rows["utc_offset"].astype(np.int64))
            log = (
                replace(log, utc_offsets=torch.zeros(log.total, dtype=torch.int64)) if log.utc_offsets is None else log
            )
        for column, widths in self._reader.vectors.items():
            if name in widths:
                values = torch.from_numpy(rows[column][:, : widths[name]])
                new[column] = values if column == "dense" else values.to(torch.int64)
        first = 0 if max_events is None else max(0, log.total + count - max_events)
        joined = {column: torch.cat([getattr(log, column), values])[first:] for column, values in new.items()}
        return replace(log, offsets=torch.tensor([0, log.total + count - first]), **joined)

    def _counts(self, source: SourceColumns, user: int, rows: Rows) -> np.ndarray:
        """Occurrences so far of each new event's account, else category, else item, those in the log included."""
        own = slice(0, 0)
        if user >= 0:
            first, last = int(source.offsets[user]), int(source.offsets[user + 1])
            own = slice(first, first + int(np.searchsorted(source.timestamp[first:last], self.snapshot, side="right")))
        missing = np.full(own.stop - own.start, -1, np.int32)
        before = {
            "item": source.item[own],
            "account": missing if source.account is None else source.account[own],
            "category": missing if source.category is None else source.category[own],
        }
        all_rows = {name: np.concatenate([values, rows[name]]) for name, values in before.items()}
        all_rows["user"] = np.zeros(len(all_rows["item"]), np.int64)
        manifest = self.events.manifest
        return occurrences(all_rows, manifest.num_accounts, manifest.num_categories)[len(missing) :]

    def _slots(self, user: Any) -> list[int]:
        number, oldest = self._newest.get(user, -1), max(self._total - self.capacity, 0)
        slots: list[int] = []
        while number >= oldest and len(slots) < MOST_A_USER:
            slots.append(number % self.capacity)
            number = int(self._before[slots[-1]])
        return slots

    def _append(self, users: list[Any], rows: Rows) -> None:
        """At most `capacity` rows."""
        slots = (self._total + np.arange(len(users))) % self.capacity
        for user, slot in zip(users, slots.tolist()):
            number = self._total
            if number < self.capacity:
                self._user_ids.append(user)
            else:
                dropped = self._user_ids[slot]
                if self._newest[dropped] == number - self.capacity:
                    del self._newest[dropped]  # it was the user's last
                self._user_ids[slot] = user
            self._before[slot] = self._newest.get(user, -1)
            self._newest[user] = number
            self._total = number + 1
        for name, column in rows.items():
            self._columns[name][slots] = column
