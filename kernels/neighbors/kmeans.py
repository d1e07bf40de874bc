"""k-means for the lists of a search: Lloyd's iterations on a sample, deterministic, without dead centroids."""

import heapq
from typing import Literal, Protocol

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.neighbors.ops import Metric, check_values, implementation
from alure.kernels.neighbors.scores import exact_scores

SPLIT = 1.0 / 1024  # relative distance of the two halves of a split cluster (as in FAISS)
START_POINTS = 16  # for each centroid, among which k-means++ looks for the first ones
START_ROUNDS = 16

Init = Literal["random", "k-means++"]


class ClusterPoints(Protocol):
    """Points x [n, d] that are assigned to ever new centroids. Nothing depends on threads."""

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """(the nearest centroid of each point, int64 [n]; the sums of the points of each, [nlist, d])."""


def train_kmeans(
    x: Tensor,
    nlist: int,
    *,
    niter: int = 10,
    seed: int = 0,
    spherical: bool = True,
    max_points_per_centroid: int = 256,
    init: Init = "random",
    start: Tensor | None = None,
) -> Tensor:
    """Centroids [nlist, d] of x [n, d], n ≥ nlist, in the dtype and on the device of `x`.

    spherical: points go to the centroid of largest inner product and centroids are L2-normalised, as FAISS does (pass
    normalised points for cosine clusters; zero rows have no direction and are left out); otherwise by squared distance.
    At most max_points_per_centroid · nlist points are used, sampled by `seed`. The iterations, at most niter, end where
    no point changes its cluster. They begin with points at random, or far from each other ("k-means++"), or with
    `start` [nlist, d], such as yesterday's centroids. A centroid without points takes half of the cluster of largest
    error. The result depends on x, init, start and seed only. Raises TypeError or ValueError for wrong shapes, NaN,
    n < nlist.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise TypeError("x: expected a floating point tensor [n, d]")
    if nlist < 1 or niter < 0 or max_points_per_centroid < 1:
        raise ValueError(
            "nlist, niter, max_points_per_centroid: expected at least 1, 0, 1; "
            f"got {nlist}, {niter}, {max_points_per_centroid}"
        )
    if init not in ("random", "k-means++"):
        raise ValueError(f"init: expected 'random' or 'k-means++', got {init!r}")
    x, dtype = x.detach(), x.dtype
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
    points = x if sampled.numel() == x.shape[0] else x[sampled.sort().values]
    metric: Metric = "ip" if spherical else "l2"
    check_values(points, "x", points[:0] if start is None else start.to(x), "start")
    if start is not None:
        centroids = start.to(x).clone()
    elif init == "random":
        centroids = x[sampled[:nlist]]
    else:
        centroids = _far_apart(x[sampled[: nlist * START_POINTS]], nlist, metric, generator)
    return _lloyd(points, _normalised(centroids) if spherical else centroids, niter, metric, generator).to(dtype)


def _without_zeros(x: Tensor) -> Tensor:
    tiny = (torch.linalg.vector_norm(x, dim=1) == 0).nonzero().squeeze(1)  # squares may vanish that are not zero
    zero = tiny[(x[tiny] == 0).all(dim=1)]
    if zero.numel() == 0:
        return x
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    kept[zero] = False
    return x[kept]


def _far_apart(x: Tensor, nlist: int, metric: Metric, generator: torch.Generator) -> Tensor:
    """Rows of x [m, d], drawn by their distance to the nearest that was drawn before: k-means++ in rounds of many.

    (Arthur and Vassilvitskii, 2007; rounds as in k-means‖, Bahmani et al., 2012, of as many as are wanted in all.)
    """
    if metric == "ip":
        x = _normalised(x)
    assign = implementation("auto", x, 1).assign
    far = torch.full((x.shape[0],), torch.inf, dtype=torch.float64)
    chosen = torch.zeros(x.shape[0], dtype=torch.bool)
    rounds = min(START_ROUNDS, nlist)
    for i in range(rounds):
        # The first of exponential times, at rates of the distances: draws without replacement.
        times = torch.empty(x.shape[0], dtype=torch.float64).exponential_(generator=generator)
        if i > 0:
            times /= far.clamp(min=1e-300)
        times[chosen] = torch.inf
        drawn = times.sort(stable=True).indices[: (i + 1) * nlist // rounds - i * nlist // rounds]
        chosen[drawn] = True
        D = assign(x, x[drawn.to(x.device)], 1, metric)[0].squeeze(1).double().cpu()
        far = torch.minimum(far, 1 - D if metric == "ip" else D)
    return x[chosen.to(x.device)]


def _lloyd(points: Tensor, centroids: Tensor, niter: int, metric: Metric, generator: torch.Generator) -> Tensor:
    nlist, clusters = centroids.shape[0], _cluster_points(points, metric)
    before: Tensor | None = None
    for _ in range(niter):
        nearest, sums = clusters.assign(centroids)
        counts = torch.bincount(nearest, minlength=nlist)
        empty = counts == 0
        if before is not None and torch.equal(nearest, before) and not bool(empty.any()):
            break
        before = nearest
        means = (sums / counts.clamp(min=1)[:, None]).to(points.dtype)
        if metric == "ip":
            means = _normalised(means)
            empty = empty | (means == 0).all(dim=1)  # points that cancel leave no direction
        if bool(empty.all()):
            break
        if bool(empty.any()):
            _split(means, empty.tolist(), _errors(points, centroids, nearest, metric).tolist(), generator)
        centroids = _normalised(means) if metric == "ip" else means
    return centroids


def _cluster_points(points: Tensor, metric: Metric) -> ClusterPoints:
    if resolve_backend("auto", points.device, ("native",)) == "native" and points.dtype == torch.float32:
        from alure.kernels.neighbors import native

        return native.ClusterPoints(points, metric)
    return _TorchPoints(points, metric)


class _TorchPoints:
    def __init__(self, x: Tensor, metric: Metric) -> None:
        self.x, self.metric = x, metric
        self.assigned = implementation("auto", x, 1).assign

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        nearest = self.assigned(self.x, centroids, 1, self.metric)[1].squeeze(1)
        return nearest, _ordered_sums(self.x, nearest, centroids.shape[0])


def _ordered_sums(x: Tensor, cluster: Tensor, nlist: int) -> Tensor:
    """Sums of the rows of each cluster, in the order of the rows."""
    lengths = torch.bincount(cluster, minlength=nlist)
    return torch.segment_reduce(x[cluster.argsort(stable=True)], "sum", lengths=lengths, axis=0, initial=0.0)


def _errors(points: Tensor, centroids: Tensor, nearest: Tensor, metric: Metric) -> Tensor:
    """How far the points of each cluster are from its centroid, summed: [nlist]."""
    rows = torch.arange(points.shape[0], device=points.device)
    scores = exact_scores(points, rows, centroids, nearest, metric)
    norms = torch.linalg.vector_norm(points, dim=1) if metric == "ip" else torch.zeros_like(scores)
    return _ordered_sums(norms.double() - scores.double(), nearest, centroids.shape[0])


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
