"""What tells one history from another: 64 bits of all that a model reads of a user's events.

A fingerprint is the sum of the events' hashes, modulo 2⁶⁴, so it is of a set of events. They are made of stable keys
and not of indexes, and what is missing counts as in a log without that column: the same events have the same
fingerprint in any later log.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from alure.engine.events.items import ItemTable
from alure.engine.events.keys import splitmix64, stable_keys

if TYPE_CHECKING:
    from alure.engine.events.reader import SourceColumns

FINGERPRINTS_FILE = "fingerprints.npy"
BLOCK_ROWS = 32_768  # events, or items, that are hashed at once
ODD = np.uint64(1)


class EventHashes:
    """Hashes of the events of a log. keys: of its accounts, categories and event types, by index."""

    def __init__(self, items: ItemTable, keys: Mapping[str, np.ndarray]) -> None:
        self.items = item_hashes(items)
        self.keys = {name: np.append(column, -1) for name, column in keys.items()}  # −1 takes the last

    def of_rows(self, source: str, columns: "SourceColumns", rows: np.ndarray | slice) -> np.ndarray:
        """uint64 [n]."""
        name = stable_keys(pa.array([source])).view(np.uint64)
        hashes = splitmix64(columns.timestamp[rows].view(np.uint64) ^ name)
        hashes = splitmix64(hashes ^ self.items[columns.item[rows]])
        for key, index in (
            ("account", columns.account),
            ("category", columns.category),
            ("event_type", columns.event_type),
        ):
            found = np.int64(-1) if index is None else self.keys[key][index[rows]]
            hashes = splitmix64(hashes ^ found.view(np.uint64))
        offsets = np.int64(0) if columns.utc_offset is None else columns.utc_offset[rows].astype(np.int64)
        content = content_hashes(
            None if columns.dense is None else columns.dense[rows],
            None if columns.semantic_ids is None else columns.semantic_ids[rows],
        )
        hashed: np.ndarray = splitmix64(hashes ^ offsets.view(np.uint64) ^ content)
        return hashed


def item_hashes(items: ItemTable) -> np.ndarray:
    """uint64 [num_items], of each item's key and content."""
    hashes = np.empty(len(items), np.uint64)
    for first in range(0, len(items), BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        dense, codes = items.dense, items.semantic_ids
        content = content_hashes(None if dense is None else dense[rows], None if codes is None else codes[rows])
        hashes[rows] = splitmix64(splitmix64(items.keys[rows].view(np.uint64)) ^ content)
    return hashes


def content_hashes(dense: np.ndarray | None, semantic_ids: np.ndarray | None) -> np.ndarray:
    """uint64 [n] or []: of vectors float32 [n, d] and codes int32 [n, levels]; 0 where there is neither."""
    hashes = np.zeros((), np.uint64)
    if dense is not None:
        hashes = hashes + np.ascontiguousarray(dense).view(np.uint32) @ weights("dense", dense.shape[1])
    if semantic_ids is not None:
        codes = (semantic_ids.astype(np.int64) + 1).view(np.uint64)
        hashes = hashes + codes @ weights("semantic_ids", semantic_ids.shape[1])
    return splitmix64(hashes)


def weights(name: str, width: int) -> np.ndarray:
    """uint64 [width], odd."""
    seed = stable_keys(pa.array([name])).view(np.uint64)
    return splitmix64(seed + np.arange(width, dtype=np.uint64)) | ODD


def sums(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64 [B]: the sum of hashes[offsets[b]] to hashes[offsets[b + 1] − 1], modulo 2⁶⁴."""
    running = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes, out=running[1:])
    return running[offsets[1:]] - running[offsets[:-1]]
