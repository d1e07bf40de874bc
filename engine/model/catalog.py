"""From a log's indexes to rows of the model's hashed embedding table, worked out once for a log.

Indexes change from one ingest to the next; the 64-bit keys of ids do not. Rows are hashes of the keys, so a model reads
any later log. Every attribute salts its keys: an account and a category of one key get rows of their own.
"""

import hashlib
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alure.engine.events import Events, EventSequence
from alure.engine.model.schema import EventSchema

SEMANTIC_STEP = 0x9E3779B1  # odd: codes of one level do not collide in a table of 2^n rows


@dataclass(frozen=True)
class Catalog:
    """Table rows by the log's indexes, int64, −1 = missing; all tensors on one device."""

    schema: EventSchema
    hash_rows: int
    items: Tensor  # [num_items, 2], two independent hashes of each item
    accounts: Tensor  # [num_accounts]
    categories: Tensor  # [num_categories]
    event_types: Tensor  # [num_event_types]
    item_accounts: Tensor  # [num_items], row of the item's account
    item_categories: Tensor  # [num_items], row of the item's category
    item_codes: Tensor | None = None  # [num_items, levels], rows of the item's semantic ids
    dense: Tensor | None = None  # [num_items, dense_dim] float32; memory-mapped while on the CPU

    @classmethod
    def of(cls, events: Events, hash_rows: int) -> "Catalog":
        items, schema = events.items, EventSchema.of(events.manifest)

        def rows(keys: np.ndarray, attribute: str) -> Tensor:
            return torch.from_numpy(hash_keys(keys, attribute, hash_rows))

        types = np.array([name_key(name) for name in schema.event_types], np.int64)
        codes = items.semantic_ids
        return cls(
            schema=schema,
            hash_rows=hash_rows,
            items=torch.stack([rows(items.keys, "item"), rows(items.keys, "item_again")], dim=1),
            accounts=rows(events.accounts.column("key").to_numpy(), "account"),
            categories=rows(events.categories.column("key").to_numpy(), "category"),
            event_types=rows(types, "event_type"),
            item_accounts=rows(items.account_keys, "account"),
            item_categories=rows(items.category_keys, "category"),
            item_codes=None if codes is None else _code_rows(torch.tensor(codes, dtype=torch.int64), "item", hash_rows),
            dense=None if items.dense is None else _shared(items.dense),
        )

    @property
    def num_items(self) -> int:
        return self.items.shape[0]

    def to(self, device: torch.device | str) -> "Catalog":
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in columns.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def event_rows(self, source: str, sequence: EventSequence) -> Tensor:
        """int64 [n, A], columns as `schema.event_attributes(source)`."""
        columns = [*self.items[sequence.items].unbind(1)]
        if self.schema.has_accounts:
            columns.append(_look_up(self.accounts, sequence.accounts))
        if self.schema.has_categories:
            columns.append(_look_up(self.categories, sequence.categories))
        columns += self._codes_of(sequence.items)
        if self.schema.event_types:
            columns.append(_look_up(self.event_types, sequence.event_types))
        if self.schema.event_semantic_levels.get(source):
            assert sequence.semantic_ids is not None
            columns += _code_rows(sequence.semantic_ids, source, self.hash_rows).unbind(1)
        return torch.stack(columns, dim=1)

    def event_dense(self, source: str, sequence: EventSequence) -> Tensor | None:
        """float32 [n, schema.event_dense_dim(source)]: the item's content and the event's own; None where it is 0."""
        own = sequence.dense if self.schema.event_dense_dims.get(source) else None
        return self.content(None if self.dense is None else sequence.items, own)

    def content(self, items: Tensor | None, own: Tensor | None) -> Tensor | None:
        """[n, dim] of items int64 [n] where they have content, beside the events' own [n, dim]; None without both."""
        parts = [] if items is None or self.dense is None else [self.dense[items]]
        parts += [] if own is None else [own]
        return torch.cat(parts, dim=1) if parts else None

    def item_rows(self, items: Tensor) -> Tensor:
        """int64 [n, A], columns as `schema.item_attributes`."""
        columns = [*self.items[items].unbind(1)]
        if self.schema.has_accounts:
            columns.append(self.item_accounts[items])
        if self.schema.has_categories:
            columns.append(self.item_categories[items])
        return torch.stack(columns + self._codes_of(items), dim=1)

    def item_dense(self, items: Tensor) -> Tensor | None:
        """float32 [n, dense_dim]."""
        return None if self.dense is None else self.dense[items]

    def _codes_of(self, items: Tensor) -> list[Tensor]:
        return [] if self.item_codes is None else [*self.item_codes[items].unbind(1)]


def hash_keys(keys: np.ndarray, attribute: str, hash_rows: int) -> np.ndarray:
    """Row of each key, int64 in [0, hash_rows), −1 where the key is −1: SplitMix64's finaliser of the salted key."""
    x = np.ascontiguousarray(keys, np.int64).view(np.uint64) + np.uint64(name_key(attribute))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    rows = (x % np.uint64(hash_rows)).astype(np.int64)
    rows[np.asarray(keys) < 0] = -1
    return rows


def name_key(name: str) -> int:
    """A key of a name, in [0, 2^63): the same in every process and release."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def _code_rows(codes: Tensor, owner: str, hash_rows: int) -> Tensor:
    """Rows of semantic ids [n, levels], each level from a start of its own."""
    starts = [name_key(f"{owner} semantic {level}") % hash_rows for level in range(codes.shape[1])]
    rows = (codes * SEMANTIC_STEP + torch.tensor(starts, dtype=torch.int64, device=codes.device)) % hash_rows
    return torch.where(codes < 0, -1, rows)


def _look_up(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], and −1 where the index is −1."""
    if rows.numel() == 0:
        return torch.full_like(index, -1)
    return torch.where(index < 0, -1, rows[index.clamp_min(0)])


def _shared(values: np.ndarray) -> Tensor:
    """A tensor over a read-only, memory-mapped array. Nothing writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
