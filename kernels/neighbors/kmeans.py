"""k-means for the lists of a search: Lloyd's iterations on a sample, deterministic, without dead centroids."""

import heapq

import torch
from torch import Tensor

from alure.kernels.neighbors.ops import assign_clusters

SPLIT = 1.0 / 1024  # relative distance of the two halves of a split cluster (as in FAISS)


def train_kmeans(
    x: Tensor,
    nlist: int,
    *,
    niter: int = 10,
    seed: int = 0,
    spherical: bool = True,
    max_points_per_centroid: int = 256,
    start: Tensor | None = None,
) -> Tensor:
    """Centroids [nlist, d] of x [n, d], n ≥ nlist, in the dtype and on the device of `x`.

    spherical: points go to the centroid of largest inner product and centroids are L2-normalised, as FAISS does (pass
    normalised points for cosine clusters; zero rows have no direction and are left out); otherwise by squared distance.
    At most max_points_per_centroid · nlist points are used, sampled by `seed`. `start` [nlist, d] continues from given
    centroids, such as yesterday's. A centroid without points takes half of the largest cluster.
    The result depends on x, start and seed only. Raises TypeError or ValueError for wrong shapes, NaN, n < nlist.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise TypeError("x: expected a floating point tensor [n, d]")
    if nlist < 1 or niter < 0 or max_points_per_centroid < 1:
        raise ValueError(
            "nlist, niter, max_points_per_centroid: expected at least 1, 0, 1; "
            f"got {nlist}, {niter}, {max_points_per_centroid}"
        )
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if spherical:
        x = x[(x != 0).any(dim=1)]
    if x.shape[0] < nlist:
        kind = "rows that are not zero" if spherical else "rows"
        raise ValueError(f"x: expected at least nlist = {nlist} {kind}, got {x.shape[0]}; ask for fewer clusters")
    if start is not None and start.shape != (nlist, x.shape[1]):
        raise ValueError(f"start: expected shape [{nlist}, {x.shape[1]}], got {list(start.shape)}")

    generator = torch.Generator().manual_seed(seed)
    sampled = torch.randperm(x.shape[0], generator=generator)[: nlist * max_points_per_centroid].to(x.device)
    centroids = x[sampled[:nlist]] if start is None else start.to(x).clone()
    points = x[sampled.sort().values]
    metric = "ip" if spherical else "l2"
    if spherical:
        centroids = _normalised(centroids)
    for _ in range(niter):
        _, nearest = assign_clusters(points, centroids, 1, metric=metric)
        centroids = _means(points, nearest.squeeze(1), centroids, spherical=spherical)
    return centroids


def _means(points: Tensor, nearest: Tensor, previous: Tensor, *, spherical: bool) -> Tensor:
    """Mean of every cluster's points; sums run in a fixed order, on a GPU too."""
    nlist = previous.shape[0]
    order = nearest.argsort(stable=True)
    counts = torch.bincount(nearest, minlength=nlist)
    sums = torch.segment_reduce(points[order], "sum", lengths=counts, axis=0, initial=0.0)
    centroids = sums / counts.clamp(min=1)[:, None].to(sums.dtype)
    if spherical:
        centroids = _normalised(centroids)
        counts = torch.where((centroids == 0).all(dim=1), 0, counts)  # points that cancel leave no direction
    _split_largest(centroids, counts.tolist())
    return _normalised(centroids) if spherical else centroids


def _split_largest(centroids: Tensor, counts: list[int]) -> None:
    """Give every empty cluster half of the then largest one, in place."""
    empty = [index for index, count in enumerate(counts) if count == 0]
    if not empty:
        return
    sign = torch.ones(centroids.shape[1], dtype=centroids.dtype, device=centroids.device)
    sign[1::2] = -1
    largest_first = [(-count, index) for index, count in enumerate(counts) if count]  # of equals the lower index
    heapq.heapify(largest_first)
    for index in empty:
        count, donor = heapq.heappop(largest_first)
        centroids[index] = centroids[donor] * (1 + SPLIT * sign)
        centroids[donor] = centroids[donor] * (1 - SPLIT * sign)
        heapq.heappush(largest_first, (count // 2, index))
        heapq.heappush(largest_first, (count - count // 2, donor))


def _normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
