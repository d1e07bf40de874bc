"""SimilarityGraph: directed edges user → neighbour with a similarity, best first, as arrays and in the store."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import AlureError, InputError
from alure.engine.store import EmbeddingStore, Generation

BATCH_ROWS = 65_536
SIMILARITY_BINS = 40


@dataclass(frozen=True)
class DegreeStatistics:
    """How edges are spread over users. in_degree_histogram: bin 0 counts degree 0, bin b > 0 [2^(b − 1), 2^b)."""

    users: int
    edges: int
    without_neighbors: int  # users with no outgoing edge
    never_neighbors: int  # users with no incoming edge
    mean_out_degree: float
    max_in_degree: int
    mutual_share: float  # edges whose reverse is an edge too
    in_degree_histogram: list[int]


@dataclass(frozen=True)
class SimilarityGraph:
    """Users are rows 0 … n − 1; the neighbours of row u are neighbors[offsets[u] : offsets[u + 1]], best first."""

    user_ids: pa.Array  # int64 or string [n], unique
    countries: pa.Array  # string [n]
    offsets: np.ndarray  # int64 [n + 1]
    neighbors: np.ndarray  # int32 [edges], rows
    similarities: np.ndarray  # float32 [edges]

    @classmethod
    def from_topk(
        cls, user_ids: pa.Array, countries: pa.Array, similarities: np.ndarray, rows: np.ndarray
    ) -> "SimilarityGraph":
        """From [n, k] arrays with row −1 where there is no neighbour."""
        present = rows >= 0
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(present.sum(axis=1), out=offsets[1:])
        return cls(
            user_ids, countries, offsets, rows[present].astype(np.int32), similarities[present].astype(np.float32)
        )

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_edges(self) -> int:
        return len(self.neighbors)

    def neighbors_of(self, user_id: int | str) -> list[tuple[int | str, float]]:
        """(neighbour's id, similarity), best first. Raises InputError for a user who is not in the graph."""
        try:
            row = pc.index(self.user_ids, pa.scalar(user_id, self.user_ids.type)).as_py()
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            row = -1
        if row < 0:
            raise InputError(
                f"user {user_id!r}: not among the {self.num_users:,} users of the graph (ids are {self.user_ids.type})"
            )
        part = slice(self.offsets[row], self.offsets[row + 1])
        ids = self.user_ids.take(pa.array(self.neighbors[part])).to_pylist()
        return list(zip(ids, self.similarities[part].tolist()))

    def degree_statistics(self) -> DegreeStatistics:
        """How many neighbours users have, and how many have them as one; computed once."""
        return self._degrees

    @cached_property
    def _degrees(self) -> DegreeStatistics:
        n = self.num_users
        out_degree = np.diff(self.offsets)
        in_degree = np.bincount(self.neighbors, minlength=n)
        source = np.repeat(np.arange(n, dtype=np.int64), out_degree)
        forward, backward = source * n + self.neighbors, self.neighbors.astype(np.int64) * n + source
        both = np.sort(np.concatenate([forward, backward]))  # an edge is there once, and its reverse
        mutual = int((both[1:] == both[:-1]).sum())
        bins = np.where(in_degree > 0, np.floor(np.log2(np.maximum(in_degree, 1))) + 1, 0).astype(np.int64)
        return DegreeStatistics(
            users=n,
            edges=self.num_edges,
            without_neighbors=int((out_degree == 0).sum()),
            never_neighbors=int((in_degree == 0).sum()),
            mean_out_degree=float(out_degree.mean()) if n else 0.0,
            max_in_degree=int(in_degree.max(initial=0)),
            mutual_share=mutual / self.num_edges if self.num_edges else 0.0,
            in_degree_histogram=np.bincount(bins).tolist(),
        )

    def similarity_histogram(self) -> dict[str, list[float]]:
        """Counts of edges in SIMILARITY_BINS equal bins from the least similarity (at most 0) to 1."""
        low = min(0.0, float(self.similarities.min(initial=0.0)))
        counts, edges = np.histogram(self.similarities, bins=SIMILARITY_BINS, range=(low, 1.0))
        return {"edges": edges.tolist(), "counts": counts.tolist()}

    def check_integrity(self) -> None:
        """Raise AlureError unless the arrays are what the class says."""
        n, edges = self.num_users, self.num_edges
        _require("a country for every user", len(self.countries) == n)
        _require("every user once", len(pc.unique(self.user_ids)) == n)
        bounds = self.offsets
        tiled = len(bounds) == n + 1 and bounds[0] == 0 and bounds[-1] == edges == len(self.similarities)
        _require("offsets that tile the edges", tiled and not (np.diff(bounds) < 0).any())
        source = np.repeat(np.arange(n, dtype=np.int64), np.diff(bounds))
        _require("neighbours among the users", not ((self.neighbors < 0) | (self.neighbors >= n)).any())
        _require("no user as its own neighbour", not (source == self.neighbors).any())
        pairs = np.sort(source * n + self.neighbors)  # np.unique hashes, which takes ten times as long
        _require("every neighbour once a user", not (pairs[1:] == pairs[:-1]).any())
        _require("finite similarities", np.isfinite(self.similarities).all())
        rises = (np.diff(self.similarities) > 0) & (source[1:] == source[:-1])
        _require("neighbours best first", not rises.any())

    def batches(self, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """The store's graph table: user_id, country, neighbor_ids, similarities; at least one batch."""
        for first in range(0, max(self.num_users, 1), rows):
            last = min(first + rows, self.num_users)
            begin, end = self.offsets[first], self.offsets[last]
            bounds = pa.array((self.offsets[first : last + 1] - begin).astype(np.int32))
            ids = self.user_ids.take(pa.array(self.neighbors[begin:end]))
            columns = {
                "user_id": self.user_ids[first:last],
                "country": self.countries[first:last],
                "neighbor_ids": pa.ListArray.from_arrays(bounds, ids),
                "similarities": pa.ListArray.from_arrays(bounds, pa.array(self.similarities[begin:end])),
            }
            yield pa.RecordBatch.from_pydict(columns)

    def save(
        self, store: EmbeddingStore, source: str | Generation, name: str, properties: Mapping[str, Any] | None = None
    ) -> Generation:
        """Write the graph as table `name` of the generation it was built from, and publish it."""
        return store.write_graph(
            source, name, self.batches(), {**asdict(self.degree_statistics()), **(properties or {})}
        )

    @classmethod
    def load(cls, store: EmbeddingStore, name: str = "alure", generation: str | None = None) -> "SimilarityGraph":
        """The published graph `name` (generation None: of the newest). Raises AlureError where it is damaged."""
        table = store.read_graph(generation, name).combine_chunks()
        user_ids, countries = _whole(table["user_id"]), _whole(table["country"])
        lists, similarities = _whole(table["neighbor_ids"]), _whole(table["similarities"])
        rows = pc.index_in(lists.flatten(), value_set=user_ids)
        if rows.null_count:
            raise AlureError(f"graph {name}: {rows.null_count:,} neighbours are not users of it; build it again")
        offsets = np.zeros(len(table) + 1, dtype=np.int64)
        np.cumsum(pc.list_value_length(lists).to_numpy(), out=offsets[1:])
        values = similarities.flatten().to_numpy()
        graph = cls(user_ids, countries, offsets, rows.to_numpy().astype(np.int32), values)
        graph.check_integrity()
        return graph


def _require(expected: str, holds: bool | np.bool_) -> None:
    if not holds:
        raise AlureError(f"graph: expected {expected}; it is damaged, build it again (alure graph)")


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.array([], column.type)
