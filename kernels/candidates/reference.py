"""The retrieval join in NumPy: the oracle of the native one, to the bit."""

import numpy as np
from numpy.typing import NDArray

_EDGES_PER_CHUNK = 1 << 18  # bounds the temporaries; a row is never split
_ITEM = 2**31 - 1  # the low bits of a key, row above item


def join_candidates(
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
    """(offsets [rows + 1], items, scores, reasons); see `alure.kernels.join_candidates`."""
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
    rows = neighbor_offsets.size - 1
    counts = [np.zeros(1, np.int64)]
    parts: list[tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.uint8]]] = []
    begin = 0
    while begin < rows:
        end = int(np.searchsorted(neighbor_offsets, neighbor_offsets[begin] + _EDGES_PER_CHUNK, side="right")) - 1
        end = min(max(end, begin + 1), rows)
        edges = slice(int(neighbor_offsets[begin]), int(neighbor_offsets[end]))
        edge_rows = np.repeat(np.arange(begin, end), np.diff(neighbor_offsets[begin : end + 1]))
        lists = neighbor_ids[edges].astype(np.int64)
        lengths = engagement_offsets[lists + 1] - engagement_offsets[lists]
        # positions of every engagement of every edge, in the order of the edges
        firsts = np.repeat(engagement_offsets[lists] - np.cumsum(lengths) + lengths, lengths)
        positions = firsts + np.arange(firsts.size)
        pair_rows = np.repeat(edge_rows, lengths)
        products = np.repeat(similarities[edges].astype(np.float64), lengths) * weights[positions]
        keys, inverse = np.unique(pair_rows * 2**31 + items[positions], return_inverse=True)
        # bincount adds in the order of its input: neighbour by neighbour, engagement by engagement
        with np.errstate(over="ignore"):
            scores = np.bincount(inverse, products, minlength=keys.size).astype(np.float32)
        combined = np.zeros(keys.size, np.uint8)
        np.bitwise_or.at(combined, inverse, reasons[positions])

        keep = scores > 0
        if exclude_offsets is not None and exclude_items is not None:
            excluded_rows = np.repeat(np.arange(begin, end), np.diff(exclude_offsets[begin : end + 1]))
            excluded = exclude_items[exclude_offsets[begin] : exclude_offsets[end]].astype(np.int64)
            keep &= ~np.isin(keys, (excluded_rows * 2**31 + excluded)[excluded >= 0])
        if eligible is not None:
            keep &= eligible[keys & _ITEM]
        keys, scores, combined = keys[keep], scores[keep], combined[keep]
        best = np.lexsort((keys, -scores, keys >> 31))
        if groups is not None:
            best = best[_best_of_groups(keys[best] >> 31, groups[keys[best] & _ITEM], group_cap)]
        best = best[_rank(keys[best] >> 31) < cap]
        counts.append(np.bincount((keys[best] >> 31) - begin, minlength=end - begin))
        parts.append(((keys[best] & _ITEM).astype(np.int32), scores[best], combined[best]))
        begin = end
    offsets = np.cumsum(np.concatenate(counts), dtype=np.int64)
    if not parts:
        return offsets, np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.uint8)
    joined_items, joined_scores, joined_reasons = (np.concatenate(part) for part in zip(*parts))
    return offsets, joined_items, joined_scores, joined_reasons


def _rank(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each one's place within its run of equal rows."""
    starts = np.flatnonzero(np.diff(rows, prepend=np.iinfo(np.int64).min))
    return np.arange(rows.size) - np.repeat(starts, np.diff(starts, append=rows.size))


def _best_of_groups(rows: NDArray[np.int64], groups: NDArray[np.int32], group_cap: int) -> NDArray[np.bool_]:
    """Which are among the first `group_cap` of their row and group, or of no group; best first within a row."""
    run = rows * 2**32 + groups
    order = np.argsort(run, kind="stable")
    kept = np.empty(rows.size, np.bool_)
    kept[order] = _rank(run[order]) < group_cap
    return kept | (groups < 0)


def check_lists(
    neighbor_offsets: NDArray[np.int64],
    neighbor_ids: NDArray[np.int32],
    similarities: NDArray[np.float32],
    engagement_offsets: NDArray[np.int64],
    items: NDArray[np.int32],
    weights: NDArray[np.float32],
    exclude_offsets: NDArray[np.int64] | None,
    exclude_items: NDArray[np.int32] | None,
    num_items: int,
) -> None:
    """ValueError where an array is not what `alure.kernels.join_candidates` asks for."""
    _check_offsets(neighbor_offsets, neighbor_ids.size, "neighbors.offsets")
    _check_offsets(engagement_offsets, items.size, "engagements.offsets")
    _check_range(neighbor_ids, engagement_offsets.size - 1, "neighbors.ids", "rows of engagements")
    _check_finite(similarities, "neighbors.similarities")
    _check_range(items, num_items, "engagements.items", "item ids")
    _check_finite(weights, "engagements.weights")
    if exclude_offsets is not None and exclude_items is not None:
        _check_offsets(exclude_offsets, exclude_items.size, "exclude_offsets")
        _check_ascending(exclude_items, exclude_offsets, "exclude_items")


def _check_offsets(offsets: NDArray[np.int64], total: int, name: str) -> None:
    if offsets.size < 1:
        raise ValueError(f"{name}: expected shape [rows + 1], got [0]")
    if offsets[0] != 0:
        raise ValueError(f"{name}: expected the first offset to be 0, got {offsets[0]}")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if falls.size:
        row = falls[0]
        raise ValueError(
            f"{name}: expected offsets that never decrease, got {offsets[row]} before {offsets[row + 1]} at row {row}"
        )
    if offsets[-1] != total:
        raise ValueError(f"{name}: expected the last offset to equal the number of values, {total}, got {offsets[-1]}")


def _check_range(ids: NDArray[np.int32], count: int, name: str, what: str) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= count))
    if bad.size:
        raise ValueError(f"{name}: expected {what} from 0 to {count - 1}, got {ids[bad[0]]} at position {bad[0]}")


def _check_finite(values: NDArray[np.float32], name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(f"{name}: expected finite numbers, got {values[bad[0]]} at position {bad[0]}")


def _check_ascending(values: NDArray[np.int32], offsets: NDArray[np.int64], name: str) -> None:
    rows = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    falls = np.flatnonzero((values[1:] < values[:-1]) & (rows[1:] == rows[:-1]))
    if falls.size:
        raise ValueError(f"{name}: expected ascending items within a row, got a descent in row {rows[falls[0]]}")
