"""What the similarity graph searches in, and a search of one user after it: unit vectors, in lists around centroids."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch

from alure.engine.store import EmbeddingStore, Generation
from alure.kernels import assign_clusters


@dataclass(frozen=True)
class Clusters:
    """The lists of an IVF search: centroids [nlist, d], and how many of them a user searches."""

    centroids: torch.Tensor
    nprobe: int

    @property
    def nlist(self) -> int:
        return self.centroids.shape[0]


def compute_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unit_vectors(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that are not zero, float32 [rows, d] of length 1): what is searched."""
    norms = np.concatenate([np.linalg.norm(block.astype(np.float64), axis=1) for block in blocks(embeddings)])
    rows = norms.nonzero()[0]
    return rows, np.ascontiguousarray((embeddings[rows] / norms[rows, None]).astype(np.float32))


def blocks(x: np.ndarray, rows: int = 1 << 16) -> Iterator[np.ndarray]:
    for first in range(0, max(len(x), 1), rows):
        yield x[first : first + rows]


def lists_of(x: torch.Tensor, clusters: Clusters) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows by cluster, offsets [nlist + 1]): each row in the list of its nearest centroid, ascending."""
    _, nearest = assign_clusters(x, clusters.centroids, 1)
    sizes = torch.bincount(nearest.squeeze(1), minlength=clusters.nlist)
    return nearest.squeeze(1).argsort(stable=True), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def read_clusters(store: EmbeddingStore, generation: Generation) -> dict[str, Clusters]:
    """By country, as its graph `alure` searched them; none where the generation keeps none."""
    published = store.log.find(generation.generation, "clusters")
    if published is None:
        return {}
    rows = store.read_clusters(generation.generation)
    found = {}
    for name, nprobe in published.properties.get("nprobe", {}).items():
        own = rows.filter(pc.equal(rows["country"], name))["centroid"].combine_chunks()
        centroids = torch.tensor(own.flatten().to_numpy().reshape(len(own), -1), device=compute_device())
        found[name] = Clusters(centroids, nprobe)
    return found
