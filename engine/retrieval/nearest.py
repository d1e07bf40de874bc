"""The users nearest to one vector among the embeddings of a generation, in the lists that its graph was searched in."""

from dataclasses import dataclass

import numpy as np
import torch

from alure.engine.clusters import Clusters, compute_device, lists_of, read_clusters, unit_vectors
from alure.engine.store import EmbeddingStore, Generation
from alure.kernels import assign_clusters, grouped_topk


@dataclass(frozen=True)
class _Country:
    database: torch.Tensor  # float32 [n, d], list after list
    rows: torch.Tensor  # int64 [n], of the generation
    offsets: torch.Tensor  # int64 [nlist + 1], on the CPU
    clusters: Clusters | None  # None: searched exactly, as one list

    @classmethod
    def of(cls, rows: np.ndarray, embeddings: np.ndarray, clusters: Clusters | None) -> "_Country":
        directed, vectors = unit_vectors(embeddings)
        x, ids = (torch.from_numpy(array).to(compute_device()) for array in (vectors, rows[directed]))
        if clusters is None:
            return cls(x, ids, torch.tensor([0, len(x)]), None)
        order, offsets = lists_of(x, clusters)
        return cls(x[order], ids[order], offsets.cpu(), clusters)

    def probed(self, query: torch.Tensor) -> torch.Tensor:
        """The lists that query [1, d] searches, nearest first, on the CPU."""
        if self.clusters is None:
            return torch.zeros(1, dtype=torch.int64)
        _, lists = assign_clusters(query, self.clusters.centroids, self.clusters.nprobe)
        return lists[0].cpu()


class NearestUsers:
    """The embeddings of a generation in memory. Read-only, so threads may share it."""

    def __init__(self, store: EmbeddingStore, source: Generation, k: int) -> None:
        matrix = store.read_matrix(source.generation)
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
        Only the lists that are probed are handed to the kernel, which checks and packs all that it gets.
        """
        place, (directed, unit) = self._countries.get(country), unit_vectors(vector[None])
        if place is None or not len(directed):
            return np.empty(0, np.float32), np.empty(0, np.int64)
        query = torch.from_numpy(unit).to(place.database.device)
        lists = place.probed(query)
        starts, ends = place.offsets[lists], place.offsets[lists + 1]
        if len(place.offsets) == 2:
            database, ids = place.database, place.rows
        else:
            parts = [slice(first, last) for first, last in zip(starts.tolist(), ends.tolist())]
            database = torch.cat([place.database[part] for part in parts])
            ids = torch.cat([place.rows[part] for part in parts])
        offsets = torch.cat([starts.new_zeros(1), (ends - starts).cumsum(0)]).to(query.device)
        probes = torch.arange(len(lists), device=query.device)[None]
        own = torch.tensor([exclude], device=query.device)
        D, I = grouped_topk(query, database, offsets, probes, self.k, ids=ids, exclude=own)
        found = I[0] >= 0
        return D[0][found].clamp(-1.0, 1.0).cpu().numpy(), I[0][found].cpu().numpy()
