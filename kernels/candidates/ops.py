"""`join_candidates`: validation, registration as `torch.ops.alure.join_candidates`, and dispatch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.candidates import reference
from alure.kernels.operators import operator

BACKENDS = ("native", "reference")
_MAX_ITEMS = 2**31  # item ids are int32


@dataclass(frozen=True)
class NeighborLists:
    """Who is near whom, best first: row r's neighbours are `ids[offsets[r] : offsets[r + 1]]`."""

    offsets: Tensor  # int64 [rows + 1]
    ids: Tensor  # int32 [edges], rows of Engagements
    similarities: Tensor  # float32 [edges]


@dataclass(frozen=True)
class Engagements:
    """What each neighbour engaged with: list l is `items[offsets[l] : offsets[l + 1]]`. An item may come twice."""

    offsets: Tensor  # int64 [lists + 1]
    items: Tensor  # int32 [engagements], at least 0
    weights: Tensor  # float32 [engagements], e.g. event weight × recency
    reasons: Tensor  # uint8 [engagements], a set of bits


class Candidates(NamedTuple):
    """Row r's items, best first, are `items[offsets[r] : offsets[r + 1]]`."""

    offsets: Tensor  # int64 [rows + 1]
    items: Tensor  # int32 [candidates]
    scores: Tensor  # float32 [candidates], above 0
    reasons: Tensor  # uint8 [candidates]


def join_candidates(
    neighbors: NeighborLists,
    engagements: Engagements,
    cap: int,
    *,
    num_items: int | None = None,
    exclude_offsets: Tensor | None = None,
    exclude_items: Tensor | None = None,
    backend: str = "auto",
) -> Candidates:
    """The best `cap` items of each row: score(item) = Σ similarity × weight over its neighbours' engagements.

    Products and sums are in float64, in the order of the lists, and the score is rounded to float32 at the end, so
    both backends give the same bits, whatever the number of threads. Ranks are by the rounded score; equal scores by
    lower item. Items whose score is not above 0 are left out; reasons of one item are OR-ed.

    num_items: where given, every item id must be below it. exclude_offsets int64 [rows + 1] and exclude_items int32,
    ascending within a row: items a row must not get (such as those it has seen).
    All tensors on the CPU. Memory: the output twice, and one row's items for each of torch.get_num_threads() threads.

    Raises TypeError for a wrong dtype and ValueError for anything else that is not a valid list: offsets that do not
    begin at 0, decrease or do not end at the number of values, ids out of range, numbers that are not finite.
    """
    bounds = _check_vector(neighbors.offsets, torch.int64, "neighbors.offsets")
    edges = _check_vector(neighbors.ids, torch.int32, "neighbors.ids")
    _check_vector(neighbors.similarities, torch.float32, "neighbors.similarities", edges)
    _check_vector(engagements.offsets, torch.int64, "engagements.offsets")
    total = _check_vector(engagements.items, torch.int32, "engagements.items")
    _check_vector(engagements.weights, torch.float32, "engagements.weights", total)
    _check_vector(engagements.reasons, torch.uint8, "engagements.reasons", total)
    if (exclude_offsets is None) != (exclude_items is None):
        raise ValueError("exclude_offsets, exclude_items: expected both or neither")
    if exclude_offsets is not None and exclude_items is not None:
        _check_vector(exclude_offsets, torch.int64, "exclude_offsets", bounds)
        _check_vector(exclude_items, torch.int32, "exclude_items")
    if cap < 1:
        raise ValueError(f"cap: expected at least 1, got {cap}")
    if num_items is not None and not 0 <= num_items <= _MAX_ITEMS:
        raise ValueError(f"num_items: expected 0 to 2**31, got {num_items}")
    backend = resolve_backend(backend, neighbors.offsets.device, BACKENDS)
    return Candidates(
        *_join_candidates(
            neighbors.offsets,
            neighbors.ids,
            neighbors.similarities,
            engagements.offsets,
            engagements.items,
            engagements.weights,
            engagements.reasons,
            exclude_offsets,
            exclude_items,
            cap,
            _MAX_ITEMS if num_items is None else num_items,
            backend,
        )
    )


def _check_vector(values: Tensor, dtype: torch.dtype, name: str, size: int | None = None) -> int:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(values).__name__}; see torch.from_numpy")
    if values.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {values.dtype}; call .to({dtype})")
    if values.device.type != "cpu":
        raise ValueError(f"{name}: the join runs on the CPU, got a tensor on {values.device}; call .cpu()")
    if name.endswith("offsets") and values.dim() == 1 and not values.numel():
        raise ValueError(f"{name}: expected shape [rows + 1], got [0]")
    if values.dim() != 1 or (size is not None and values.numel() != size):
        raise ValueError(f"{name}: expected shape [{'n' if size is None else size}], got {list(values.shape)}")
    return values.numel()


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()


@operator("join_candidates")
def _join_candidates(
    neighbor_offsets: Tensor,
    neighbor_ids: Tensor,
    similarities: Tensor,
    engagement_offsets: Tensor,
    items: Tensor,
    weights: Tensor,
    reasons: Tensor,
    exclude_offsets: Tensor | None,
    exclude_items: Tensor | None,
    cap: int,
    num_items: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        _array(neighbor_offsets),
        _array(neighbor_ids),
        _array(similarities),
        _array(engagement_offsets),
        _array(items),
        _array(weights),
        _array(reasons),
        _array(exclude_offsets),
        _array(exclude_items),
        cap,
        num_items,
    )
    if backend == "native":
        from alure.kernels import _native  # only here: the reference runs where it is not built

        joined = _native.join_candidates(*arguments, torch.get_num_threads())
    else:
        joined = reference.join_candidates(*arguments)
    offsets, candidate_items, scores, candidate_reasons = (torch.from_numpy(x) for x in joined)
    return offsets, candidate_items, scores, candidate_reasons


@_join_candidates.register_fake
def _(
    neighbor_offsets: Tensor,
    neighbor_ids: Tensor,
    similarities: Tensor,
    engagement_offsets: Tensor,
    items: Tensor,
    weights: Tensor,
    reasons: Tensor,
    exclude_offsets: Tensor | None,
    exclude_items: Tensor | None,
    cap: int,
    num_items: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()  # known only after the join
    return (
        torch.empty_like(neighbor_offsets),
        items.new_empty(size),
        similarities.new_empty(size),
        reasons.new_empty(size),
    )
