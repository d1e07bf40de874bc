"""Jagged attention in plain PyTorch: the oracle in float64, and the CPU path where nothing faster is built.

Sequences of similar length become one batched product; a long sequence goes alone, in chunks of queries. How a
sequence is padded and chunked depends on its own lengths only. The work is Σ n_q·n_k, and no tensor of pairs holds
more than `_PAIRS` logits (a row of one head's keys, where that is more).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PAIRS = 1 << 22  # logits at a time over all heads: 16 MiB in float32


@dataclass(frozen=True)
class _Options:
    time_thresholds: Tensor | None
    time_table: Tensor | None
    position_thresholds: Tensor | None
    position_table: Tensor | None
    causal: bool
    window_left: int
    window_right: int
    scale: float


@dataclass(frozen=True)
class _Block:
    """G sequences (or one chunk of queries of one sequence), padded to P queries and N keys.

    q_rows, k_rows: int64 [G, P], [G, N], rows of the packed tensors (clamped where padded); q_valid: bool [G, P];
    position: int64 [G, P, 1] of each query, bottom-right aligned; key_position: int64 [1, 1, N];
    num_keys: int64 [G, 1, 1].
    """

    q_rows: Tensor
    k_rows: Tensor
    q_valid: Tensor
    position: Tensor
    key_position: Tensor
    num_keys: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, D] like q and lse [H, Tq]; arguments as in ops.py."""
    options = _Options(
        time_thresholds, time_table, position_thresholds, position_table, causal, window_left, window_right, scale
    )
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulate, device=q.device)
    for block in _blocks(q_offsets, k_offsets, q.shape[1], options):
        qs, ks, vs = (_gather(x, rows, accumulate) for x, rows in _pairs_of(q, k, v, block))
        logits, _, _ = _logits(block, qs, ks, q_timestamps, k_timestamps, q_cyclic, k_cyclic, options)
        block_lse = logits.logsumexp(dim=-1)  # [G, H, P]
        weights = torch.exp(logits - _finite(block_lse)[..., None])
        rows = block.q_rows[block.q_valid]
        out[rows] = (weights @ vs).transpose(1, 2)[block.q_valid].to(q.dtype)
        lse[:, rows] = block_lse.transpose(0, 1)[:, block.q_valid]
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, both tables and both cyclic channels; the weights are computed again from lse."""
    options = _Options(
        time_thresholds, time_table, position_thresholds, position_table, causal, window_left, window_right, scale
    )
    accumulate = lse.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=q.device) for x in (q, k, v))
    d_q_cyclic, d_k_cyclic = (None if x is None else torch.zeros_like(x) for x in (q_cyclic, k_cyclic))
    # Tables sum millions of terms one after another: float32 would stop growing.
    d_time, d_position = (
        None if x is None else torch.zeros(x.shape, dtype=torch.float64, device=q.device)
        for x in (time_table, position_table)
    )
    for block in _blocks(q_offsets, k_offsets, q.shape[1], options):
        qs, ks, vs = (_gather(x, rows, accumulate) for x, rows in _pairs_of(q, k, v, block))
        d_out = _gather(grad_out, block.q_rows, accumulate) * block.q_valid[:, None, :, None]
        delta = (d_out * _gather(out, block.q_rows, accumulate)).sum(-1, keepdim=True)  # [G, H, P, 1]
        logits, time_buckets, position_buckets = _logits(
            block, qs, ks, q_timestamps, k_timestamps, q_cyclic, k_cyclic, options
        )
        weights = torch.exp(logits - _finite(lse[:, block.q_rows].transpose(0, 1))[..., None])  # [G, H, P, N]
        d_vs = weights.transpose(-1, -2) @ d_out
        d_logits = weights * (d_out @ vs.transpose(-1, -2) - delta)
        rows, valid = block.q_rows[block.q_valid], block.q_valid
        dq[rows] = ((d_logits @ ks) * scale).transpose(1, 2)[valid]
        key_valid = block.key_position[:, 0] < block.num_keys[:, 0]  # [G, N]
        key_rows = block.k_rows[key_valid]  # each row once in a block
        dk[key_rows] += ((d_logits.transpose(-1, -2) @ qs) * scale).transpose(1, 2)[key_valid]
        dv[key_rows] += d_vs.transpose(1, 2)[key_valid]
        if d_q_cyclic is not None and d_k_cyclic is not None and q_cyclic is not None and k_cyclic is not None:
            k_channels = k_cyclic[block.k_rows][:, None].to(accumulate)  # [G, 1, N, C]
            q_channels = _gather(q_cyclic, block.q_rows, accumulate)
            d_q_cyclic[rows] = (d_logits @ k_channels).transpose(1, 2)[valid].to(d_q_cyclic.dtype)
            d_k_cyclic[key_rows] += (d_logits.transpose(-1, -2) @ q_channels).sum(1)[key_valid].to(d_k_cyclic.dtype)
        if d_time is not None and time_buckets is not None:
            d_time += _bucket_sums(time_buckets, d_logits, d_time.shape[1])
        if d_position is not None and position_buckets is not None:
            d_position += _bucket_sums(position_buckets, d_logits, d_position.shape[1])
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        d_time.to(time_table.dtype) if d_time is not None and time_table is not None else None,
        d_position.to(position_table.dtype) if d_position is not None and position_table is not None else None,
        d_q_cyclic,
        d_k_cyclic,
    )


def _blocks(q_offsets: Tensor, k_offsets: Tensor, num_heads: int, options: _Options) -> Iterator[_Block]:
    """Every sequence that has queries and keys, in blocks of at most `_PAIRS` logits."""
    device = q_offsets.device
    q_begins, k_begins = q_offsets[:-1].to(torch.int64), k_offsets[:-1].to(torch.int64)
    num_queries = q_offsets[1:].to(torch.int64) - q_begins
    num_keys = k_offsets[1:].to(torch.int64) - k_begins
    alive = ((num_queries > 0) & (num_keys > 0)).nonzero()[:, 0]
    padded_q, padded_k = _padded(num_queries[alive]), _padded(num_keys[alive])
    together = num_heads * padded_q * padded_k <= _PAIRS
    shapes = torch.stack([padded_q, padded_k], dim=1)[together]
    for padded in torch.unique(shapes, dim=0).tolist():
        members = alive[together][(shapes == torch.tensor(padded, device=device)).all(1)]
        for group in members.split(max(1, _PAIRS // (num_heads * padded[0] * padded[1]))):
            yield _group(q_begins[group], num_queries[group], k_begins[group], num_keys[group], padded)
    for sequence in alive[~together].tolist():
        yield from _chunks(
            (int(q_begins[sequence]), int(num_queries[sequence])),
            (int(k_begins[sequence]), int(num_keys[sequence])),
            num_heads,
            options,
            device,
        )


def _padded(lengths: Tensor) -> Tensor:
    """Lengths rounded up to one of four sizes an octave, so that few shapes occur and little is padded."""
    octave = (lengths - 1).clamp(min=1).to(torch.float64).log2().floor().to(torch.int64)
    step = torch.ones_like(lengths) << (octave - 2).clamp(min=0)
    return (lengths + step - 1) // step * step


def _group(q_begins: Tensor, num_queries: Tensor, k_begins: Tensor, num_keys: Tensor, padded: list[int]) -> _Block:
    q_index = torch.arange(padded[0], device=q_begins.device)
    k_index = torch.arange(padded[1], device=q_begins.device)
    return _Block(
        q_rows=q_begins[:, None] + torch.minimum(q_index, num_queries[:, None] - 1),
        k_rows=k_begins[:, None] + torch.minimum(k_index, num_keys[:, None] - 1),
        q_valid=q_index < num_queries[:, None],
        position=(q_index + (num_keys - num_queries)[:, None])[..., None],
        key_position=k_index[None, None],
        num_keys=num_keys[:, None, None],
    )


def _chunks(
    queries: tuple[int, int], keys: tuple[int, int], num_heads: int, options: _Options, device: torch.device
) -> Iterator[_Block]:
    """One long sequence: chunks of queries, each with the keys that causality and the window leave."""
    (q_begin, num_queries), (k_begin, num_keys) = queries, keys
    shift = num_keys - num_queries
    size = max(1, _PAIRS // (num_heads * num_keys))
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        first = max(0, start + shift - options.window_left) if options.window_left >= 0 else 0
        last = stop + shift + options.window_right if options.window_right >= 0 else num_keys
        last = min(num_keys, stop + shift if options.causal else num_keys, last)
        if first >= last:
            continue
        rows = torch.arange(start, stop, device=device)
        columns = torch.arange(first, last, device=device)
        yield _Block(
            q_rows=(q_begin + rows)[None],
            k_rows=(k_begin + columns)[None],
            q_valid=torch.ones(1, stop - start, dtype=torch.bool, device=device),
            position=(rows + shift)[None, :, None],
            key_position=columns[None, None],
            num_keys=torch.full((1, 1, 1), num_keys, device=device),
        )


def _pairs_of(q: Tensor, k: Tensor, v: Tensor, block: _Block) -> tuple[tuple[Tensor, Tensor], ...]:
    return (q, block.q_rows), (k, block.k_rows), (v, block.k_rows)


def _gather(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of x [T, H, D] as [G, H, rows, D]."""
    return x[rows].to(dtype).transpose(1, 2)


def _logits(
    block: _Block,
    qs: Tensor,
    ks: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits [G, H, P, N], −inf where hidden, and the time and position buckets [G, P, N]."""
    logits = (qs * options.scale) @ ks.transpose(-1, -2)
    if q_cyclic is not None and k_cyclic is not None:
        channels = k_cyclic[block.k_rows][:, None].to(qs.dtype)
        logits += _gather(q_cyclic, block.q_rows, qs.dtype) @ channels.transpose(-1, -2)
    time_buckets = position_buckets = None
    if options.time_thresholds is not None and options.time_table is not None:
        assert q_timestamps is not None
        assert k_timestamps is not None
        elapsed = q_timestamps[block.q_rows][:, :, None] - k_timestamps[block.k_rows][:, None, :]
        time_buckets = torch.bucketize(elapsed, options.time_thresholds, right=True)
        logits += options.time_table[:, time_buckets].transpose(0, 1)
    distance = block.position - block.key_position  # [G, P, N]
    if options.position_thresholds is not None and options.position_table is not None:
        position_buckets = torch.bucketize(distance, options.position_thresholds, right=True)
        logits += options.position_table[:, position_buckets].transpose(0, 1)
    hidden = block.key_position >= block.num_keys
    if options.causal:
        hidden = hidden | (distance < 0)
    if options.window_left >= 0:
        hidden = hidden | (distance > options.window_left)
    if options.window_right >= 0:
        hidden = hidden | (-distance > options.window_right)
    return logits.masked_fill_(hidden[:, None], -math.inf), time_buckets, position_buckets


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for rows that see no key, whose weights exp(−inf − 0) are then 0 and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _bucket_sums(buckets: Tensor, values: Tensor, num_buckets: int) -> Tensor:
    """Sums of values [G, H, P, N] by bucket [G, P, N]: float64 [H, num_buckets], added in a fixed order."""
    by_head = values.transpose(0, 1).flatten(1).to(torch.float64)  # [H, G·P·N]
    num_heads = by_head.shape[0]
    heads = torch.arange(num_heads, device=values.device)[:, None] * num_buckets
    index = (heads + buckets.flatten()).flatten()
    sums = by_head.new_zeros(num_heads * num_buckets)
    if sums.is_cuda:  # sorts, where scatter_add_ would add atomically in any order
        sums.index_put_((index,), by_head.flatten(), accumulate=True)
    else:
        sums.scatter_add_(0, index, by_head.flatten())
    return sums.view(num_heads, num_buckets)
