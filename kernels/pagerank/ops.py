"""`personalized_pagerank`: validation, registration as `torch.ops.alure.personalized_pagerank`, and dispatch.

Shapes, dtypes and numbers are checked in Python; offsets, ids and weights inside the operator, before any kernel reads
through them.
"""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.jagged import check_offsets
from alure.kernels.operators import operator

BACKENDS = ("native", "reference", "cupy")
MAX_NODES = (1 << 31) - 1  # ids are int32
LEAST_ALPHA = 1e-3  # steps grow as 1 / alpha


class PageRanks(NamedTuple):
    """Row i belongs to sources[i]. Of equal scores the lower id comes first; places without a node: score 0, id −1."""

    scores: Tensor  # float32 [sources, k], best first
    ids: Tensor  # int64 [sources, k]
    lost: Tensor  # float32 [sources], 1 − the sum of all nodes' scores: no score is too small by more


def personalized_pagerank(
    offsets: Tensor,
    neighbors: Tensor,
    weights: Tensor | None,
    sources: Tensor,
    k: int,
    alpha: float = 0.15,
    epsilon: float = 1e-4,
    *,
    backend: str = "auto",
) -> PageRanks:
    """The k nodes that a walk with restarts from each source visits most, the source left out (Jeh and Widom 2003).

    offsets: int64 [nodes + 1], neighbors: int32 [edges]: node u's edges lead to neighbors[offsets[u] : offsets[u + 1]].
    An edge may come twice and may lead back to its node. weights: float32 [edges], above 0; None: all alike.
    sources: int64 [sources], nodes, in any order.

    score(s, v) is the stationary probability at v of a walk that restarts at s with probability `alpha` (0.001 … 1,
    exclusive of 1) and else follows one of its node's edges, chosen by weight; from a node without edges it goes to s.
    These are `networkx.pagerank(graph, 1 - alpha, personalization={s: 1})`.

    epsilon, 0 to 1: a node passes probability on while one of its neighbours would get `epsilon` × the k-th score of
    the source; 0 is exact to rounding. Scores are never too large, and too small by at most `lost`. How many of the k
    best are found depends on how nearly the k-th places are tied. In random follow graphs of 20,000 nodes, k = 100: at
    0.0001 98.8 to 100 % of them, at 0.001 95.1 to 100 % (99.87 % of their probability), at 0.01 81 to 88 % (97 %).

    The native backend pushes forward (Andersen, Chung and Lang 2006) from each source, and sweeps eight sources at a
    time over all nodes where pushing would cost more. The result does not depend on the number of threads, nor a row on
    other sources. Memory: 24 bytes a node for each of torch.get_num_threads() threads; where sweeps are needed, 64 for
    each, and the edges once more. The backends reference (SciPy) and cupy (on a GPU) iterate over all nodes to the
    exact answer, 4 million (node, source) pairs at a time. All tensors are on the CPU.

    Raises TypeError or ValueError for other shapes or dtypes, offsets that do not tile the edges, ids that are no node,
    weights that are not finite and above 0, and numbers out of range.
    """
    _check_vector(offsets, torch.int64, "offsets")
    edges = _check_vector(neighbors, torch.int32, "neighbors")
    if weights is not None:
        _check_vector(weights, torch.float32, "weights", edges)
    _check_vector(sources, torch.int64, "sources")
    if not 1 <= offsets.numel() <= MAX_NODES + 1:
        raise ValueError(f"offsets: expected shape [nodes + 1], at most 2**31 - 1 nodes, got {list(offsets.shape)}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if not LEAST_ALPHA <= alpha < 1:
        raise ValueError(f"alpha: expected a probability of restart from {LEAST_ALPHA} to below 1, got {alpha}")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon: expected 0 (exact) to 1, as a part of the k-th score, got {epsilon}")
    backend = resolve_backend(backend, offsets.device, BACKENDS)
    return PageRanks(*_personalized_pagerank(offsets, neighbors, weights, sources, k, alpha, epsilon, backend))


def _check_vector(values: Tensor, dtype: torch.dtype, name: str, size: int | None = None) -> int:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(values).__name__}; see torch.from_numpy")
    if values.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {values.dtype}; call .to({dtype})")
    if values.device.type != "cpu":
        raise ValueError(f"{name}: the walks run on the CPU, got a tensor on {values.device}; call .cpu()")
    if values.dim() != 1 or (size is not None and values.numel() != size):
        raise ValueError(f"{name}: expected shape [{'n' if size is None else size}], got {list(values.shape)}")
    return values.numel()


@operator("personalized_pagerank")
def _personalized_pagerank(
    offsets: Tensor,
    neighbors: Tensor,
    weights: Tensor | None,
    sources: Tensor,
    k: int,
    alpha: float,
    epsilon: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    nodes = offsets.numel() - 1
    check_offsets(offsets, neighbors.numel())
    _check_nodes(neighbors, nodes, "neighbors")
    _check_nodes(sources, nodes, "sources")
    if weights is not None:
        _check_weights(weights)
    graph = (offsets, neighbors, weights, sources)
    arrays: list[Any] = [None if x is None else x.detach().contiguous().numpy() for x in graph]
    scores, ids = torch.empty(sources.numel(), k), torch.empty(sources.numel(), k, dtype=torch.int64)
    lost = torch.empty(sources.numel())
    out: list[Any] = [x.numpy() for x in (scores, ids, lost)]
    if backend == "native":
        from alure.kernels import _native  # only here: the reference runs where it is not built

        arguments = [*arrays, alpha, epsilon, *out, torch.get_num_threads()]
        _native.personalized_pagerank(*arguments)
    else:
        _iterate(backend, [*arrays, alpha, *out])
    return scores, ids, lost


def _iterate(backend: str, arguments: list[Any]) -> None:
    # imported only here: scipy.sparse takes 0.2 s of every command
    from alure.kernels.pagerank.reference import personalized_pagerank as iterate

    xp, sparse = ("cupy", "cupyx.scipy.sparse") if backend == "cupy" else ("numpy", "scipy.sparse")
    iterate(import_module(xp), import_module(sparse), *arguments)


@_personalized_pagerank.register_fake
def _(offsets, neighbors, weights, sources, k, *rest):  # type: ignore[no-untyped-def]
    shape = (sources.shape[0], k)
    scores = sources.new_empty(shape, dtype=torch.float32)
    return scores, sources.new_empty(shape), sources.new_empty(shape[:1], dtype=torch.float32)


def _check_nodes(ids: Tensor, nodes: int, name: str) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= nodes):
        where = int(((ids < 0) | (ids >= nodes)).nonzero()[0])
        raise ValueError(f"{name}: expected nodes from 0 to {nodes - 1}, got {int(ids[where])} at position {where}")


def _check_weights(weights: Tensor) -> None:
    fine = (weights > 0) & weights.isfinite()
    if not bool(fine.all()):
        where = int((~fine).nonzero()[0])
        got = f"{float(weights[where])} at position {where}"
        raise ValueError(f"weights: expected finite numbers above 0, got {got}; leave out edges of no weight")
