"""Personalized PageRank by power iteration in float64 (SciPy): the definition, exact, for every source all nodes."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

BLOCK_ENTRIES = 1 << 22  # (node, source) pairs held at once, 32 MiB an array
TOLERANCE = 1e-12  # of a source's probabilities, summed over nodes


def personalized_pagerank(
    offsets: NDArray[np.int64],
    neighbors: NDArray[np.int32],
    weights: NDArray[np.float32] | None,
    sources: NDArray[np.int64],
    alpha: float,
    scores: NDArray[np.float32],
    ids: NDArray[np.int64],
    lost: NDArray[np.float32],
) -> None:
    """Fills scores [sources, k], ids [sources, k] and lost [sources]; see `alure.kernels.personalized_pagerank`."""
    n = offsets.size - 1
    degrees = np.diff(offsets)
    shares = np.ones(neighbors.size) if weights is None else weights.astype(np.float64)
    shares /= np.bincount(np.repeat(np.arange(n), degrees), shares, minlength=n).repeat(degrees)
    backward = csr_array((shares, neighbors, offsets), shape=(n, n)).T.tocsr()
    scores.fill(0.0)
    ids.fill(-1)
    lost.fill(0.0)
    block = max(1, BLOCK_ENTRIES // max(n, 1))
    for first in range(0, sources.size, block):
        rows = slice(first, first + block)
        p = _stationary(backward, degrees == 0, sources[rows], alpha).T.astype(np.float32)  # [sources, n]
        p[np.arange(len(p)), sources[rows]] = 0.0
        order = np.argsort(-p, axis=1, kind="stable")[:, : ids.shape[1]]
        best = np.take_along_axis(p, order, axis=1)
        scores[rows, : order.shape[1]] = best
        ids[rows, : order.shape[1]] = np.where(best > 0, order, -1)


def _stationary(
    backward: csr_array, without_edges: NDArray[np.bool_], sources: NDArray[np.int64], alpha: float
) -> NDArray[np.float64]:
    """p [n, sources] with p = α e_s + (1 − α) (p P + p(nodes without edges) e_s), backward = Pᵀ."""
    columns = np.arange(len(sources))
    p = np.zeros((backward.shape[0], len(sources)))
    p[sources, columns] = 1.0
    while True:
        onward = (1 - alpha) * (backward @ p)
        onward[sources, columns] += alpha + (1 - alpha) * p[without_edges].sum(axis=0)
        moved = np.abs(onward - p).sum(axis=0).max(initial=0.0)
        p = onward
        if moved * (1 - alpha) / alpha <= TOLERANCE:
            return p
