"""All-pairs neighbours and k-means beside FAISS, with the same centroids and the same probes."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from alure.bench.race import Contest, Entry, LeftOut
from alure.kernels import assign_clusters, grouped_topk, train_kmeans
from alure.kernels.neighbors.kmeans import Init

K = 15
NITER = 10
SAMPLE = 500  # queries whose neighbours are compared with the exact ones


class Case:
    """Overlapping clusters on the unit sphere (a mixture of 500, σ = 0.2)."""

    def __init__(self, n: int, d: int, nlist: int, device: torch.device) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((500, d), dtype=np.float32)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        x = centres[rng.integers(0, 500, n)] + 0.2 * rng.standard_normal((n, d), dtype=np.float32)
        self.x = x / np.linalg.norm(x, axis=1, keepdims=True)
        self.nlist, self.n, self.d = nlist, n, d
        self.vectors = torch.from_numpy(self.x).to(device)
        self.centroids = train_kmeans(self.vectors, nlist, niter=NITER, seed=0)
        all_, own = torch.from_numpy(self.x), torch.arange(min(SAMPLE, n))
        whole, first = torch.tensor([0, n]), torch.zeros((len(own), 1), dtype=torch.int64)
        _, truth = grouped_topk(all_[: len(own)], all_, whole, first, K, exclude=own, backend="reference")
        self.truth = truth.numpy()

    def recall(self, found: np.ndarray) -> float:
        return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, self.truth)]))

    def ours(self, nprobe: int) -> np.ndarray:
        x = self.vectors
        _, probes = assign_clusters(x, self.centroids, nprobe)
        order = torch.argsort(probes[:, 0], stable=True)
        counts = torch.bincount(probes[:, 0], minlength=self.nlist)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        own = torch.arange(self.n, device=x.device)
        _, found = grouped_topk(x, x[order], offsets, probes, K, ids=order, exclude=own)
        return found.cpu().numpy()

    def faiss_index(self, nprobe: int) -> Any:
        faiss = import_faiss()
        quantizer = faiss.IndexFlatIP(self.d)
        quantizer.add(self.centroids.cpu().numpy())
        index = faiss.IndexIVFFlat(quantizer, self.d, self.nlist, faiss.METRIC_INNER_PRODUCT)
        quantizer.this.disown()
        index.own_fields = True  # the index holds no reference to it in Python
        index.is_trained = True
        index.add(self.x)
        index.nprobe = nprobe
        return index

    def faiss_ivf(self, nprobe: int) -> np.ndarray:
        return without_self(self.faiss_index(nprobe).search(self.x, K + 1)[1])

    def faiss_big_batch(self, nprobe: int) -> np.ndarray:
        index = self.faiss_index(nprobe)
        from faiss.contrib.big_batch_search import big_batch_search

        return without_self(big_batch_search(index, self.x, K + 1, method="knn_function", threaded=0, verbose=False)[1])

    def faiss_exact(self) -> np.ndarray:
        faiss = import_faiss()
        return without_self(faiss.knn(self.x, self.x, K + 1, metric=faiss.METRIC_INNER_PRODUCT)[1])

    def faiss_kmeans(self, niter: int) -> torch.Tensor:
        faiss = import_faiss()
        kmeans = faiss.Kmeans(self.d, self.nlist, niter=niter, spherical=True, seed=0)
        kmeans.train(self.x)
        return torch.from_numpy(kmeans.centroids).to(self.vectors.device)

    def our_kmeans(self, niter: int, init: Init = "random") -> torch.Tensor:
        return train_kmeans(self.vectors, self.nlist, niter=niter, seed=0, init=init)

    def objective(self, centroids: torch.Tensor) -> float:
        """The mean inner product of a point and its nearest centroid."""
        return float(assign_clusters(self.vectors, centroids)[0].mean())

    @property
    def size(self) -> dict[str, int]:
        return {"users": self.n, "channels": self.d, "nlist": self.nlist}


def import_faiss() -> Any:
    """On as many threads as torch has."""
    if find_spec("faiss") is None:
        raise LeftOut('faiss is not installed (pip install "alure[cpu]")')
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def without_self(found: np.ndarray) -> np.ndarray:
    other = found != np.arange(len(found))[:, None]
    other[other.all(axis=1), -1] = False
    return found[other].reshape(len(found), -1)


@pytest.fixture(scope="module")
def case(quick: bool, device: torch.device) -> Case:
    return Case(*((5_000, 64, 64) if quick else (50_000, 64, 400)), device)


@pytest.fixture(scope="module")
def large_case(quick: bool, device: torch.device) -> Case:
    if quick:
        pytest.skip("--quick")
    return Case(200_000, 64, 400, device)


@pytest.mark.parametrize("share", [64, 32, 16, 8, 4])
def bench_all_pairs(race: Callable[[Contest], None], case: Case, share: int) -> None:
    """A point of the recall-time curve: assignment, grouping and search of one in `share` lists."""
    race(all_pairs(case, case.nlist // share))


def bench_all_pairs_of_many(race: Callable[[Contest], None], large_case: Case) -> None:
    race(all_pairs(large_case, large_case.nlist // 8))


def all_pairs(case: Case, nprobe: int) -> Contest:
    expected = case.ours(nprobe)[:SAMPLE]
    recall = case.recall(expected)

    def probed(found: np.ndarray) -> str:
        same = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, expected)])
        return "" if same > 0.999 else f"{same:.1%} are the neighbours that IVF finds with the same probes"

    entries = [
        Entry("alure grouped", lambda: (lambda: case.ours(nprobe), probed)),
        Entry("FAISS IVFFlat", lambda: (lambda: case.faiss_ivf(nprobe), probed)),
        Entry("FAISS big_batch_search", lambda: (lambda: case.faiss_big_batch(nprobe), probed)),
    ]
    flops = 2.0 * case.d * case.n * case.n * nprobe / case.nlist
    name = f"{case.n:,} × {case.d}, {case.nlist}/{nprobe}/{K}"
    return Contest("neighbors", name, entries, flops, facts=case.size | {"nprobe": nprobe, "recall": round(recall, 4)})


def bench_exact(race: Callable[[Contest], None], case: Case) -> None:
    def shaped(found: np.ndarray) -> str:
        return "" if found.shape == (case.n, K) and case.recall(found) > 0.999 else "not the exact neighbours"

    entries = [
        Entry("alure grouped, all lists", lambda: (lambda: case.ours(case.nlist), shaped)),
        Entry("FAISS exact", lambda: (case.faiss_exact, shaped)),
    ]
    race(Contest("neighbors", f"{case.n:,} × {case.d}, exact, {K}", entries, 2.0 * case.d * case.n * case.n))


@pytest.mark.parametrize("niter", [5, 10, 20])
def bench_kmeans(race: Callable[[Contest], None], case: Case, niter: int) -> None:
    """A point of the curve of objective and time."""
    race(clustering(case, niter))


def bench_kmeans_of_many(race: Callable[[Contest], None], large_case: Case) -> None:
    race(clustering(large_case, NITER))


def clustering(case: Case, niter: int) -> Contest:
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "alure train_kmeans": lambda: case.our_kmeans(niter),
        "alure train_kmeans, k-means++": lambda: case.our_kmeans(niter, "k-means++"),
    }
    if find_spec("faiss"):
        runs["faiss.Kmeans"] = lambda: case.faiss_kmeans(niter)
    objectives = {name: round(case.objective(run()), 5) for name, run in runs.items()}

    def fits(centroids: torch.Tensor) -> str:
        reached = case.objective(centroids)
        return "" if reached > 0.99 * max(objectives.values()) else f"an objective of {reached:.4f}: {objectives}"

    entries = [
        Entry(name, lambda run=run: (run, fits), {"objective": objectives[name]})  # type: ignore[misc]
        for name, run in runs.items()
    ]
    flops = 2.0 * case.d * case.nlist * min(case.n, 256 * case.nlist) * niter
    name = f"k-means {case.n:,} × {case.d}, {case.nlist} centroids, {niter} iterations"
    return Contest("neighbors", name, entries, flops, facts=case.size | {"niter": niter})
