"""All-pairs neighbours inside the probed clusters, beside FAISS with the same centroids and probes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from alure.bench.race import Contest, Entry
from alure.kernels import assign_clusters, grouped_topk, train_kmeans

faiss = pytest.importorskip("faiss")  # without it the other suites still run
K = 15


class Case:
    """Overlapping clusters on the unit sphere (a mixture of 500, σ = 0.2)."""

    def __init__(self, n: int, d: int, nlist: int, nprobe: int, device: torch.device) -> None:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((500, d), dtype=np.float32)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        x = centres[rng.integers(0, 500, n)] + 0.2 * rng.standard_normal((n, d), dtype=np.float32)
        self.x = x / np.linalg.norm(x, axis=1, keepdims=True)
        self.name = f"{n:,} × {d}, {nlist}/{nprobe}/{K}"
        self.nlist, self.nprobe, self.n, self.d = nlist, nprobe, n, d
        self.vectors = torch.from_numpy(self.x).to(device)
        self.centroids = train_kmeans(self.vectors, nlist, seed=0)

    def ours(self) -> np.ndarray:
        x = self.vectors
        _, probes = assign_clusters(x, self.centroids, self.nprobe)
        order = torch.argsort(probes[:, 0], stable=True)
        counts = torch.bincount(probes[:, 0], minlength=self.nlist)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        own = torch.arange(self.n, device=x.device)
        _, found = grouped_topk(x, x[order], offsets, probes, K, ids=order, exclude=own)
        return found.cpu().numpy()

    def faiss_ivf(self) -> np.ndarray:
        quantizer = faiss.IndexFlatIP(self.d)
        quantizer.add(self.centroids.cpu().numpy())
        index = faiss.IndexIVFFlat(quantizer, self.d, self.nlist, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        index.add(self.x)
        index.nprobe = self.nprobe
        return without_self(index.search(self.x, K + 1)[1])

    def faiss_exact(self) -> np.ndarray:
        return without_self(faiss.knn(self.x, self.x, K + 1, metric=faiss.METRIC_INNER_PRODUCT)[1])


def without_self(found: np.ndarray) -> np.ndarray:
    other = found != np.arange(len(found))[:, None]
    other[other.all(axis=1), -1] = False
    return found[other].reshape(len(found), -1)


@pytest.fixture(scope="module")
def case(quick: bool, device: torch.device) -> Case:
    faiss.omp_set_num_threads(torch.get_num_threads())
    return Case(*((5_000, 64, 64, 8) if quick else (50_000, 64, 400, 50)), device)


def bench_all_pairs(race: Callable[[Contest], None], case: Case) -> None:
    expected = case.faiss_ivf()[:500]

    def probed(found: np.ndarray) -> str:
        same = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, expected)])
        return "" if same > 0.999 else f"{same:.1%} are the neighbours that FAISS finds with the same probes"

    def exact(found: np.ndarray) -> str:
        return "" if found.shape == (case.n, K) else f"shape {found.shape}"

    entries = [
        Entry("alure grouped", lambda: (case.ours, probed)),
        Entry("FAISS IVFFlat", lambda: (case.faiss_ivf, probed)),
        Entry("FAISS exact", lambda: (case.faiss_exact, exact)),
    ]
    flops = 2.0 * case.d * case.n * case.n * case.nprobe / case.nlist
    race(Contest("neighbors", case.name, entries, flops))
