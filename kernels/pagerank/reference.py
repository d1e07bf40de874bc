"""Personalized PageRank by power iteration in float64: the definition, exact, for every source all nodes.

SciPy runs it on the CPU, CuPy on a GPU; the products of a sparse and a dense matrix are nearly all of it.
"""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ENTRIES = 1 << 22  # (node, source) pairs held at once, 32 MiB an array
TOLERANCE = 1e-12  # of a source's probabilities, summed over nodes


def personalized_pagerank(
    xp: ModuleType,
    sparse: ModuleType,
    offsets: NDArray[np.int64],
    neighbors: NDArray[np.int32],
    weights: NDArray[np.float32] | None,
    sources: NDArray[np.int64],
    alpha: float,
    scores: NDArray[np.float32],
    ids: NDArray[np.int64],
    lost: NDArray[np.float32],
) -> None:
    """Fills scores [sources, k], ids [sources, k] and lost [sources]; see `alure.kernels.personalized_pagerank`.

    xp, sparse: numpy and scipy.sparse, or cupy and cupyx.scipy.sparse. The arrays are NumPy's either way.
    """
    n = offsets.size - 1
    scores.fill(0.0)
    ids.fill(-1)
    lost.fill(0.0)
    if not sources.size:
        return
    to_host = getattr(xp, "asnumpy", np.asarray)
    degrees = np.diff(offsets)
    shares = np.ones(neighbors.size) if weights is None else weights.astype(np.float64)
    shares /= np.bincount(np.repeat(np.arange(n), degrees), shares, minlength=n).repeat(degrees)
    edges = tuple(xp.asarray(x) for x in (shares, neighbors, offsets))
    backward = sparse.csr_matrix(edges, shape=(n, n)).T.tocsr()
    without_edges = xp.asarray(np.flatnonzero(degrees == 0))
    block = max(1, BLOCK_ENTRIES // n)
    for first in range(0, sources.size, block):
        rows = slice(first, first + block)
        own = xp.asarray(sources[rows])
        p = _stationary(xp, backward, without_edges, own, alpha).T.astype(np.float32)  # [sources, n]
        p[xp.arange(len(p)), own] = 0.0
        order = xp.argsort(-p, axis=1, kind="stable")[:, : ids.shape[1]]
        best = xp.take_along_axis(p, order, axis=1)
        scores[rows, : order.shape[1]] = to_host(best)
        ids[rows, : order.shape[1]] = to_host(xp.where(best > 0, order, -1))


def _stationary(xp: ModuleType, backward: Any, without_edges: Any, sources: Any, alpha: float) -> Any:
    """p [n, sources] with p = α e_s + (1 − α) (p P + p(nodes without edges) e_s), backward = Pᵀ."""
    columns = xp.arange(len(sources))
    p = xp.zeros((backward.shape[0], len(sources)))
    p[sources, columns] = 1.0
    while True:
        onward = (1 - alpha) * (backward @ p)
        onward[sources, columns] += alpha + (1 - alpha) * p[without_edges].sum(axis=0)
        moved = float(xp.abs(onward - p).sum(axis=0).max())
        p = onward
        if moved * (1 - alpha) / alpha <= TOLERANCE:
            return p
