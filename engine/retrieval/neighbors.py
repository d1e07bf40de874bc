"""A graph's table as neighbour lists over the rows of the event log."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.kernels import NeighborLists


@dataclass(frozen=True)
class Neighbors:
    """Row r's neighbours are ids[offsets[r] : offsets[r + 1]], user indices of the log, best first."""

    offsets: np.ndarray  # int64 [rows + 1]
    ids: np.ndarray  # int32 [edges]
    similarities: np.ndarray  # float32 [edges], above 0
    dropped: int  # edges to users the log does not know, or of similarity <= 0, who are not alike

    def rows(self, first: int, last: int) -> NeighborLists:
        begin, end = self.offsets[first], self.offsets[last]
        return NeighborLists(
            offsets=torch.from_numpy(self.offsets[first : last + 1] - begin),
            ids=torch.from_numpy(self.ids[begin:end]),
            similarities=torch.from_numpy(self.similarities[begin:end]),
        )


def read_neighbors(graph: Iterable[pa.RecordBatch], users: pa.Array, events: Events) -> Neighbors:
    """The lists of `users`, in their order. graph: user_id, neighbor_ids, similarities; users it lacks have none."""
    rows, lengths, ids, similarities = [_NONE], [_NONE], [_NO_IDS], [np.empty(0, np.float32)]
    dropped = 0
    for batch in graph:
        place = pc.fill_null(pc.index_in(batch["user_id"].cast(users.type), value_set=users), -1).to_numpy()
        row = np.repeat(place, pc.list_value_length(batch["neighbor_ids"]).to_numpy())
        similarity = batch["similarities"].flatten().to_numpy(zero_copy_only=False)
        if len(similarity) != len(row):
            raise InputError("graph: expected as many similarities as neighbor_ids in every row; build the graph again")
        neighbor = events.user_indices(batch["neighbor_ids"].flatten())
        kept = (row >= 0) & (neighbor >= 0) & (similarity > 0)
        dropped += int(((row >= 0) & ~kept).sum())
        rows.append(place[place >= 0])
        lengths.append(np.bincount(row[kept], minlength=len(users))[place[place >= 0]] if len(users) else _NONE)
        ids.append(neighbor[kept].astype(np.int32))
        similarities.append(similarity[kept])
    return _in_order(_Parts(rows, lengths, ids, similarities), len(users), dropped)


_NONE, _NO_IDS = np.empty(0, np.int64), np.empty(0, np.int32)


@dataclass(frozen=True)
class _Parts:
    rows: list[np.ndarray]
    lengths: list[np.ndarray]
    ids: list[np.ndarray]
    similarities: list[np.ndarray]


def _in_order(parts: _Parts, num_rows: int, dropped: int) -> Neighbors:
    """The lists of the parts put in the order of the rows."""
    rows, lengths = np.concatenate(parts.rows), np.concatenate(parts.lengths)
    ids, similarities = np.concatenate(parts.ids), np.concatenate(parts.similarities)
    begins = np.cumsum(lengths) - lengths
    order = np.argsort(rows, kind="stable")
    offsets = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, lengths, minlength=num_rows), out=offsets[1:])
    sizes = lengths[order]
    take = np.repeat(begins[order] - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(ids))
    return Neighbors(offsets, ids[take], similarities[take], dropped)
