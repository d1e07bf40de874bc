"""The users nearest to one vector among the embeddings of a generation, in the lists that its graph was searched in."""

from dataclasses import dataclass

import numpy as np
import torch

from alure.engine.clusters import Clusters, compute_device, lists_of, read_clusters, unit_vectors
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.averages import graph_vectors
from alure.kernels import assign_clusters, grouped_topk


@dataclass(frozen=True)
class _Country:
    database: torch.Tensor  # float32 [n, d], list after list
    rows: torch.Tensor  # int64 [n], of the generation
    numbers: torch.Tensor  # int64 [n], 0, 1, 2, …
    offsets: list[int]  # [nlist + 1]
    clusters: Clusters | None  # None: searched exactly, as one list

    @classmethod
    def of(cls, rows: np.ndarray, embeddings: np.ndarray, clusters: Clusters | None) -> "_Country":
        directed, vectors = unit_vectors(embeddings)
        x, ids = (torch.from_numpy(array).to(compute_device()) for array in (vectors, rows[directed]))
        if clusters is None:
            return cls(x, ids, torch.arange(len(x), device=x.device), [0, len(x)], None)
        order, offsets = lists_of(x, clusters)
        return cls(x[order], ids[order], torch.arange(len(x), device=x.device), offsets.tolist(), clusters)

    def nominated(self, query: torch.Tensor, count: int) -> torch.Tensor:
        """Rows of the database among which the `count` nearest to query [1, d] are, of the lists that it probes.

        The kernel's exact search checks and packs what it is given, so it is given what float32 products cannot rule
        out: a product of unit vectors is off by less than d · 2⁻²³.
        """
        if self.clusters is None:
            lists = [0]
        else:
            lists = assign_clusters(query, self.clusters.centroids, self.clusters.nprobe)[1][0].tolist()
        parts = [slice(self.offsets[each], self.offsets[each + 1]) for each in lists]
        scores = torch.cat([self.database[part] @ query[0] for part in parts])
        rows = torch.cat([self.numbers[part] for part in parts])
        if len(rows) <= count:
            return rows
        least = scores.topk(count).values[-1] - 2 * query.shape[1] * 2.0**-23
        return rows[scores >= least]


class NearestUsers:
    """The embeddings of a generation in memory. Read-only, so threads may share it."""

    def __init__(self, store: EmbeddingStore, source: Generation, k: int) -> None:
        matrix = graph_vectors(store, source.generation)
        clusters = read_clusters(store, source)
        self.k = k
        names = matrix.countries.dictionary_encode()
        codes = names.indices.to_numpy()
        self._countries = {}
        for code, name in enumerate(names.dictionary.to_pylist()):
            rows = np.flatnonzero(codes == code)
            self._countries[name] = _Country.of(rows, matrix.values[rows], clusters.get(name))

    def search(self, vector: np.ndarray, country: str, exclude: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """(similarities float32, rows of the generation) of the k nearest of `country`, best first, as in a graph.

        vector: float32 [k·d], of any length but zero, which has no neighbours. exclude: a row that is not returned.
        """
        place, (directed, unit) = self._countries.get(country), unit_vectors(vector[None])
        if place is None or not len(directed):
            return np.empty(0, np.float32), np.empty(0, np.int64)
        query = torch.from_numpy(unit).to(place.database.device)
        rows = place.nominated(query, self.k + 1)
        D, I = grouped_topk(
            query, place.database[rows], rows.new_tensor([0, len(rows)]), rows.new_zeros(1, 1), self.k,
            ids=place.rows[rows], exclude=rows.new_tensor([exclude]),
        )  # fmt: skip
        found = I[0] >= 0
        return D[0][found].clamp(-1.0, 1.0).cpu().numpy(), I[0][found].cpu().numpy()
