"""The retrieval join in array operations that NumPy and CuPy share, for a GPU: to the bit what the reference gives.

A GPU's own sums by key add in any order. Here pairs are sorted by key, stably, and added step by step: the first of
every key, the second where there is one, and so on. So sums run in the order of the lists.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alure.kernels.candidates.reference import check_lists

PAIRS_PER_CHUNK = 1 << 24  # of a row's neighbour and an item: some 2 GB on the GPU; a row is never split
_SHIFT, _ITEM = 31, 2**31 - 1  # a key: row above item
_INFINITY = 0x7F800000  # its bits


def join_candidates(
    xp: ModuleType,
    neighbor_offsets: NDArray[np.int64],
    neighbor_ids: NDArray[np.int32],
    similarities: NDArray[np.float32],
    engagement_offsets: NDArray[np.int64],
    items: NDArray[np.int32],
    weights: NDArray[np.float32],
    reasons: NDArray[np.uint8],
    exclude_offsets: NDArray[np.int64] | None,
    exclude_items: NDArray[np.int32] | None,
    eligible: NDArray[np.bool_] | None,
    groups: NDArray[np.int32] | None,
    group_cap: int,
    cap: int,
    num_items: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32], NDArray[np.uint8]]:
    """(offsets [rows + 1], items, scores, reasons), of NumPy as the inputs are; `xp` is numpy or cupy."""
    check_lists(
        neighbor_offsets,
        neighbor_ids,
        similarities,
        engagement_offsets,
        items,
        weights,
        exclude_offsets,
        exclude_items,
        num_items,
    )
    to_host = getattr(xp, "asnumpy", np.asarray)
    list_begins, list_lengths = xp.asarray(engagement_offsets[:-1]), xp.asarray(np.diff(engagement_offsets))
    all_items, all_weights, all_reasons = xp.asarray(items), xp.asarray(weights), xp.asarray(reasons)
    may_be = None if eligible is None else xp.asarray(eligible)
    group_of = None if groups is None else xp.asarray(groups)

    counts = [np.zeros(1, np.int64)]
    parts: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.uint8]]] = []
    for begin, end in _chunks(neighbor_offsets, np.diff(engagement_offsets)[neighbor_ids]):
        edges = slice(int(neighbor_offsets[begin]), int(neighbor_offsets[end]))
        near = xp.asarray(neighbor_ids[edges])
        ends = xp.cumsum(list_lengths[near])
        total = int(ends[-1]) if near.size else 0
        if total == 0:
            counts.append(np.zeros(end - begin, np.int64))
            continue
        place = xp.arange(total)
        edge = xp.searchsorted(ends, place, side="right")  # of every pair
        positions = (list_begins[near] - ends + list_lengths[near])[edge] + place
        keys = _rows(xp, neighbor_offsets, begin, end)[edge] << _SHIFT | all_items[positions].astype(np.int64)
        products = xp.asarray(similarities[edges]).astype(np.float64)[edge] * all_weights[positions]
        keys, scores, combined = _sums_in_order(xp, keys, products, all_reasons[positions])

        keep = scores > 0
        if exclude_offsets is not None and exclude_items is not None:
            keep &= ~_among(xp, keys, exclude_offsets, exclude_items, begin, end)
        if may_be is not None:
            keep &= may_be[keys & _ITEM]
        keys, scores, combined = keys[keep], scores[keep], combined[keep]
        if keys.size == 0:
            counts.append(np.zeros(end - begin, np.int64))
            continue
        # Scores above 0 are in the order of their bits, and items are in order already.
        falling = _INFINITY - scores.view(np.int32).astype(np.int64)
        best = xp.argsort(keys >> _SHIFT << _SHIFT | falling, kind="stable")
        if group_of is not None:
            best = best[_best_of_groups(xp, keys[best] >> _SHIFT, group_of[keys[best] & _ITEM], group_cap)]
        best = best[_rank(xp, keys[best] >> _SHIFT) < cap]
        bounds = xp.searchsorted(keys[best] >> _SHIFT, xp.arange(end - begin + 1))
        counts.append(np.diff(to_host(bounds)))
        joined = ((keys[best] & _ITEM).astype(np.int32), scores[best], combined[best])
        parts.append(tuple(to_host(part) for part in joined))  # type: ignore[arg-type]
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    if not parts:
        return offsets, np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.uint8)
    joined_items, joined_scores, joined_reasons = (np.concatenate(part) for part in zip(*parts))
    return offsets, joined_items, joined_scores, joined_reasons


def _chunks(neighbor_offsets: NDArray[np.int64], pairs_of_edges: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most PAIRS_PER_CHUNK pairs, or of one row."""
    pairs = np.concatenate([np.zeros(1, np.int64), np.cumsum(pairs_of_edges)])[neighbor_offsets]
    rows, begin = neighbor_offsets.size - 1, 0
    while begin < rows:
        end = int(np.searchsorted(pairs, pairs[begin] + PAIRS_PER_CHUNK, side="right")) - 1
        end = min(max(end, begin + 1), rows)
        yield begin, end
        begin = end


def _rows(xp: ModuleType, offsets: NDArray[np.int64], begin: int, end: int) -> Any:
    """The row, counted from `begin`, of every value of rows begin … end."""
    ends = xp.asarray(offsets[begin + 1 : end + 1] - offsets[begin])
    return xp.searchsorted(ends, xp.arange(int(offsets[end] - offsets[begin])), side="right")


def _sums_in_order(xp: ModuleType, keys: Any, products: Any, reasons: Any) -> tuple[Any, Any, Any]:
    """(different keys ascending, float32 sums of their products in order, their reasons OR-ed)."""
    order = xp.argsort(keys, kind="stable")
    keys, products, reasons = keys[order], products[order], reasons[order]
    starts = xp.flatnonzero(_begins(xp, keys))
    counts = xp.concatenate([starts[1:], xp.asarray([keys.size])]) - starts
    sums, combined = products[starts], reasons[starts]
    more, step = xp.flatnonzero(counts > 1), 1
    while more.size:
        sums[more] += products[starts[more] + step]
        combined[more] |= reasons[starts[more] + step]
        step += 1
        more = more[counts[more] > step]
    with np.errstate(over="ignore"):
        return keys[starts], sums.astype(np.float32), combined


def _among(
    xp: ModuleType, keys: Any, offsets: NDArray[np.int64], items: NDArray[np.int32], begin: int, end: int
) -> Any:
    """Which keys are among the items, ascending within each row."""
    listed = xp.asarray(items[offsets[begin] : offsets[end]]).astype(np.int64)
    listed = (_rows(xp, offsets, begin, end) << _SHIFT | listed)[listed >= 0]
    if listed.size == 0:
        return xp.zeros(keys.shape, np.bool_)
    return listed[xp.minimum(xp.searchsorted(listed, keys), listed.size - 1)] == keys


def _begins(xp: ModuleType, values: Any) -> Any:
    """Which values differ from the one before."""
    begins = xp.ones(values.shape, np.bool_)
    begins[1:] = values[1:] != values[:-1]
    return begins


def _rank(xp: ModuleType, rows: Any) -> Any:
    """Each one's place within its run of equal rows."""
    begins = _begins(xp, rows)
    return xp.arange(rows.size) - xp.flatnonzero(begins)[xp.cumsum(begins) - 1]


def _best_of_groups(xp: ModuleType, rows: Any, groups: Any, group_cap: int) -> Any:
    """Which are among the first `group_cap` of their row and group, or of no group; best first within a row."""
    run = rows * 2**32 + groups
    order = xp.argsort(run, kind="stable")
    kept = xp.empty(rows.shape, np.bool_)
    kept[order] = _rank(xp, run[order]) < group_cap
    return kept | (groups < 0)
