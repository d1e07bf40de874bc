"""The earlier graph that an incremental build starts from, and the clusters that graphs keep beside them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from alure.engine.clusters import Clusters, read_clusters
from alure.engine.graph.similarity import SimilarityGraph
from alure.engine.graph.update import NOBODY, Lists
from alure.engine.store import EmbeddingMatrix, EmbeddingStore, Generation
from alure.engine.store.averages import graph_generations, graph_vectors


@dataclass(frozen=True)
class Base:
    """A published graph `alure`, the embeddings it is of, and its clusters; users in the order of the store."""

    generation: str
    matrix: EmbeddingMatrix
    graph: SimilarityGraph
    clusters: dict[str, Clusters]  # by country; one that was searched exactly has none

    def lists(self, country: str, k: int) -> Lists | None:
        """What the country's users had; None where nobody was there."""
        first, last = self._ranges.get(country, (0, 0))
        if first == last:
            return None
        begin, end = self.graph.offsets[first], self.graph.offsets[last]
        sizes = np.diff(self.graph.offsets[first : last + 1])
        present = np.arange(k) < sizes[:, None]
        similarities = np.full((last - first, k), -np.inf, np.float32)
        neighbors = np.full((last - first, k), NOBODY, np.int64)
        similarities[present] = self.graph.similarities[begin:end]
        neighbors[present] = self.graph.neighbors[begin:end] - first
        rows = slice(first, last)
        return Lists(self.graph.user_ids[rows], self.matrix.values[rows], similarities, neighbors)

    @cached_property
    def _ranges(self) -> dict[str, tuple[int, int]]:
        names = self.graph.countries.dictionary_encode()
        codes = names.indices.to_numpy()
        firsts = np.flatnonzero(np.diff(codes, prepend=-1))
        lasts = [*firsts[1:], len(codes)]
        return {names[int(first)].as_py(): (int(first), int(last)) for first, last in zip(firsts, lasts)}


def find_base(store: EmbeddingStore, source: Generation, settings: Mapping[str, Any]) -> tuple[Base | None, str]:
    """(the newest earlier graph that `source`'s can start from, "") or (None, why there is none).

    It must be of the same model, built with the same settings by a search that gives the same bits as ours.
    """
    earlier = [g for g in store.generations("graph") if g.name == "alure" and g.generation != source.generation]
    if not earlier:
        return None, "no earlier generation has a graph"
    newest = earlier[-1]
    differs = [name for name, value in settings.items() if newest.properties.get(name) != value]
    if newest.model != source.model:
        return None, f"the graph of {newest.generation} is of another model"
    if differs:
        return None, f"the graph of {newest.generation} was built with another {', '.join(differs)}"
    if "faiss" in newest.properties.get("engines", ["faiss"]):
        return None, f"the graph of {newest.generation} was searched by FAISS, whose last bits differ"
    clusters = read_clusters(store, newest)
    if newest.properties.get("clusters") != digest(clusters):
        return None, f"the clusters of {newest.generation} are not those of its graph"
    if any(store.log.find(name, "embeddings") is None for name in graph_generations(store, newest.generation)):
        return None, f"the graph of {newest.generation} is of generations that are not all published any more"
    matrix = graph_vectors(store, newest.generation)
    graph = SimilarityGraph.load(store, "alure", newest.generation)
    if not graph.user_ids.equals(matrix.user_ids):
        return None, f"the graph of {newest.generation} has other users than its embeddings"
    return Base(newest.generation, matrix, graph, clusters), ""


def write_clusters(store: EmbeddingStore, source: Generation, clusters: Mapping[str, Clusters]) -> None:
    """Publish those of the graph `alure` of the generation of `source`; nprobe, by country, is a property."""
    properties = {"graph": "alure", "nprobe": {name: found.nprobe for name, found in clusters.items()}}
    store.write_clusters(source, _rows(clusters), properties)


def _rows(clusters: Mapping[str, Clusters]) -> pa.Table:
    names = [name for name, found in clusters.items() for _ in range(found.nlist)]
    numbers = [number for found in clusters.values() for number in range(found.nlist)]
    centroids = [found.centroids.cpu().numpy() for found in clusters.values()]
    width = centroids[0].shape[1] if centroids else 0
    values = np.concatenate([part.reshape(-1) for part in centroids]) if centroids else np.empty(0, np.float32)
    lists = (
        pa.FixedSizeListArray.from_arrays(pa.array(values), width) if width else pa.array([], pa.list_(pa.float32()))
    )
    columns = [pa.array(names, pa.string()), pa.array(numbers, pa.int64()), lists.cast(pa.list_(pa.float32()))]
    return pa.table(columns, names=["country", "cluster", "centroid"])


def digest(clusters: Mapping[str, Clusters]) -> str:
    """Tells the clusters of one graph from those of another."""
    parts = [
        part
        for name, found in sorted(clusters.items())
        for part in (f"{name} {found.nprobe}".encode(), found.centroids.cpu().numpy())
    ]
    return hashlib.sha256(b"".join(bytes(part) for part in parts)).hexdigest()[:16]
