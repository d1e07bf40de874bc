"""`encode_events` in eager PyTorch: the oracle of the other backends.

Rows are worked on in blocks that fit a cache, never sequence by sequence; all sums run in float32, or in float64 where
the table is float64. Nothing here depends on the order in which threads run.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from alure.kernels.encoding.arguments import EventColumns, EventEncoder, Gradients
from alure.kernels.jagged import segment_ids
from alure.kernels.scatter import sum_rows

BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}  # features of one block: 8 MB near a CPU's cache, 256 MB on a GPU


class Block(NamedTuple):
    """What the rows of one block need, in compute precision."""

    rows: slice
    features: Tensor  # [rows, A·d_e + d_dense + 2 + 2P]
    positions: Tensor  # int64 [rows], rows of the position table
    frequencies: Tensor | None  # int64 [rows], rows of the frequency table


def encode_events(table: Tensor, events: EventColumns, encoder: EventEncoder) -> Tensor:
    """[total, D] in the table's dtype; see `alure.kernels.encoding.ops.encode_events`."""
    compute = torch.promote_types(table.dtype, torch.float32)
    weight, bias = _fused_weight(encoder, compute), encoder.bias.to(compute)
    out = table.new_empty(events.ids.shape[0], encoder.bias.numel())
    for block in _blocks(table, events, encoder):
        y = out[block.rows] if out.dtype == compute else torch.empty_like(out[block.rows], dtype=compute)
        torch.addmm(bias, block.features, weight, out=y)
        y += F.embedding(block.positions, encoder.position_table)
        if block.frequencies is not None:
            y += F.embedding(block.frequencies, encoder.frequency_table)
        if out.dtype != compute:
            out[block.rows] = y
    return out


def encode_events_backward(
    grad: Tensor, table: Tensor, events: EventColumns, encoder: EventEncoder, wants_dense: bool
) -> Gradients:
    """Gradients for `grad` [total, D]; the table's scatter sorts or walks rows in order, so it is deterministic."""
    compute = torch.promote_types(table.dtype, torch.float32)
    weight = _fused_weight(encoder, compute)
    attributes, d_e, width = encoder.id_weight.shape
    d_ids, num_periods = attributes * d_e, encoder.periods.numel()
    d_dense = 0 if events.dense is None else events.dense.shape[1]
    total = events.ids.shape[0]

    grad = grad.to(compute)
    grad_weight = torch.zeros_like(weight)
    grad_rows = grad.new_empty(total, d_ids)
    grad_dense = grad.new_empty(total, d_dense) if wants_dense else grad.new_empty(0)
    grad_phases = grad.new_zeros(num_periods)
    grad_position = grad.new_zeros(encoder.position_table.shape)
    grad_frequency = grad.new_zeros(encoder.frequency_table.shape)
    for block in _blocks(table, events, encoder):
        g = grad[block.rows]
        grad_weight.addmm_(block.features.T, g)
        torch.mm(g, weight[:d_ids].T, out=grad_rows[block.rows])
        if wants_dense:
            torch.mm(g, weight[d_ids : d_ids + d_dense].T, out=grad_dense[block.rows])
        sines, cosines = block.features[:, d_ids + d_dense + 2 :].tensor_split(2, dim=1)
        grad_sines, grad_cosines = (g @ weight[d_ids + d_dense + 2 :].T).tensor_split(2, dim=1)
        grad_phases += (grad_sines * cosines - grad_cosines * sines).sum(0)
        grad_position += sum_rows(g, block.positions, grad_position.shape[0])
        if block.frequencies is not None:
            grad_frequency += sum_rows(g, block.frequencies, grad_frequency.shape[0])
    grad_rows = grad_rows.view(total * attributes, d_e)
    ids = events.ids.reshape(-1)
    grad_rows.masked_fill_((ids < 0)[:, None], 0)
    grad_ids, grad_dense_weight, grad_time = grad_weight.split([d_ids, d_dense, 2 + 2 * num_periods])
    dtype = table.dtype
    return Gradients(
        table=sum_rows(grad_rows, ids.clamp_min(0), table.shape[0]).to(dtype),
        dense=grad_dense.to(events.dense.dtype) if events.dense is not None and wants_dense else grad_dense,
        id_weight=grad_ids.reshape(attributes, d_e, width).to(dtype, copy=True),
        dense_weight=grad_dense_weight.to(dtype, copy=True),
        time_weight=grad_time.to(dtype, copy=True),
        bias=grad.sum(0).to(dtype),
        position_table=grad_position.to(dtype),
        frequency_table=grad_frequency.to(dtype),
        phases=grad_phases.to(encoder.phases.dtype),
    )


def _fused_weight(encoder: EventEncoder, compute: torch.dtype) -> Tensor:
    """[A·d_e + d_dense + 2 + 2P, D]: one matrix for all features."""
    parts = [encoder.id_weight.flatten(0, 1), encoder.dense_weight, encoder.time_weight]
    return torch.cat([part.to(compute) for part in parts if part is not None])


def _blocks(table: Tensor, events: EventColumns, encoder: EventEncoder) -> Iterator[Block]:
    total, attributes = events.ids.shape
    d_dense = 0 if events.dense is None else events.dense.shape[1]
    num_features = attributes * table.shape[1] + d_dense + 2 + 2 * encoder.periods.numel()
    step = max(256, BLOCK_ELEMENTS.get(table.device.type, 1 << 21) // num_features)
    sequence = segment_ids(events.offsets, total)
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        yield _block(table, events, encoder, rows, sequence[rows])


def _block(table: Tensor, events: EventColumns, encoder: EventEncoder, rows: slice, sequence: Tensor) -> Block:
    compute = torch.promote_types(table.dtype, torch.float32)
    index = torch.arange(rows.start, rows.stop, device=table.device)
    begin, end = events.offsets[sequence], events.offsets[sequence + 1]
    times = events.timestamps[rows]
    # integers until the differences are taken: float32 rounds unix seconds by up to 64 s
    age = (events.reference_times[sequence] - times).clamp_min(0)
    gap = times - events.timestamps[torch.maximum(index - 1, begin)]
    local = times if events.utc_offsets is None else times + events.utc_offsets[rows]
    turn = (local[:, None] % encoder.periods).to(compute) * (2 * math.pi / encoder.periods.to(compute))
    angle = turn + encoder.phases.to(compute)
    decay = torch.log1p(torch.stack([age, gap], 1).to(compute) / encoder.tau)

    ids = events.ids[rows]
    # missing ids read row 0 and are then zeroed; a table without rows has only missing ids
    found = F.embedding(ids.clamp_min(0), table) if table.shape[0] else table.new_empty(*ids.shape, table.shape[1])
    found = found.masked_fill_((ids < 0)[..., None], 0).flatten(1)
    dense = [] if events.dense is None else [events.dense[rows].to(compute)]
    features = torch.cat([found.to(compute), *dense, decay, angle.sin(), angle.cos()], 1)

    positions = (end - 1 - index).clamp_max(encoder.position_table.shape[0] - 1)
    frequencies = None
    if events.counts is not None:
        # floor(log2(1 + count)) = how many of 2, 4, 8, … are <= 1 + count
        steps = range(1, min(encoder.frequency_table.shape[0], 63))
        thresholds = torch.tensor([1 << s for s in steps], dtype=torch.int64, device=table.device)
        frequencies = torch.bucketize(events.counts[rows] + 1, thresholds, right=True)
    return Block(rows, features, positions, frequencies)
