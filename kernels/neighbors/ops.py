"""`assign_clusters` and `grouped_topk`: validation, registration as torch operators, and the choice of backend.

Shapes, dtypes and devices are checked in Python; what needs the values (finite numbers, offsets, probe ranges, ids) is
checked inside the operators, so that torch.compile and export can trace through.
"""

import importlib
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.jagged import check_offsets
from alure.kernels.neighbors import reference
from alure.kernels.neighbors.duplicates import first_copies
from alure.kernels.neighbors.scores import Search, decode
from alure.kernels.operators import operator

BACKENDS = ("triton", "native", "reference")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
MAX_ROWS = (1 << 31) - 1
TRITON_KEEPS = 256

Metric = Literal["ip", "l2"]


def assign_clusters(
    x: Tensor, centroids: Tensor, nprobe: int = 1, *, metric: Metric = "ip", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The `nprobe` best centroids of every row, best first; of equal ones the lower index first.

    x: [n, d] and centroids: [c, d], floating point; float16 and bfloat16 are computed in float32.
    Returns D [n, nprobe] float32, inner products ("ip", higher is better) or squared distances ("l2", lower is better),
    and I [n, nprobe] int64, rows of `centroids`; scores are those of one matrix product in the inputs'
    precision (of a single centroid, natively, exact).
    Raises TypeError or ValueError for other shapes, dtypes or devices, nprobe not in 1 … c, and NaN or infinity.
    """
    _check_matrix(x, "x")
    _check_matrix(centroids, "centroids", like=x, like_name="x")
    _check_metric(metric)
    if not 1 <= nprobe <= centroids.shape[0]:
        raise ValueError(f"nprobe: expected 1 … {centroids.shape[0]} (the number of centroids), got {nprobe}")
    return torch.ops.alure.assign_clusters(x, centroids, nprobe, metric, backend)


def grouped_topk(
    queries: Tensor,
    database: Tensor,
    list_offsets: Tensor,
    probes: Tensor,
    k: int,
    *,
    ids: Tensor | None = None,
    exclude: Tensor | None = None,
    metric: Metric = "ip",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k nearest database rows of every query inside the lists it probes, best first: the search of an IVF index.

    queries: [nq, d]; database: [nb, d], the rows of one list side by side, list l at rows list_offsets[l] …
    list_offsets[l + 1]; list_offsets: int32 or int64 [nlist + 1]; probes: int32 or int64 [nq, nprobe], −1 = none, a
    list named twice is searched once. Name the nearest list first: it makes the search faster, not different.
    ids: int64 [nb], each ≥ 0 and unique (default: the row); exclude: int64 [nq], an id not to return, −1 = none.

    Returns D [nq, k] float32 and I [nq, k] int64. Where the lists hold fewer than k, the rest is id −1 with score −inf
    ("ip") or +inf ("l2", squared distance). A score is the float64 sum rounded once to float32, whatever the backend
    and batch; of equal scores the lower id comes first (backend "triton" may part differently with rows closer than its
    float32 products resolve, at the k-th place).
    Raises TypeError or ValueError for other shapes, dtypes or devices, NaN or infinity, offsets that do not tile the
    database, probes outside −1 … nlist − 1, and ids that repeat or are negative.
    """
    _check_matrix(queries, "queries")
    _check_matrix(database, "database", like=queries, like_name="queries")
    _check_metric(metric)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected at least 1, got {k!r}")
    if database.shape[0] > MAX_ROWS:
        raise ValueError(f"database: expected at most {MAX_ROWS} rows, got {database.shape[0]}; split it")
    _check_integers(list_offsets, "list_offsets", queries.device, ("nlist + 1",))
    _check_integers(probes, "probes", queries.device, (queries.shape[0], "nprobe"))
    if ids is not None:
        _check_integers(ids, "ids", queries.device, (database.shape[0],))
    if exclude is not None:
        _check_integers(exclude, "exclude", queries.device, (queries.shape[0],))
    return torch.ops.alure.grouped_topk(queries, database, list_offsets, probes, k, ids, exclude, metric, backend)


@operator("assign_clusters")
def _assign_clusters(x: Tensor, centroids: Tensor, nprobe: int, metric: str, backend: str) -> tuple[Tensor, Tensor]:
    backend = _resolve(backend, x, nprobe)
    x, centroids = _computed(x, backend), _computed(centroids, backend)
    check_values(x, "x", centroids, "centroids")
    return _implementation(backend).assign(x, centroids, nprobe, metric)


@_assign_clusters.register_fake
def _(x: Tensor, centroids: Tensor, nprobe: int, metric: str, backend: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], nprobe)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


@operator("grouped_topk")
def _grouped_topk(
    queries: Tensor,
    database: Tensor,
    list_offsets: Tensor,
    probes: Tensor,
    k: int,
    ids: Tensor | None,
    exclude: Tensor | None,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = _resolve(backend, queries, k + 1)
    queries, database = _computed(queries, backend), _computed(database, backend)
    check_values(queries, "queries", database, "database")
    check_offsets(list_offsets, database.shape[0], "list_offsets")
    list_offsets = list_offsets.to(torch.int64)
    probes = _checked_probes(probes, list_offsets.numel() - 1)
    if backend != "native":  # which looks for them as it goes
        probes = _without_repeats(probes)
    if ids is None:
        ids = torch.arange(database.shape[0], device=database.device)
    ids, row_of_rank = _ranked(ids.to(torch.int64))
    rank = torch.empty_like(row_of_rank)
    rank[row_of_rank] = torch.arange(rank.numel(), device=rank.device)
    exclude_row = _rows_of(exclude, ids, row_of_rank, queries.shape[0])

    kept = first_copies(database, list_offsets, rank, k + 1)  # one more: a copy may be the excluded row
    if kept is not None:
        position = torch.full((database.shape[0] + 1,), -1, dtype=torch.int64, device=database.device)
        position[kept] = torch.arange(kept.numel(), device=kept.device)
        exclude_row = position[exclude_row]  # −1 reads the last, which is −1
        database, rank = database[kept], rank[kept]
        list_offsets = torch.searchsorted(kept, list_offsets)
        rank, ids = _compacted(rank, ids)
    task = Search(queries, database, list_offsets, probes, rank, exclude_row, k, metric)
    scores, rank = decode(_implementation(backend).search(task))
    found = torch.where(rank >= 0, ids[rank.clamp(min=0)] if ids.numel() else -1, -1)
    return (scores if metric == "ip" else scores.neg_()), found


@_grouped_topk.register_fake
def _(
    queries: Tensor,
    database: Tensor,
    list_offsets: Tensor,
    probes: Tensor,
    k: int,
    ids: Tensor | None,
    exclude: Tensor | None,
    metric: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _resolve(backend: str, x: Tensor, keep: int) -> str:
    """Under "auto" the reference takes float64, and on a GPU more than TRITON_KEEPS best."""
    if backend == "auto" and (x.dtype == torch.float64 or (x.is_cuda and keep > TRITON_KEEPS)):
        return "reference"
    return resolve_backend(backend, x.device, BACKENDS)


def implementation(backend: str, x: Tensor, keep: int) -> ModuleType:
    """The module whose `assign` and `search` compute for `x`; they check nothing."""
    return _implementation(_resolve(backend, x, keep))


def _implementation(backend: str) -> ModuleType:
    if backend == "reference":
        return reference
    return importlib.import_module(f"alure.kernels.neighbors.{'kernel' if backend == 'triton' else 'native'}")


def _computed(x: Tensor, backend: str) -> Tensor:
    """`x` contiguous in the precision it is computed in."""
    if x.dtype == torch.float64 and backend != "reference":
        raise TypeError(f"backend: {backend!r} computes in float32, got float64; use 'reference' or call .float()")
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


def _check_matrix(x: Tensor, name: str, like: Tensor | None = None, like_name: str = "") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating point tensor, got {x.dtype}; call .float()")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [n, d] with d ≥ 1, got {list(x.shape)}")
    if like is None:
        return
    if x.shape[1] != like.shape[1]:
        raise ValueError(f"{name}: expected {like.shape[1]} columns as in {like_name}, got {x.shape[1]}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as in {like_name}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor on {like.device} as {like_name}, got one on {x.device}; move it there"
        )


def _check_metric(metric: str) -> None:
    if metric not in ("ip", "l2"):
        raise ValueError(f"metric: expected 'ip' or 'l2', got {metric!r}")


def _check_integers(x: Tensor, name: str, device: torch.device, shape: tuple[int | str, ...]) -> None:
    """`shape` names the dimensions that may have any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}; call .to(torch.int64)")
    fits = x.dim() == len(shape) and all(isinstance(want, str) or want == got for want, got in zip(shape, x.shape))
    if not fits:
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, shape))}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}; move it there")


def check_values(x: Tensor, x_name: str, y: Tensor, y_name: str) -> None:
    largest = 0.0
    for values, name in ((x, x_name), (y, y_name)):
        if values.numel() == 0:
            continue
        low, high = values.aminmax()  # NaN and infinity survive
        top = max(-float(low), float(high))
        if not top < float("inf"):
            row = int((~values.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"{name}: expected finite values, got NaN or infinity in row {row}; drop or repair it")
        largest = max(largest, top)
    if 8.0 * x.shape[1] * largest**2 > torch.finfo(torch.float32).max:
        raise ValueError(f"{x_name}, {y_name}: values up to {largest:.3g} overflow float32 scores; scale them down")


def _checked_probes(probes: Tensor, nlist: int) -> Tensor:
    probes = probes.to(torch.int64).contiguous()
    if probes.numel() == 0:
        return probes
    low, high = (int(bound) for bound in probes.aminmax())
    if low < -1 or high >= nlist:
        raise ValueError(f"probes: expected lists −1 … {nlist - 1} (−1 = none), got {low if low < -1 else high}")
    return probes


def _without_repeats(probes: Tensor) -> Tensor:
    """`probes` with every repetition of a list within a row replaced by −1."""
    listed, column = probes.sort(dim=1, stable=True)
    repeated = (listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)
    if not bool(repeated.any()):
        return probes
    row, place = repeated.nonzero(as_tuple=True)
    probes = probes.clone()
    probes[row, column[row, place + 1]] = -1
    return probes


def _ranked(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids ascending, the row of each)."""
    ordered, rows = ids.sort(stable=True)
    if ordered.numel() and int(ordered[0]) < 0:
        raise ValueError(f"ids: expected ids ≥ 0 (−1 means missing), got {int(ordered[0])} at row {int(rows[0])}")
    repeated = (ordered[1:] == ordered[:-1]).nonzero()
    if repeated.numel():
        at = int(repeated[0])
        raise ValueError(
            f"ids: expected every id once, got {int(ordered[at])} at rows {int(rows[at])} and {int(rows[at + 1])}"
        )
    return ordered, rows


def _rows_of(exclude: Tensor | None, ordered: Tensor, row_of_rank: Tensor, count: int) -> Tensor:
    """The database row of each id in `exclude`, −1 where it has none."""
    none = torch.full((count,), -1, dtype=torch.int64, device=ordered.device)
    if exclude is None or ordered.numel() == 0:
        return none
    exclude = exclude.to(torch.int64)
    at = torch.searchsorted(ordered, exclude).clamp_(max=ordered.numel() - 1)
    return torch.where(ordered[at] == exclude, row_of_rank[at], none)


def _compacted(rank: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks renumbered 0 … n − 1 in the same order, and the id of each."""
    ordered, rows = rank.sort()
    renumbered = torch.empty_like(rank)
    renumbered[rows] = torch.arange(rank.numel(), device=rank.device)
    return renumbered, ids[ordered]
