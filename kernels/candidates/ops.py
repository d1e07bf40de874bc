"""`join_candidates`: validation, registration as `torch.ops.alure.join_candidates`, and dispatch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.candidates import arrays, reference
from alure.kernels.operators import operator

BACKENDS = ("native", "reference", "cupy")
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


@dataclass(frozen=True)
class ItemRules:
    """What a row may get. None: no such rule."""

    exclude_offsets: Tensor | None = None  # int64 [rows + 1]
    exclude_items: Tensor | None = None  # int32, ascending within a row: not for this row, such as what it has seen
    eligible: Tensor | None = None  # bool [num_items]; False: for no row
    groups: Tensor | None = None  # int32 [num_items], such as accounts; negative: none
    group_cap: int = 1  # items of one group a row


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
    rules: ItemRules | None = None,
    backend: str = "auto",
) -> Candidates:
    """The best `cap` items of each row: score(item) = Σ similarity × weight over its neighbours' engagements.

    Products and sums are in float64, in the order of the lists, and the score is rounded to float32 at the end, so
    all backends give the same bits, whatever the number of threads. Ranks are by the rounded score; equal scores by
    lower item. Items whose score is not above 0 are left out, and those that `rules` refuse; of each group the best
    `group_cap` stay, then the best `cap` of all. Reasons of one item are OR-ed.

    num_items: where given, every item id must be below it; rules.eligible and rules.groups need it.
    All tensors on the CPU; "cupy", which "auto" does not take, joins on CuPy's CUDA device and brings the result back.
    Memory: the output twice, and one row's items for each of torch.get_num_threads() threads ("cupy": 2 GB there).

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
    rules = rules or ItemRules()
    _check_rules(rules, bounds, num_items)
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
            rules.exclude_offsets,
            rules.exclude_items,
            rules.eligible,
            rules.groups,
            rules.group_cap,
            cap,
            _MAX_ITEMS if num_items is None else num_items,
            backend,
        )
    )


def _check_rules(rules: ItemRules, bounds: int, num_items: int | None) -> None:
    if (rules.exclude_offsets is None) != (rules.exclude_items is None):
        raise ValueError("exclude_offsets, exclude_items: expected both or neither")
    if rules.exclude_offsets is not None and rules.exclude_items is not None:
        _check_vector(rules.exclude_offsets, torch.int64, "exclude_offsets", bounds)
        _check_vector(rules.exclude_items, torch.int32, "exclude_items")
    for name, values, dtype in (("eligible", rules.eligible, torch.bool), ("groups", rules.groups, torch.int32)):
        if values is not None:
            if num_items is None:
                raise ValueError(f"{name}: expected num_items beside it, which is its length")
            _check_vector(values, dtype, name, num_items)
    if rules.group_cap < 1:
        raise ValueError(f"group_cap: expected at least 1, got {rules.group_cap}")


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
    eligible: Tensor | None,
    groups: Tensor | None,
    group_cap: int,
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
        _array(eligible),
        _array(groups),
        group_cap,
        cap,
        num_items,
    )
    if backend == "native":
        from alure.kernels import _native  # only here: the reference runs where it is not built

        joined = _native.join_candidates(*arguments, torch.get_num_threads())
    elif backend == "cupy":
        import cupy

        joined = arrays.join_candidates(cupy, *arguments)
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
    eligible: Tensor | None,
    groups: Tensor | None,
    group_cap: int,
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
