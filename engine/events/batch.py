"""A batch of users: per source, one time-sorted jagged sequence of events a user, as tensors."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from alure.kernels.jagged import check_offsets, check_timestamps, segment_ids


@dataclass(frozen=True)
class EventSequence:
    """Events of one source; user b's are rows offsets[b] to offsets[b + 1], oldest first. −1 is a missing id."""

    offsets: Tensor  # int64 [B + 1]
    timestamps: Tensor  # int64 [n], unix seconds
    items: Tensor  # int64 [n], item index
    accounts: Tensor  # int64 [n], account index
    categories: Tensor  # int64 [n], category index
    event_types: Tensor  # int64 [n], index into Manifest.event_types
    values: Tensor  # float32 [n], 0 where the event has none
    counts: Tensor  # int64 [n], occurrences so far of the event's account, else category, else item (1 = first)
    utc_offsets: Tensor | None = None  # int64 [n], seconds east of UTC
    dense: Tensor | None = None  # float32 [n, dim], the events' own vectors (the items' are in ItemTable.dense)
    semantic_ids: Tensor | None = None  # int64 [n, levels], the events' own

    @property
    def total(self) -> int:
        return self.timestamps.shape[0]

    @property
    def lengths(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def places(self) -> tuple[Tensor, Tensor]:
        """(user, place in the user's sequence from 0 on) of every event, int64 [n] each."""
        users = segment_ids(self.offsets, self.total)
        return users, torch.arange(self.total, device=users.device) - self.offsets[users]

    def where(self, mask: Tensor) -> "EventSequence":
        """The events of a mask, bool [n]."""
        kept = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen = {n: c[mask] for n, c in columns.items() if c is not None and n != "offsets"}
        return replace(self, offsets=kept[self.offsets], **chosen)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EventSequence":
        return self._each(lambda column: column.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "EventSequence":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "EventSequence":
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(c) for n, c in columns.items() if c is not None})


@dataclass(frozen=True)
class EventBatch:
    """Users and what they did up to `as_of`."""

    users: Tensor  # int64 [B], user index
    as_of: Tensor  # int64 [B], unix seconds; every event of user b has timestamp <= as_of[b]
    sequences: dict[str, EventSequence]  # one per source of the log, also where it is empty

    def __len__(self) -> int:
        return self.users.shape[0]

    @property
    def total(self) -> int:
        """Events of all sources: what a token budget counts."""
        return sum(sequence.total for sequence in self.sequences.values())

    @property
    def num_events(self) -> Tensor:
        """int64 [B], events of each user in all sources."""
        return torch.stack([s.lengths for s in self.sequences.values()]).sum(0)

    def halves(self) -> tuple["EventBatch", "EventBatch"]:
        """The older and the newer half of every user's events of each source; the newer has the odd one."""
        older: dict[str, EventSequence] = {}
        newer: dict[str, EventSequence] = {}
        for name, s in self.sequences.items():
            users, places = s.places()
            first = places < (s.lengths // 2)[users]
            older[name], newer[name] = s.where(first), s.where(~first)
        return replace(self, sequences=older), replace(self, sequences=newer)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EventBatch":
        return EventBatch(
            self.users.to(device, non_blocking=non_blocking),
            self.as_of.to(device, non_blocking=non_blocking),
            {name: s.to(device, non_blocking=non_blocking) for name, s in self.sequences.items()},
        )

    def pin_memory(self) -> "EventBatch":
        """In memory that a CUDA device copies from while the host goes on."""
        pinned = {name: s.pin_memory() for name, s in self.sequences.items()}
        return EventBatch(self.users.pin_memory(), self.as_of.pin_memory(), pinned)

    def check_integrity(self) -> None:
        """Raise ValueError or TypeError unless shapes agree, times are sorted and nothing is later than `as_of`."""
        size = len(self)
        if self.users.dim() != 1 or self.as_of.shape != self.users.shape:
            raise ValueError(
                f"users, as_of: expected two [B] tensors, got {list(self.users.shape)}, {list(self.as_of.shape)}"
            )
        for name, sequence in self.sequences.items():
            self._check_sequence(name, sequence, size)

    def _check_sequence(self, name: str, s: EventSequence, size: int) -> None:
        if s.offsets.shape != (size + 1,):
            raise ValueError(f"{name}.offsets: expected shape [{size + 1}], got {list(s.offsets.shape)}")
        check_offsets(s.offsets, s.total, f"{name}.offsets", s.timestamps.device)
        check_timestamps(s.timestamps, s.offsets, s.total, f"{name}.timestamps")
        late = s.timestamps > self.as_of[segment_ids(s.offsets, s.total)]
        if bool(late.any()):
            row = int(late.nonzero()[0])
            raise ValueError(f"{name}.timestamps: row {row} ({int(s.timestamps[row])}) is later than its user's as_of")
        smallest = {"items": 0, "accounts": -1, "categories": -1, "event_types": -1, "counts": 1}
        for column in fields(s):
            tensor = getattr(s, column.name)
            if tensor is None or column.name in ("offsets", "timestamps"):
                continue
            if tensor.shape[0] != s.total:
                raise ValueError(f"{name}.{column.name}: expected {s.total} rows, got {tensor.shape[0]}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}.{column.name}: expected finite numbers")
            low = smallest.get(column.name)
            if low is not None and s.total and int(tensor.min()) < low:
                raise ValueError(f"{name}.{column.name}: expected at least {low}, got {int(tensor.min())}")
