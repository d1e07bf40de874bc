"""Lays high-dimensional points out in the plane so that neighbours stay neighbours (in the manner of UMAP)."""

import numpy as np
import scipy.sparse as sp


def pca(x: np.ndarray, dimensions: int = 2) -> np.ndarray:
    """Coordinates [n, dimensions] along the directions of largest variance; signs are fixed, missing ones are 0."""
    centred = np.asarray(x, np.float64) - x.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :dimensions]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    placed = centred @ axes
    return np.pad(placed, ((0, 0), (0, dimensions - placed.shape[1])))


def neighbour_layout(x: np.ndarray, seed: int, k: int = 12, epochs: int = 250, negatives: int = 4) -> np.ndarray:
    """float64 [n, 2]: starts at the PCA, then pulls each of a point's k nearest towards it and pushes others away.

    x: [n, d], compared by cosine. Forces are those of the Student-t kernel 1 / (1 + r²); steps shrink to zero over
    `epochs`. The same seed gives the same layout. Distances between far groups mean nothing.
    """
    n = len(x)
    place = pca(x)
    place = place / max(float(place.std()), 1e-12) * 4.0
    if n <= k + 1:
        return place
    rng = np.random.default_rng(seed)
    heads, tails, weights = _neighbour_edges(x, k)
    heads, tails = np.concatenate([heads, tails]), np.concatenate([tails, heads])
    weights = np.concatenate([weights, weights])
    place = place + rng.normal(0, 1e-3, place.shape)  # points that coincide could never part
    for epoch in range(epochs):
        rate = 1.0 - epoch / epochs
        apart = place[heads] - place[tails]
        square = (apart**2).sum(1)
        pull = -(2.0 * weights / (1.0 + square))[:, None] * apart
        force = _sum_rows(pull, heads, n) / k
        for _ in range(negatives):
            other = rng.permutation(n)
            gap = place - place[other]
            square = (gap**2).sum(1)
            push = np.clip((2.0 / ((0.05 + square) * (1.0 + square)))[:, None] * gap, -2.0, 2.0)
            force += push * (1.6 / negatives)
        place = place + rate * np.clip(force, -4.0, 4.0)
    return place - place.mean(0)


def _neighbour_edges(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(point, neighbour, weight in (0, 1]) of every point's k nearest by cosine, the nearest weighing most."""
    n = len(x)
    unit = np.asarray(x, np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    neighbours = np.empty((n, k), dtype=np.int64)
    distances = np.empty((n, k))
    for first in range(0, n, 1_024):
        cosine = unit[first : first + 1_024] @ unit.T
        cosine[np.arange(len(cosine)), first + np.arange(len(cosine))] = -2.0
        best = np.argpartition(-cosine, k, axis=1)[:, :k]
        neighbours[first : first + 1_024] = best
        distances[first : first + 1_024] = 1.0 - np.take_along_axis(cosine, best, 1)
    nearest = distances.min(1, keepdims=True)
    spread = np.maximum((distances - nearest).mean(1, keepdims=True), 1e-9)
    weights = np.exp(-(distances - nearest) / spread)
    return np.repeat(np.arange(n), k), neighbours.ravel(), weights.ravel()


def _sum_rows(rows: np.ndarray, index: np.ndarray, n: int) -> np.ndarray:
    """Sum of `rows` [m, 2] by `index` [m]: [n, 2]."""
    gather = sp.csr_matrix((np.ones(len(index)), (index, np.arange(len(index)))), shape=(n, len(index)))
    return gather @ rows
