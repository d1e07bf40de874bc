"""k-means for the lists of a search: Lloyd's iterations on a sample, deterministic, without dead centroids."""

import heapq

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.neighbors.ops import Metric, check_values, implementation

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
    centroids, such as yesterday's. A centroid without points takes half of the cluster of largest error.
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
        x = _without_zeros(x)
    if x.shape[0] < nlist:
        kind = "rows that are not zero" if spherical else "rows"
        raise ValueError(f"x: expected at least nlist = {nlist} {kind}, got {x.shape[0]}; ask for fewer clusters")
    if start is not None and start.shape != (nlist, x.shape[1]):
        raise ValueError(f"start: expected shape [{nlist}, {x.shape[1]}], got {list(start.shape)}")

    generator = torch.Generator().manual_seed(seed)
    sampled = torch.randperm(x.shape[0], generator=generator)[: nlist * max_points_per_centroid].to(x.device)
    centroids = x[sampled[:nlist]] if start is None else start.to(x).clone()
    points = x[sampled.sort().values]
    metric: Metric = "ip" if spherical else "l2"
    if spherical:
        centroids = _normalised(centroids)
    norms = torch.linalg.vector_norm(points, dim=1) if spherical else points.new_zeros(())
    check_values(points, "x", centroids, "start")
    assign = implementation("auto", points, 1).assign
    for _ in range(niter):
        D, nearest = assign(points, centroids, 1, metric)
        error = norms - D.squeeze(1) if spherical else D.squeeze(1)
        means, empty, errors = _means(points, nearest.squeeze(1), error, nlist)
        if spherical:
            means = _normalised(means)
            empty = empty | (means == 0).all(dim=1)  # points that cancel leave no direction
        if bool(empty.all()):
            break
        if bool(empty.any()):
            _split(means, empty.tolist(), errors.tolist(), generator)
        centroids = _normalised(means) if spherical else means
    return centroids


def _without_zeros(x: Tensor) -> Tensor:
    tiny = (torch.linalg.vector_norm(x, dim=1) == 0).nonzero().squeeze(1)  # squares may vanish that are not zero
    zero = tiny[(x[tiny] == 0).all(dim=1)]
    if zero.numel() == 0:
        return x
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    kept[zero] = False
    return x[kept]


def _means(points: Tensor, nearest: Tensor, error: Tensor, nlist: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, whether it has no points, summed error) of every cluster; sums run in a fixed order, on a GPU too."""
    counts = torch.bincount(nearest, minlength=nlist)
    if resolve_backend("auto", points.device, ("native",)) == "native" and points.dtype == torch.float32:
        from alure.kernels.neighbors import native

        sums, errors = native.cluster_sums(points, error, nearest, nlist)
    else:
        order = nearest.argsort(stable=True)
        sums = torch.segment_reduce(points[order], "sum", lengths=counts, axis=0, initial=0.0)
        errors = torch.segment_reduce(error[order].to(points.dtype), "sum", lengths=counts, axis=0, initial=0.0)
    return (sums / counts.clamp(min=1)[:, None]).to(points.dtype), counts == 0, errors


def _split(centroids: Tensor, empty: list[bool], errors: list[float], generator: torch.Generator) -> None:
    """Give every empty cluster half of the then worst fitted one, in place.

    By error, not by size: a heap of copies of one point cannot be split, and has no error.
    """
    worst_first = [(-error, index) for index, error in enumerate(errors) if not empty[index]]  # of equals the lower
    heapq.heapify(worst_first)
    for index in (index for index, is_empty in enumerate(empty) if is_empty):
        error, donor = heapq.heappop(worst_first)
        signs = torch.randint(0, 2, (centroids.shape[1],), generator=generator).to(centroids) * 2 - 1
        half = centroids[donor].clone()
        centroids[index], centroids[donor] = half * (1 + SPLIT * signs), half * (1 - SPLIT * signs)
        heapq.heappush(worst_first, (error / 2, index))
        heapq.heappush(worst_first, (error / 2, donor))


def _normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)
