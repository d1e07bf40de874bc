"""Jagged attention in plain PyTorch: the oracle in float64, and the CPU path where nothing faster is built.

Sequences of similar length become one batched product; a long sequence goes alone, in chunks of queries. How a
sequence is padded and chunked depends on its own lengths only. The work is Σ n_q·n_k, and no tensor of pairs holds
more than `_PAIRS` logits (a row of one head's keys, where that is more).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alure.kernels.attention.arguments import UNLIMITED, Batch, Bias, Gradients, delta

_PAIRS = 1 << 22  # logits at a time over all heads: 16 MiB in float32


@dataclass(frozen=True)
class _Block:
    """G sequences (or one chunk of queries of one sequence), padded to P queries and N keys.

    q_rows, k_rows: int64 [G, P], [G, N], rows of the packed tensors (clamped where padded); q_valid: bool [G, P];
    position: int64 [G, P, 1] of each query, bottom-right aligned; key_position: int64 [1, 1, N]; num_keys: int64
    [G, 1, 1]; rules: int64 [G, 1, 1] each of left, right, contexts, targets; table: int64 [G], of each sequence.
    """

    q_rows: Tensor
    k_rows: Tensor
    q_valid: Tensor
    position: Tensor
    key_position: Tensor
    num_keys: Tensor
    rules: tuple[Tensor, Tensor, Tensor, Tensor]
    table: Tensor


class _Logits(NamedTuple):
    logits: Tensor  # [G, H, P, N], −inf where hidden
    time_buckets: Tensor | None  # int64 [G, P, N]
    position_buckets: Tensor | None  # int64 [G, P, N]


def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """out [Tq, H, D] like q and lse [H, Tq]."""
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=accumulate, device=q.device)
    for block in _blocks(batch, q.shape[1]):
        qs = _gather(q, block.q_rows, accumulate)
        ks, vs = (_gather(_per_head(x, q), block.k_rows, accumulate) for x in (k, v))
        logits = _logits(block, qs, ks, batch, bias, scale).logits
        block_lse = logits.logsumexp(dim=-1)  # [G, H, P]
        weights = torch.exp(logits - _finite(block_lse)[..., None])
        rows = block.q_rows[block.q_valid]
        out[rows] = (weights @ vs).transpose(1, 2)[block.q_valid].to(q.dtype)
        lse[:, rows] = block_lse.transpose(0, 1)[:, block.q_valid]
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: Batch,
    bias: Bias,
    scale: float,
) -> Gradients:
    """The weights are computed again from lse."""
    accumulate, deltas = lse.dtype, delta(grad_out, out, grad_lse)
    keys, values = _per_head(k, q), _per_head(v, q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=q.device) for x in (q, keys, values))
    d_q_cyclic, d_k_cyclic = (None if x is None else torch.zeros_like(x) for x in (bias.q_cyclic, bias.k_cyclic))
    # Tables sum millions of terms one after another: float32 would stop growing.
    d_time, d_position = (
        None if x is None else torch.zeros(x.shape, dtype=torch.float64, device=q.device)
        for x in (bias.time_table, bias.position_table)
    )
    for block in _blocks(batch, q.shape[1]):
        qs = _gather(q, block.q_rows, accumulate)
        ks, vs = (_gather(x, block.k_rows, accumulate) for x in (keys, values))
        d_out = _gather(grad_out, block.q_rows, accumulate) * block.q_valid[:, None, :, None]
        logits, time_buckets, position_buckets = _logits(block, qs, ks, batch, bias, scale)
        weights = torch.exp(logits - _finite(lse[:, block.q_rows].transpose(0, 1))[..., None])  # [G, H, P, N]
        weights = weights * block.q_valid[:, None, :, None]
        d_vs = weights.transpose(-1, -2) @ d_out
        d_logits = weights * (d_out @ vs.transpose(-1, -2) - deltas[:, block.q_rows].transpose(0, 1)[..., None])
        rows, valid = block.q_rows[block.q_valid], block.q_valid
        dq[rows] = ((d_logits @ ks) * scale).transpose(1, 2)[valid]
        key_valid = block.key_position[:, 0] < block.num_keys[:, 0]  # [G, N]
        key_rows = block.k_rows[key_valid]  # each row once in a block
        dk[key_rows] += ((d_logits.transpose(-1, -2) @ qs) * scale).transpose(1, 2)[key_valid]
        dv[key_rows] += d_vs.transpose(1, 2)[key_valid]
        if (
            d_q_cyclic is not None
            and d_k_cyclic is not None
            and bias.q_cyclic is not None
            and bias.k_cyclic is not None
        ):
            k_channels = bias.k_cyclic[block.k_rows][:, None].to(accumulate)  # [G, 1, N, C]
            q_channels = _gather(bias.q_cyclic, block.q_rows, accumulate)
            d_q_cyclic[rows] = (d_logits @ k_channels).transpose(1, 2)[valid].to(d_q_cyclic.dtype)
            d_k_cyclic[key_rows] += (d_logits.transpose(-1, -2) @ q_channels).sum(1)[key_valid].to(d_k_cyclic.dtype)
        if d_time is not None and time_buckets is not None:
            _add_bucket_sums(d_time, time_buckets, d_logits, block.table)
        if d_position is not None and position_buckets is not None:
            _add_bucket_sums(d_position, position_buckets, d_logits, block.table)
    return Gradients(
        dq.to(q.dtype),
        _per_key_head(dk, k),
        _per_key_head(dv, v),
        _like(d_time, bias.time_table),
        _like(d_position, bias.position_table),
        d_q_cyclic,
        d_k_cyclic,
    )


def _like(sums: Tensor | None, table: Tensor | None) -> Tensor | None:
    return None if sums is None or table is None else sums.to(table.dtype)


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    """k or v with a head for every head of q."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _per_key_head(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of `_per_head(x)`."""
    if gradient.shape != x.shape:
        gradient = gradient.unflatten(1, (x.shape[1], -1)).sum(2)
    return gradient.to(x.dtype)


def _blocks(batch: Batch, num_heads: int) -> Iterator[_Block]:
    """Every sequence that has queries and keys, in blocks of at most `_PAIRS` logits."""
    device, size = batch.q_offsets.device, batch.q_offsets.numel() - 1
    q_begins, k_begins = batch.q_offsets[:-1].to(torch.int64), batch.k_offsets[:-1].to(torch.int64)
    num_queries = batch.q_offsets[1:].to(torch.int64) - q_begins
    num_keys = batch.k_offsets[1:].to(torch.int64) - k_begins
    everyone = torch.tensor([UNLIMITED, UNLIMITED, 0, 0], device=device).expand(size, 4)
    rules = everyone if batch.rules is None else batch.rules
    tables = torch.zeros_like(q_begins) if batch.groups is None else batch.groups
    sequences = _Sequences(q_begins, num_queries, k_begins, num_keys, rules, tables)
    alive = ((num_queries > 0) & (num_keys > 0)).nonzero()[:, 0]
    padded_q, padded_k = _padded(num_queries[alive]), _padded(num_keys[alive])
    together = num_heads * padded_q * padded_k <= _PAIRS
    shapes = torch.stack([padded_q, padded_k], dim=1)[together]
    for padded in torch.unique(shapes, dim=0).tolist():
        members = alive[together][(shapes == torch.tensor(padded, device=device)).all(1)]
        for group in members.split(max(1, _PAIRS // (num_heads * padded[0] * padded[1]))):
            yield _group(_Sequences(*(x[group] for x in sequences)), padded)
    for sequence in alive[~together].tolist():
        yield from _chunks(_Sequences(*(x[sequence : sequence + 1] for x in sequences)), num_heads)


class _Sequences(NamedTuple):
    """First rows, lengths, rules [G, 4] and tables of G sequences, int64 [G] each."""

    q_begin: Tensor
    num_queries: Tensor
    k_begin: Tensor
    num_keys: Tensor
    rules: Tensor
    table: Tensor

    def split_rules(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, right, contexts, targets = self.rules[:, None, None].unbind(-1)  # [G, 1, 1] each
        return left, right, contexts, targets


def _padded(lengths: Tensor) -> Tensor:
    """Lengths rounded up to one of four sizes an octave, so that few shapes occur and little is padded."""
    octave = (lengths - 1).clamp(min=1).to(torch.float64).log2().floor().to(torch.int64)
    step = torch.ones_like(lengths) << (octave - 2).clamp(min=0)
    return (lengths + step - 1) // step * step


def _group(s: _Sequences, padded: list[int]) -> _Block:
    q_index = torch.arange(padded[0], device=s.table.device)
    k_index = torch.arange(padded[1], device=s.table.device)
    return _Block(
        q_rows=s.q_begin[:, None] + torch.minimum(q_index, s.num_queries[:, None] - 1),
        k_rows=s.k_begin[:, None] + torch.minimum(k_index, s.num_keys[:, None] - 1),
        q_valid=q_index < s.num_queries[:, None],
        position=(q_index + (s.num_keys - s.num_queries)[:, None])[..., None],
        key_position=k_index[None, None],
        num_keys=s.num_keys[:, None, None],
        rules=s.split_rules(),
        table=s.table,
    )


def _chunks(s: _Sequences, num_heads: int) -> Iterator[_Block]:
    """One long sequence: chunks of queries, each with the keys that its window leaves."""
    device = s.table.device
    num_queries, num_keys = int(s.num_queries), int(s.num_keys)
    left, right, contexts, targets = s.rules[0].tolist()
    shift = num_keys - num_queries
    size = max(1, _PAIRS // (num_heads * num_keys))
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        everything = contexts > 0 or stop + shift > num_keys - targets
        first = 0 if everything else min(max(0, start + shift - left), num_keys)
        last = num_keys if everything else min(num_keys, stop + shift + right)
        if first >= last:
            continue
        rows = torch.arange(start, stop, device=device)
        columns = torch.arange(first, last, device=device)
        yield _Block(
            q_rows=(s.q_begin + rows)[None],
            k_rows=(s.k_begin + columns)[None],
            q_valid=torch.ones(1, stop - start, dtype=torch.bool, device=device),
            position=(rows + shift)[None, :, None],
            key_position=columns[None, None],
            num_keys=s.num_keys[:, None, None],
            rules=s.split_rules(),
            table=s.table,
        )


def _gather(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of x [T, H, D] as [G, H, rows, D]."""
    return x[rows].to(dtype).transpose(1, 2)


def _logits(block: _Block, qs: Tensor, ks: Tensor, batch: Batch, bias: Bias, scale: float) -> _Logits:
    logits = (qs * scale) @ ks.transpose(-1, -2)
    if bias.q_cyclic is not None and bias.k_cyclic is not None:
        channels = bias.k_cyclic[block.k_rows][:, None].to(qs.dtype)
        logits += _gather(bias.q_cyclic, block.q_rows, qs.dtype) @ channels.transpose(-1, -2)
    time_buckets = position_buckets = None
    if bias.time_thresholds is not None and bias.time_table is not None:
        assert batch.q_timestamps is not None
        assert batch.k_timestamps is not None
        elapsed = batch.q_timestamps[block.q_rows][:, :, None] - batch.k_timestamps[block.k_rows][:, None, :]
        time_buckets = torch.bucketize(elapsed, bias.time_thresholds, right=True)
        logits += _look_up(bias.time_table, time_buckets, block.table)
    left, right, contexts, targets = block.rules
    history = block.num_keys - targets  # [G, 1, 1]
    i, j = block.position, block.key_position  # [G, P, 1], [1, 1, N]
    distance = torch.minimum(i, history) - torch.minimum(j, history)  # [G, P, N]
    if bias.position_thresholds is not None and bias.position_table is not None:
        position_buckets = torch.bucketize(distance, bias.position_thresholds, right=True)
        logits += _look_up(bias.position_table, position_buckets, block.table)
    visible = (distance <= left) & (distance >= -right) | (i >= 0) & (i < contexts)
    visible = visible & (j < history) | (j < contexts) | (i >= history) & (i == j)
    hidden = ~visible | (j >= block.num_keys)
    return _Logits(logits.masked_fill_(hidden[:, None], -math.inf), time_buckets, position_buckets)


def _look_up(table: Tensor, buckets: Tensor, of_sequence: Tensor) -> Tensor:
    """[G, H, P, N] of a table [groups, H, buckets], the buckets [G, P, N] and the group of each sequence [G]."""
    rows = table.transpose(0, 1).flatten(1)  # [H, groups·buckets]
    return rows[:, of_sequence[:, None, None] * table.shape[2] + buckets].transpose(0, 1)


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for rows that see no key, whose weights exp(−inf − 0) are then 0 and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _add_bucket_sums(total: Tensor, buckets: Tensor, values: Tensor, of_sequence: Tensor) -> None:
    """Adds to total [groups, H, buckets] the sums of values [G, H, P, N] by group and bucket, in a fixed order."""
    _, num_heads, num_buckets = total.shape
    by_head = values.transpose(0, 1).flatten(1).to(torch.float64)  # [H, G·P·N]
    heads = torch.arange(num_heads, device=values.device)[:, None]
    row = of_sequence[:, None, None] * num_heads * num_buckets + buckets
    index = (heads * num_buckets + row.flatten()).flatten()
    sums = by_head.new_zeros(total.numel())
    if sums.is_cuda:  # sorts, where scatter_add_ would add atomically in any order
        sums.index_put_((index,), by_head.flatten(), accumulate=True)
    else:
        sums.scatter_add_(0, index, by_head.flatten())
    total += sums.view(total.shape)
