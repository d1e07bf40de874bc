"""The items of a log: original ids, stable keys, accounts, categories and content."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class ItemTable:
    """Row = item index. Arrays are memory-mapped and read-only."""

    folder: Path

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def table(self) -> pa.Table:
        """item_id, account (int32, −1), category (int32, −1), num_events, title."""
        return pq.read_table(self.folder / "items.parquet", memory_map=True)

    @property
    def item_ids(self) -> pa.ChunkedArray:
        """Original ids, int64 or string."""
        return self.table.column("item_id")

    @cached_property
    def accounts(self) -> np.ndarray:
        """int32 [num_items] account index, −1 where the item has none."""
        return self.table.column("account").to_numpy()

    @cached_property
    def categories(self) -> np.ndarray:
        """int32 [num_items] category index, −1 where the item has none."""
        return self.table.column("category").to_numpy()

    @cached_property
    def num_events(self) -> np.ndarray:
        """int64 [num_items] events of the whole log."""
        return self.table.column("num_events").to_numpy()

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [num_items], see keys.py."""
        return load_column(self.folder / "items" / "key.npy")

    @cached_property
    def account_keys(self) -> np.ndarray:
        """int64 [num_items], −1 where the item has no account."""
        return load_column(self.folder / "items" / "account_key.npy")

    @cached_property
    def category_keys(self) -> np.ndarray:
        """int64 [num_items], −1 where the item has no category."""
        return load_column(self.folder / "items" / "category_key.npy")

    @cached_property
    def dense(self) -> np.ndarray | None:
        """float32 [num_items, dense_dim], zeros where the item has none; None where no item has one."""
        return load_optional(self.folder / "items" / "dense.npy")

    @cached_property
    def semantic_ids(self) -> np.ndarray | None:
        """int32 [num_items, levels], −1 where the item has none; None where no item has one."""
        return load_optional(self.folder / "items" / "semantic_ids.npy")


def load_column(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def load_optional(path: Path) -> np.ndarray | None:
    return load_column(path) if path.exists() else None
