"""Three ways to find every user's nearest others among one country's normalised vectors, behind one interface."""

import importlib
import importlib.util
from typing import Any, Protocol

import numpy as np
import torch

from alure.engine.clusters import Clusters, compute_device, lists_of
from alure.engine.errors import InputError
from alure.kernels import assign_clusters, grouped_topk, train_kmeans

FAISS_GPU_LIMIT = 2048  # both k and nprobe of its GPU search


class Engine(Protocol):
    """Neighbours of `rows`: similarities [n, k] best first and rows [n, k], −1 where there are fewer.

    A row is never its own neighbour; of equal similarities the lower row comes first.
    """

    name: str

    def search(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None


def import_faiss() -> Any:
    if not has_faiss():
        raise InputError(
            "faiss: the package is not installed; pip install alure[cpu] (alure[gpu] with an NVIDIA GPU). "
            "A graph does without it: --search grouped"
        )
    return importlib.import_module("faiss")


def faiss_gpus() -> int:
    """GPUs that an installed FAISS can use."""
    return getattr(import_faiss(), "get_num_gpus", int)() if has_faiss() else 0


def train_clusters(vectors: np.ndarray, nlist: int, nprobe: int, seed: int) -> Clusters:
    x = torch.from_numpy(vectors).to(compute_device())
    return Clusters(train_kmeans(x, nlist, seed=seed, spherical=True), nprobe)


class ExactSearch:
    """Every pair, as one search in a list that holds all `members` (rows, ascending; None: all)."""

    name = "exact"

    def __init__(self, vectors: np.ndarray, k: int, members: np.ndarray | None = None) -> None:
        self.x = torch.from_numpy(vectors).to(compute_device())
        self.k = k
        self.ids = None if members is None else torch.from_numpy(members).to(self.x.device)
        self.database = self.x if self.ids is None else self.x[self.ids]
        self.offsets = torch.tensor([0, len(self.database)], device=self.x.device)

    def search(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = torch.from_numpy(rows).to(self.x.device)
        probes = torch.zeros((len(own), 1), dtype=torch.int64, device=self.x.device)
        D, I = grouped_topk(self.x[own], self.database, self.offsets, probes, self.k, ids=self.ids, exclude=own)
        return D.cpu().numpy(), I.cpu().numpy()


class GroupedSearch:
    """Probed clusters only, many queries × one cluster as a matrix product (kernels/neighbors)."""

    name = "grouped"

    def __init__(self, vectors: np.ndarray, k: int, clusters: Clusters, members: np.ndarray | None = None) -> None:
        self.x = torch.from_numpy(vectors).to(compute_device())
        self.k, self.clusters = k, clusters
        rows = np.arange(len(vectors)) if members is None else members
        nearest, self.offsets = lists_of(self.x[rows], clusters)
        self.ids = torch.from_numpy(rows).to(self.x.device)[nearest]
        self.database = self.x[self.ids]

    def search(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = torch.from_numpy(rows).to(self.x.device)
        queries = self.x[own]
        _, probes = assign_clusters(queries, self.clusters.centroids, self.clusters.nprobe)
        D, I = grouped_topk(queries, self.database, self.offsets, probes, self.k, ids=self.ids, exclude=own)
        return D.cpu().numpy(), I.cpu().numpy()


class FaissSearch:
    """FAISS IndexIVFFlat over the same clusters; on all GPUs where FAISS sees any."""

    name = "faiss"

    def __init__(self, vectors: np.ndarray, k: int, clusters: Clusters) -> None:
        faiss = import_faiss()
        self.vectors, self.k = vectors, k
        quantizer = faiss.IndexFlatIP(vectors.shape[1])
        quantizer.add(clusters.centroids.cpu().numpy())
        index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], clusters.nlist, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)  # the quantizer is full already: this only marks the index trained
        index.nprobe = clusters.nprobe
        self.quantizer = quantizer  # the index holds no reference of its own
        if faiss_gpus() > 0:
            if max(k + 1, clusters.nprobe) > FAISS_GPU_LIMIT:
                raise InputError(
                    f"search: FAISS on a GPU allows k and nprobe up to {FAISS_GPU_LIMIT}, got k {k} and nprobe "
                    f"{clusters.nprobe}; lower them or use --search grouped"
                )
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(vectors)
        self.index = index

    def search(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        D, I = self.index.search(self.vectors[rows], self.k + 1)  # one more: a user finds itself
        dropped = rows[:, None] == I
        dropped[~dropped.any(axis=1), -1] = True  # unless k + 1 copies of it came before
        D, I = D[~dropped].reshape(-1, self.k), I[~dropped].reshape(-1, self.k)
        order = np.lexsort((I, -D), axis=1)  # FAISS leaves the order of equals open
        return np.take_along_axis(D, order, 1), np.take_along_axis(I, order, 1)
