"""What is made of a batch once, for all heads and layers: the tiles, and which pairs of tiles take which loop.

A pair of tiles is a rectangle of pairs (i, j). Times are sorted, so its corners give the first and the last time bucket
in it, and the rules say from its corners whether any and whether every pair in it is seen. That decides its class
(kernel_tiles.py). The pairs of a tile are listed by class, and in the order of the rows within a class; tiles of one
sequence are listed together, so that its keys stay in the cache, the longest sequences first and of each the longest
tiles: what is left for the end is short. A list holds 20 bytes for each pair of tiles, seen or not.

One wait for the device where the batch is, for the numbers of tiles and pairs.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from alure.kernels.attention.arguments import UNLIMITED, Batch
from alure.kernels.jagged import segment_ids

NUM_CLASSES, CELL_SHIFT = 5, 20  # as in kernel_tiles.py, which needs Triton
FEW, SEVERAL = (1, 1), (3, 2)  # the most thresholds of (time, position) that these classes cross
# Times of a sequence that differ by less than this are kept as such numbers: 194 days, 34 years, any.
_SPANS = {torch.float32: 1 << 24, torch.int32: 1 << 30, torch.int64: (1 << 63) - 1}
_PADDING = 4  # thresholds beyond the last, which nothing reaches
_NONE = torch.empty(0)


class Plan(NamedTuple):
    """Tensors only, for it travels through an operator. Empty ones stand for an absent bias.

    Tiles int64 [tiles, 16]: q_begin, n_q, k_begin, n_k, start, left, right, contexts, history, group and where in the
    pairs each class ends, from the begin of the first on. Pairs int32 [pairs + 1, 5]: start of the other tile, first
    and last bucket of time, first and last bucket of position; after the last, zeros, for loops that read ahead.
    """

    q_time: Tensor  # [Tq] seconds since the sequence's first event, float32 or int32 where all spans fit, else as given
    k_time: Tensor  # [Tk]
    time_thresholds: Tensor  # [buckets − 1 + padding], like the times
    time_cells: Tensor  # [4096] int64, see `_cells`
    position_thresholds: Tensor  # [buckets − 1 + padding] int32
    position_cells: Tensor  # [4096] int64
    sizes: Tensor  # [9 sizes, of which the last is 0]: its shape is what the host has to know, see `Sizes`
    tiles: Tensor  # of queries
    pairs: Tensor
    q_tiles: Tensor = _NONE  # of queries, of the size that dq takes; absent in a plan for the forward alone
    q_pairs: Tensor = _NONE
    kv_tiles: Tensor = _NONE  # of keys, for dk and dv; the pairs say where the queries start
    kv_pairs: Tensor = _NONE


class Sizes(NamedTuple):
    """The most thresholds within a cell; then queries and keys of a tile, 0 where a plan has no such tiles."""

    time_steps: int
    position_steps: int
    forward_m: int
    forward_n: int
    dq_m: int
    dq_n: int
    dkdv_m: int
    dkdv_n: int
    nothing: int = 0


class Tiling(NamedTuple):
    """block_m queries by block_n keys; `by_keys` lists them by tiles of keys."""

    block_m: int
    block_n: int
    by_keys: bool = False


def make_plan(
    batch: Batch, time_thresholds: Tensor | None, position_thresholds: Tensor | None, tilings: Sequence[Tiling]
) -> Plan:
    """The plan of `batch`; tilings: of the forward alone, or of forward, dq, and dk and dv."""
    device = batch.q_offsets.device
    sequences = _sequences(batch)
    with_time = time_thresholds is not None and batch.q_timestamps is not None and batch.k_timestamps is not None
    first, last = _bounds(batch) if with_time else (sequences[:, 0], sequences[:, 0])
    time_thresholds = time_thresholds if with_time else torch.empty(0, dtype=torch.int64, device=device)
    if position_thresholds is None:
        position_thresholds = torch.empty(0, dtype=torch.int64, device=device)
    time_cells, time_steps = _cells(time_thresholds)
    position_cells, position_steps = _cells(position_thresholds)
    counts = [_counts(sequences, tiling) for tiling in tilings]
    totals = [total for tiles, pairs in counts for total in (tiles.sum(), pairs.sum())]
    *totals, span, time_step, position_step = torch.stack(
        [*totals, (last - first).max() if len(first) else first.new_zeros(()), time_steps, position_steps]
    ).tolist()
    time_dtype = next(dtype for dtype, most in _SPANS.items() if span < most)
    q_time, k_time = (batch.q_timestamps, batch.k_timestamps) if with_time else (time_thresholds, time_thresholds)
    if with_time and time_dtype != torch.int64:
        q_time, k_time = (
            (times - first[segment_ids(offsets, times.numel())]).to(time_dtype)
            for times, offsets in ((q_time, batch.q_offsets), (k_time, batch.k_offsets))
        )
    tile_sizes = [size for tiling in tilings for size in tiling[:2]]
    made: dict[Tiling, tuple[Tensor, Tensor]] = {}
    for tiling, (tiles, pairs), total, total_pairs in zip(tilings, counts, totals[::2], totals[1::2], strict=True):
        if tiling not in made:
            made[tiling] = _lists(
                sequences,
                tiling,
                (tiles, total),
                (pairs, total_pairs),
                (q_time, k_time),
                time_thresholds,
                position_thresholds,
            )
    return Plan(
        q_time.contiguous(),
        k_time.contiguous(),
        _padded(time_thresholds, time_dtype),
        time_cells,
        _padded(position_thresholds, torch.int32),
        position_cells,
        torch.empty(Sizes(time_step, position_step, *tile_sizes, *[0] * (6 - len(tile_sizes))), device=device),
        *(part for tiling in tilings for part in made[tiling]),
    )


def _sequences(batch: Batch) -> Tensor:
    """int64 [B, 9]: q_begin, n_q, k_begin, n_k, left, right, contexts, history, group."""
    q, k = batch.q_offsets.to(torch.int64), batch.k_offsets.to(torch.int64)
    n_q, n_k = q[1:] - q[:-1], k[1:] - k[:-1]
    none = torch.zeros_like(n_q)
    left = right = torch.full_like(n_q, UNLIMITED)
    contexts = targets = none
    if batch.rules is not None:
        left, right, contexts, targets = batch.rules.unbind(1)
    contexts, history = torch.minimum(contexts, n_k), (n_k - targets).clamp(min=0)
    groups = none if batch.groups is None else batch.groups
    return torch.stack([q[:-1], n_q, k[:-1], n_k, left, right, contexts, history, groups], dim=1)


def _bounds(batch: Batch) -> tuple[Tensor, Tensor]:
    """The first and the last time of every sequence, of queries and keys; 0 where it has neither."""
    assert batch.q_timestamps is not None
    assert batch.k_timestamps is not None
    edges = torch.iinfo(torch.int64)
    firsts, lasts = [], []
    for times, offsets in ((batch.q_timestamps, batch.q_offsets), (batch.k_timestamps, batch.k_offsets)):
        begin, end = offsets[:-1].to(torch.int64), offsets[1:].to(torch.int64)
        if times.numel() == 0:
            continue
        filled = end > begin
        firsts.append(torch.where(filled, times[begin.clamp(max=times.numel() - 1)], edges.max))
        lasts.append(torch.where(filled, times[(end - 1).clamp(min=0)], edges.min))
    if not firsts:
        nothing = batch.q_offsets[:-1].to(torch.int64) * 0
        return nothing, nothing
    first, last = torch.stack(firsts).amin(0), torch.stack(lasts).amax(0)
    empty = last < first
    return first.masked_fill(empty, 0), last.masked_fill(empty, 0)


def _padded(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Thresholds with padding; those beyond every difference are cut, so that a time less a threshold fits the type."""
    padding = thresholds.new_full((_PADDING,), torch.iinfo(torch.int64).max)
    return torch.cat([thresholds, padding]).clamp(-_SPANS[dtype], _SPANS[dtype]).to(dtype)


def _cells(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """(cells int64 [4096], the most thresholds within one cell); for `look_up` in kernel_tiles.py.

    The cell of an integer is made of the upper bits of its float32. An entry has the bucket of the cell's first integer
    in its upper 32 bits and the first threshold above that integer and within the cell in its lower, 2³¹ − 1 for none.
    On the host they are made once for the same thresholds.
    """
    return _known_cells(tuple(thresholds.tolist())) if thresholds.device.type == "cpu" else _make_cells(thresholds)


@lru_cache(maxsize=16)
def _known_cells(thresholds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # they serve training too
        return _make_cells(torch.tensor(thresholds, dtype=torch.int64))


def _make_cells(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    device = thresholds.device
    number = 1 << (32 - CELL_SHIFT)
    if thresholds.numel() == 0:
        return torch.full((number,), 2**31 - 1, device=device), torch.zeros((), dtype=torch.int64, device=device)
    cell = torch.arange(number, device=device)
    edge = (cell << CELL_SHIFT).to(torch.int32).view(torch.float32).to(torch.float64)  # towards 0 from all in the cell
    inside = torch.where(edge < 0, edge.floor(), edge.ceil()).nan_to_num(0.0).clamp(-(2.0**62), 2.0**62)
    bucket = torch.bucketize(inside.to(torch.int64), thresholds, right=True)  # of the cells without a threshold inside
    at, before = _cell_of(thresholds), _cell_of(thresholds - 1)
    splits = at == before
    index = torch.arange(thresholds.numel(), device=device)
    beyond = thresholds.numel()
    lowest = torch.full((number + 1,), beyond, device=device)  # the first threshold that splits each cell
    lowest.scatter_reduce_(0, torch.where(splits, at, number), index, "amin")
    lowest = lowest[:number]
    split = lowest < beyond
    steps = torch.zeros(number + 1, dtype=torch.int64, device=device)
    steps.index_put_((torch.where(splits, at, number),), torch.ones_like(index), accumulate=True)
    inner = thresholds[lowest.clamp(max=beyond - 1)].clamp(-_SPANS[torch.int32], _SPANS[torch.int32])
    inner = torch.where(split, inner, 2**31 - 1) & 0xFFFFFFFF
    return (torch.where(split, lowest, bucket) << 32) | inner, steps[:number].amax()


def _cell_of(x: Tensor) -> Tensor:
    return (x.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF) >> CELL_SHIFT


def _counts(sequences: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """(tiles, pairs of tiles) of every sequence."""
    q_tiles = -(-sequences[:, 1] // tiling.block_m)
    k_tiles = -(-sequences[:, 3] // tiling.block_n)
    return (k_tiles if tiling.by_keys else q_tiles), q_tiles * k_tiles


def _lists(
    sequences: Tensor,
    tiling: Tiling,
    tiles: tuple[Tensor, int],
    pairs: tuple[Tensor, int],
    times: tuple[Tensor, Tensor],
    time_thresholds: Tensor,
    position_thresholds: Tensor,
) -> tuple[Tensor, Tensor]:
    """(tiles, pairs) of one tiling."""
    device = sequences.device
    number, other = (tiling.block_n, tiling.block_m) if tiling.by_keys else (tiling.block_m, tiling.block_n)
    of_tile, tile_index = _expand(*tiles)
    others = -(-sequences[:, 1 if tiling.by_keys else 3] // other)  # tiles of the other kind of each sequence
    tile, other_index = _expand(others[of_tile], pairs[1])
    of_pair = of_tile[tile]
    start, other_start = tile_index[tile] * number, other_index * other
    rows, columns = (other_start, start) if tiling.by_keys else (start, other_start)
    kind, buckets = _classify(sequences[of_pair], rows, columns, tiling, times, time_thresholds, position_thresholds)
    key = tile * (NUM_CLASSES + 1) + kind
    key, order = torch.sort(key, stable=True)
    fields = torch.stack([other_start, *buckets], dim=1).to(torch.int32)[order]
    fields = torch.cat([fields, fields.new_zeros(1, fields.shape[1])])
    ends = torch.arange(tiles[1], device=device)[:, None] * (NUM_CLASSES + 1) + torch.arange(
        NUM_CLASSES + 1, device=device
    )
    ends = torch.searchsorted(key, ends)
    s = sequences[of_tile]
    records = torch.cat([s[:, :4], (tile_index * number)[:, None], s[:, 4:], ends], dim=1)
    seen = ends[:, -1] - ends[:, 0]
    of_sequence = seen.new_zeros(len(sequences)).index_add_(0, of_tile, seen)
    by_tile = torch.argsort(seen, descending=True, stable=True)
    order = by_tile[
        torch.argsort((of_sequence[of_tile] * len(sequences) + of_tile)[by_tile], descending=True, stable=True)
    ]
    return records[order].contiguous(), fields


def _expand(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(which row an element belongs to, its number within the row), for `counts` elements a row."""
    index = torch.arange(len(counts), device=counts.device)
    row = torch.repeat_interleave(index, counts, output_size=total)
    return row, torch.arange(total, device=counts.device) - (counts.cumsum(0) - counts)[row]


def _classify(
    sequence: Tensor,
    row: Tensor,
    column: Tensor,
    tiling: Tiling,
    times: tuple[Tensor, Tensor],
    time_thresholds: Tensor,
    position_thresholds: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of every pair of tiles the class (NUM_CLASSES: nothing is seen), and the first and last buckets."""
    q_begin, n_q, k_begin, n_k, left, right, contexts, history, _ = sequence.unbind(1)
    last_row = torch.minimum(row + tiling.block_m, n_q) - 1
    last_column = torch.minimum(column + tiling.block_n, n_k) - 1
    i0, i1 = row + n_k - n_q, last_row + n_k - n_q
    p0, p1 = torch.minimum(i0, history), torch.minimum(i1, history)
    last_history = torch.minimum(last_column, history - 1)
    some_context = torch.maximum(i0, torch.zeros_like(i0)) <= torch.minimum(i1, contexts - 1)
    seen = (
        (column < contexts)
        | ((column < history) & some_context)
        | ((column <= p1 + right) & (last_history >= torch.maximum(p0 - left, column)))
        | (torch.maximum(torch.maximum(i0, column), history) <= torch.minimum(i1, last_column))
    )
    after_contexts = torch.maximum(column, contexts)
    window = (last_column <= p0 + right) & (after_contexts >= p1 - left)
    whole = (column + tiling.block_n <= n_k) & (last_column < history)
    whole &= (last_column < contexts) | ((i0 >= 0) & (i1 < contexts)) | window

    nothing = torch.zeros_like(row)
    time_first = time_last = position_first = position_last = nothing
    if time_thresholds.numel():
        q_time, k_time = (x.to(torch.int64) for x in times)
        earliest = q_time[q_begin + row] - k_time[k_begin + last_column]
        latest = q_time[q_begin + last_row] - k_time[k_begin + column]
        time_first, time_last = (torch.bucketize(x, time_thresholds, right=True) for x in (earliest, latest))
    if position_thresholds.numel():
        nearest, farthest = p0 - torch.minimum(last_column, history), p1 - torch.minimum(column, history)
        inside = (column >= contexts) & ~some_context  # then what is seen lies in the window
        nearest = torch.where(inside, torch.maximum(nearest, -right), nearest)
        farthest = torch.where(inside, torch.minimum(farthest, left), farthest)
        farthest = torch.maximum(nearest, farthest)
        position_first, position_last = (
            torch.bucketize(x, position_thresholds, right=True) for x in (nearest, farthest)
        )
    crossed = (time_last - time_first, position_last - position_first)
    kind = torch.where(whole, 3, 4)
    for number, limits in ((2, SEVERAL), (1, FEW), (0, (0, 0))):
        kind = torch.where(whole & (crossed[0] <= limits[0]) & (crossed[1] <= limits[1]), number, kind)
    kind = torch.where(seen, kind, NUM_CLASSES)
    return kind, (time_first, time_last, position_first, position_last)
