"""Jagged attention in Triton, forward and backward.

One program makes one tile of one head: forward and dq a tile of queries, dk and dv a tile of keys. A tile lies in one
sequence, so work grows with Σ n_q·n_k and nothing crosses sequences. Buckets are found without gathers: sorted times
give the first and the last bucket of a tile of pairs from its corners, and a chain of compare-and-selects over the
buckets between them gives the bias. Far from the diagonal a tile lies in one bucket and the chain is empty.
The gradient of a table is summed bucket by bucket in each program, stored, and added up in a fixed order: no atomics,
and the same bits every time. Logits live in units of log 2, for exp2.

    q [Tq, H, D]  k, v [Tk, H, D]  fp16 | bf16 | fp32, any strides with contiguous channels
    offsets [B + 1] int32 | int64; times [T] and time thresholds int32 where every sequence's span fits, else int64
    tables [H, buckets] fp32; q_cyclic [Tq, H, C], k_cyclic [Tk, C] fp32; lse, delta [H, Tq] fp32
"""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import triton_interprets
from alure.kernels.jagged import segment_ids, tile_list

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By padded head_dim: (forward, dq, dk and dv). Untuned; chosen to compile without spills for sm_80, sm_90 and sm_100.
HALF_CONFIGS = {
    16: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    32: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    64: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    128: (Config(64, 64, 4, 2), Config(64, 64, 8, 1), Config(64, 64, 8, 1)),
    256: (Config(64, 32, 8, 1), Config(64, 32, 8, 1), Config(32, 64, 8, 1)),
}
FLOAT_CONFIGS = {
    16: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    32: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    64: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    128: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    256: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}


@triton.jit
def _load_rows(p_x, o_row, m_row, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of one head, [rows, BLOCK], zeros where masked."""
    o_d = tl.arange(0, BLOCK)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _load_times(p_time, row, o_row, m_row, n, BLOCK: tl.constexpr):
    """Times of a tile's rows, and its first and last time (they are sorted)."""
    return (
        tl.load(p_time + o_row, mask=m_row, other=0),
        tl.load(p_time + row),
        tl.load(p_time + tl.minimum(row + BLOCK, n) - 1),
    )


@triton.jit
def _count(p_thresholds, delta, BUCKETS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The bucket of a scalar delta: how many of the BUCKETS − 1 thresholds are <= delta."""
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BUCKETS - 1
    return tl.sum((m_b & (tl.load(p_thresholds + o_b, mask=m_b, other=0) <= delta)).to(tl.int32), axis=0)


@triton.jit
def _add_bias(logits, delta, p_thresholds, p_row, first, last):
    """logits + log2(e)·row[bucket(delta)], where every bucket of the tile is in first … last."""
    bias = tl.zeros_like(logits) + tl.load(p_row + first)
    for bucket in range(first, last):
        bias = tl.where(delta >= tl.load(p_thresholds + bucket), tl.load(p_row + bucket + 1), bias)
    return logits + bias * LOG2E


@triton.jit
def _add_sums(sums, d_logits, delta, p_thresholds, first, last, BLOCK_B: tl.constexpr):
    """sums [BLOCK_B] + the sum of d_logits in each bucket first … last of the tile."""
    o_b = tl.arange(0, BLOCK_B)
    rest = d_logits
    for bucket in range(first, last):
        above = delta >= tl.load(p_thresholds + bucket)
        sums += tl.where(o_b == bucket, tl.sum(tl.sum(tl.where(above, 0.0, rest), axis=1), axis=0), 0.0)
        rest = tl.where(above, rest, 0.0)
    return sums + tl.where(o_b == last, tl.sum(tl.sum(rest, axis=1), axis=0), 0.0)


@triton.jit
def _sequence(p_q_offsets, p_k_offsets, i_sequence):
    """(first row of q, rows of q, first row of k, rows of k) of a sequence."""
    q_begin = tl.load(p_q_offsets + i_sequence).to(tl.int64)
    k_begin = tl.load(p_k_offsets + i_sequence).to(tl.int64)
    n_q = (tl.load(p_q_offsets + i_sequence + 1).to(tl.int64) - q_begin).to(tl.int32)
    n_k = (tl.load(p_k_offsets + i_sequence + 1).to(tl.int64) - k_begin).to(tl.int32)
    return q_begin, n_q, k_begin, n_k


@triton.jit
def _visible(distance, m_q, m_k, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Pairs within both sequences and the window; distance = i − j. Causal is a right window of 0."""
    visible = m_q[:, None] & m_k[None, :]
    if LEFT:
        visible = visible & (distance <= window_left)
    if RIGHT:
        visible = visible & (distance >= -window_right)
    return visible


@triton.jit
def _store_rows(p_x, x, o_row, m_row, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    p = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p, x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_q_offsets,
    p_k_offsets,
    p_tile_sequence,
    p_tile_start,
    p_q_time,
    p_k_time,
    p_time_thresholds,
    p_time_table,
    p_position_thresholds,
    p_position_table,
    p_q_cyclic,
    p_k_cyclic,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    total_q,
    scale,
    window_left,
    window_right,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_begin, n_q, k_begin, n_k = _sequence(p_q_offsets, p_k_offsets, tl.load(p_tile_sequence + i_tile))
    shift = n_k - n_q
    p_q += q_begin * stride_q + i_head * stride_qh
    p_k += k_begin * stride_k + i_head * stride_kh
    p_v += k_begin * stride_v + i_head * stride_vh
    p_lse += i_head * total_q + q_begin
    if TIME_BUCKETS > 0:
        p_q_time += q_begin
        p_k_time += k_begin
        p_time_table += i_head * TIME_BUCKETS
    if POSITION_BUCKETS > 0:
        p_position_table += i_head * POSITION_BUCKETS
    if CHANNELS > 0:
        p_q_cyclic += (q_begin * HEADS + i_head) * CHANNELS
        p_k_cyclic += k_begin * CHANNELS
    p_out += (q_begin * HEADS + i_head) * HEAD_DIM

    row = tl.load(p_tile_start + i_tile)
    o_m = row + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    b_q = _load_rows(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, DOT)
    if CHANNELS > 0:
        b_qc = _load_rows(p_q_cyclic, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, tl.float32)
    if TIME_BUCKETS > 0:
        b_qt, qt_first, qt_last = _load_times(p_q_time, row, o_m, m_m, n_q, BLOCK_M)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = 0
    end = n_k
    if LEFT:
        begin = tl.maximum(0, row + shift - window_left)
    if RIGHT:
        end = tl.minimum(n_k, row + BLOCK_M + shift + window_right)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < n_k
        b_k = _load_rows(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, DOT)
        b_v = _load_rows(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, DOT)
        if CHANNELS > 0:
            b_kc = _load_rows(p_k_cyclic, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, tl.float32)
        if TIME_BUCKETS > 0:
            b_kt, kt_first, kt_last = _load_times(p_k_time, start, o_n, m_n, n_k, BLOCK_N)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        if CHANNELS > 0:
            logits += tl.dot(b_qc, tl.trans(b_kc), input_precision=PRECISION) * LOG2E
        if TIME_BUCKETS > 0:
            elapsed = b_qt[:, None] - b_kt[None, :]
            t_first = _count(p_time_thresholds, qt_first - kt_last, TIME_BUCKETS, BLOCK_T)
            t_last = _count(p_time_thresholds, qt_last - kt_first, TIME_BUCKETS, BLOCK_T)
            logits = _add_bias(logits, elapsed, p_time_thresholds, p_time_table, t_first, t_last)
        distance = (o_m + shift)[:, None] - o_n[None, :]
        if POSITION_BUCKETS > 0:
            p_first = _count(p_position_thresholds, row + shift - start - BLOCK_N + 1, POSITION_BUCKETS, BLOCK_P)
            p_last = _count(p_position_thresholds, row + BLOCK_M - 1 + shift - start, POSITION_BUCKETS, BLOCK_P)
            logits = _add_bias(logits, distance, p_position_thresholds, p_position_table, p_first, p_last)
        visible = _visible(distance, m_m, m_n, window_left, window_right, LEFT, RIGHT)
        logits = tl.where(visible, logits, float("-inf"))
        new = tl.maximum(maximum, tl.max(logits, axis=1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet: 0, not −inf − (−inf)
        weights = tl.exp2(logits - finite[:, None])
        decay = tl.exp2(maximum - finite)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(DOT), b_v, input_precision=PRECISION)
        maximum = new

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    _store_rows(p_out, acc / total[:, None], o_m, m_m, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    lse = tl.where(seen, (maximum + tl.log2(total)) * LN2, float("-inf"))
    tl.store(p_lse + o_m, lse, mask=m_m)


@triton.jit
def _backward_q_kernel(
    p_q,
    p_k,
    p_v,
    p_grad_out,
    p_lse,
    p_delta,
    p_dq,
    p_d_q_cyclic,
    p_time_sums,
    p_position_sums,
    p_q_offsets,
    p_k_offsets,
    p_tile_sequence,
    p_tile_start,
    p_q_time,
    p_k_time,
    p_time_thresholds,
    p_time_table,
    p_position_thresholds,
    p_position_table,
    p_q_cyclic,
    p_k_cyclic,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    stride_g,
    stride_gh,
    total_q,
    scale,
    window_left,
    window_right,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_begin, n_q, k_begin, n_k = _sequence(p_q_offsets, p_k_offsets, tl.load(p_tile_sequence + i_tile))
    shift = n_k - n_q
    p_q += q_begin * stride_q + i_head * stride_qh
    p_k += k_begin * stride_k + i_head * stride_kh
    p_v += k_begin * stride_v + i_head * stride_vh
    p_lse += i_head * total_q + q_begin
    p_delta += i_head * total_q + q_begin
    p_grad_out += q_begin * stride_g + i_head * stride_gh
    if TIME_BUCKETS > 0:
        p_q_time += q_begin
        p_k_time += k_begin
        p_time_table += i_head * TIME_BUCKETS
    if POSITION_BUCKETS > 0:
        p_position_table += i_head * POSITION_BUCKETS
    if CHANNELS > 0:
        p_q_cyclic += (q_begin * HEADS + i_head) * CHANNELS
        p_k_cyclic += k_begin * CHANNELS
    p_dq += (q_begin * HEADS + i_head) * HEAD_DIM

    row = tl.load(p_tile_start + i_tile)
    o_m = row + tl.arange(0, BLOCK_M)
    m_m = o_m < n_q
    b_q = _load_rows(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, DOT)
    if CHANNELS > 0:
        b_qc = _load_rows(p_q_cyclic, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, tl.float32)
    if TIME_BUCKETS > 0:
        b_qt, qt_first, qt_last = _load_times(p_q_time, row, o_m, m_m, n_q, BLOCK_M)
    b_do = _load_rows(p_grad_out, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, DOT)
    lse = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2E
    delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CHANNELS > 0:
        d_qc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if TIME_BUCKETS > 0:
        time_sums = tl.zeros([BLOCK_T], tl.float32)
    if POSITION_BUCKETS > 0:
        position_sums = tl.zeros([BLOCK_P], tl.float32)
    begin = 0
    end = n_k
    if LEFT:
        begin = tl.maximum(0, row + shift - window_left)
    if RIGHT:
        end = tl.minimum(n_k, row + BLOCK_M + shift + window_right)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < n_k
        b_k = _load_rows(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, DOT)
        b_v = _load_rows(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, DOT)
        if CHANNELS > 0:
            b_kc = _load_rows(p_k_cyclic, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, tl.float32)
        if TIME_BUCKETS > 0:
            b_kt, kt_first, kt_last = _load_times(p_k_time, start, o_n, m_n, n_k, BLOCK_N)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        if CHANNELS > 0:
            logits += tl.dot(b_qc, tl.trans(b_kc), input_precision=PRECISION) * LOG2E
        if TIME_BUCKETS > 0:
            elapsed = b_qt[:, None] - b_kt[None, :]
            t_first = _count(p_time_thresholds, qt_first - kt_last, TIME_BUCKETS, BLOCK_T)
            t_last = _count(p_time_thresholds, qt_last - kt_first, TIME_BUCKETS, BLOCK_T)
            logits = _add_bias(logits, elapsed, p_time_thresholds, p_time_table, t_first, t_last)
        distance = (o_m + shift)[:, None] - o_n[None, :]
        if POSITION_BUCKETS > 0:
            p_first = _count(p_position_thresholds, row + shift - start - BLOCK_N + 1, POSITION_BUCKETS, BLOCK_P)
            p_last = _count(p_position_thresholds, row + BLOCK_M - 1 + shift - start, POSITION_BUCKETS, BLOCK_P)
            logits = _add_bias(logits, distance, p_position_thresholds, p_position_table, p_first, p_last)
        visible = _visible(distance, m_m, m_n, window_left, window_right, LEFT, RIGHT)
        weights = tl.where(visible, tl.exp2(logits - lse[:, None]), 0.0)
        d_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        d_logits = weights * (d_weights - delta[:, None])
        if TIME_BUCKETS > 0:
            time_sums = _add_sums(time_sums, d_logits, elapsed, p_time_thresholds, t_first, t_last, BLOCK_T)
        if POSITION_BUCKETS > 0:
            position_sums = _add_sums(
                position_sums, d_logits, distance, p_position_thresholds, p_first, p_last, BLOCK_P
            )
        if CHANNELS > 0:
            d_qc += tl.dot(d_logits, b_kc, input_precision=PRECISION)
        dq += tl.dot(d_logits.to(DOT), b_k, input_precision=PRECISION)

    _store_rows(p_dq, dq * scale, o_m, m_m, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if CHANNELS > 0:
        p_d_q_cyclic += (q_begin * HEADS + i_head) * CHANNELS
        _store_rows(p_d_q_cyclic, d_qc, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C)
    i_program = i_tile.to(tl.int64) * HEADS + i_head
    if TIME_BUCKETS > 0:
        o_b = tl.arange(0, BLOCK_T)
        tl.store(p_time_sums + i_program * TIME_BUCKETS + o_b, time_sums, mask=o_b < TIME_BUCKETS)
    if POSITION_BUCKETS > 0:
        o_b = tl.arange(0, BLOCK_P)
        tl.store(p_position_sums + i_program * POSITION_BUCKETS + o_b, position_sums, mask=o_b < POSITION_BUCKETS)


@triton.jit
def _backward_kv_kernel(
    p_q,
    p_k,
    p_v,
    p_grad_out,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_d_k_cyclic,
    p_q_offsets,
    p_k_offsets,
    p_tile_sequence,
    p_tile_start,
    p_q_time,
    p_k_time,
    p_time_thresholds,
    p_time_table,
    p_position_thresholds,
    p_position_table,
    p_q_cyclic,
    p_k_cyclic,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    stride_g,
    stride_gh,
    total_q,
    scale,
    window_left,
    window_right,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_begin, n_q, k_begin, n_k = _sequence(p_q_offsets, p_k_offsets, tl.load(p_tile_sequence + i_tile))
    shift = n_k - n_q
    p_q += q_begin * stride_q + i_head * stride_qh
    p_k += k_begin * stride_k + i_head * stride_kh
    p_v += k_begin * stride_v + i_head * stride_vh
    p_lse += i_head * total_q + q_begin
    p_delta += i_head * total_q + q_begin
    p_grad_out += q_begin * stride_g + i_head * stride_gh
    if TIME_BUCKETS > 0:
        p_q_time += q_begin
        p_k_time += k_begin
        p_time_table += i_head * TIME_BUCKETS
    if POSITION_BUCKETS > 0:
        p_position_table += i_head * POSITION_BUCKETS
    if CHANNELS > 0:
        p_q_cyclic += (q_begin * HEADS + i_head) * CHANNELS
        p_k_cyclic += k_begin * CHANNELS
    p_dk += (k_begin * HEADS + i_head) * HEAD_DIM
    p_dv += (k_begin * HEADS + i_head) * HEAD_DIM

    start = tl.load(p_tile_start + i_tile)
    o_n = start + tl.arange(0, BLOCK_N)
    m_n = o_n < n_k
    b_k = _load_rows(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, DOT)
    b_v = _load_rows(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, DOT)
    if CHANNELS > 0:
        b_kc = _load_rows(p_k_cyclic, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, tl.float32)
    if TIME_BUCKETS > 0:
        b_kt, kt_first, kt_last = _load_times(p_k_time, start, o_n, m_n, n_k, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if CHANNELS > 0:
        d_kc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    begin = 0
    end = n_q
    if RIGHT:
        begin = tl.maximum(0, start - shift - window_right)
    if LEFT:
        end = tl.minimum(n_q, start + BLOCK_N - shift + window_left)
    for row in range(begin, end, BLOCK_M):
        o_m = row + tl.arange(0, BLOCK_M)
        m_m = o_m < n_q
        b_q = _load_rows(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, DOT)
        if CHANNELS > 0:
            b_qc = _load_rows(p_q_cyclic, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, tl.float32)
        if TIME_BUCKETS > 0:
            b_qt, qt_first, qt_last = _load_times(p_q_time, row, o_m, m_m, n_q, BLOCK_M)
        b_do = _load_rows(p_grad_out, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, DOT)
        lse = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2E
        delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        if CHANNELS > 0:
            logits += tl.dot(b_qc, tl.trans(b_kc), input_precision=PRECISION) * LOG2E
        if TIME_BUCKETS > 0:
            elapsed = b_qt[:, None] - b_kt[None, :]
            t_first = _count(p_time_thresholds, qt_first - kt_last, TIME_BUCKETS, BLOCK_T)
            t_last = _count(p_time_thresholds, qt_last - kt_first, TIME_BUCKETS, BLOCK_T)
            logits = _add_bias(logits, elapsed, p_time_thresholds, p_time_table, t_first, t_last)
        distance = (o_m + shift)[:, None] - o_n[None, :]
        if POSITION_BUCKETS > 0:
            p_first = _count(p_position_thresholds, row + shift - start - BLOCK_N + 1, POSITION_BUCKETS, BLOCK_P)
            p_last = _count(p_position_thresholds, row + BLOCK_M - 1 + shift - start, POSITION_BUCKETS, BLOCK_P)
            logits = _add_bias(logits, distance, p_position_thresholds, p_position_table, p_first, p_last)
        visible = _visible(distance, m_m, m_n, window_left, window_right, LEFT, RIGHT)
        weights = tl.where(visible, tl.exp2(logits - lse[:, None]), 0.0)
        d_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        d_logits = weights * (d_weights - delta[:, None])
        dv += tl.dot(tl.trans(weights.to(DOT)), b_do, input_precision=PRECISION)
        if CHANNELS > 0:
            d_kc += tl.dot(tl.trans(d_logits), b_qc, input_precision=PRECISION)
        dk += tl.dot(tl.trans(d_logits.to(DOT)), b_q, input_precision=PRECISION)

    _store_rows(p_dk, dk * scale, o_n, m_n, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    _store_rows(p_dv, dv, o_n, m_n, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if CHANNELS > 0:  # k_cyclic is shared by the heads: [Tk, H, C], added up by the launcher
        p_d_k_cyclic += (k_begin * HEADS + i_head) * CHANNELS
        _store_rows(p_d_k_cyclic, d_kc, o_n, m_n, HEADS * CHANNELS, CHANNELS, BLOCK_C)


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
    total_q, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    if total_q == 0:
        return out, lse
    config = _configs(q)[0]
    q, k, v = _rows(q), _rows(k), _rows(v)
    times = _rebase(q_timestamps, k_timestamps, q_offsets, k_offsets, time_thresholds)
    sequences, starts = tile_list(q_offsets, config.block_m)
    with _device(q):
        _forward_kernel[(sequences.numel(), num_heads)](
            q,
            k,
            v,
            out,
            lse,
            q_offsets,
            k_offsets,
            sequences,
            starts,
            *_bias_arguments(times, time_table, position_thresholds, position_table, q_cyclic, k_cyclic, q),
            *_strides(q, k, v),
            total_q,
            scale,
            *_window(causal, window_left, window_right),
            **_constants(q, time_table, position_table, q_cyclic, causal, window_left, window_right),
            **_launch(config),
        )
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
    total_q, num_heads, _ = q.shape
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    delta = (grad_out.float() * out.float()).sum(-1).t().contiguous()  # [H, Tq]
    _, config_q, config_kv = _configs(q)
    times = _rebase(q_timestamps, k_timestamps, q_offsets, k_offsets, time_thresholds)
    q_sequences, q_starts = tile_list(q_offsets, config_q.block_m)
    k_sequences, k_starts = tile_list(k_offsets, config_kv.block_n)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_q_cyclic = None if q_cyclic is None else torch.empty_like(q_cyclic)
    d_k_cyclic = None if k_cyclic is None else k_cyclic.new_empty((k.shape[0], num_heads, k_cyclic.shape[1]))
    time_sums, position_sums = (
        None if table is None else table.new_empty((q_sequences.numel(), *table.shape))
        for table in (time_table, position_table)
    )
    bias = _bias_arguments(times, time_table, position_thresholds, position_table, q_cyclic, k_cyclic, q)
    scalars = (*_strides(q, k, v, grad_out), total_q, scale, *_window(causal, window_left, window_right))
    constants = _constants(q, time_table, position_table, q_cyclic, causal, window_left, window_right)
    with _device(q):
        if q_sequences.numel():
            _backward_q_kernel[(q_sequences.numel(), num_heads)](
                q,
                k,
                v,
                grad_out,
                lse,
                delta,
                dq,
                q if d_q_cyclic is None else d_q_cyclic,
                q if time_sums is None else time_sums,
                q if position_sums is None else position_sums,
                q_offsets,
                k_offsets,
                q_sequences,
                q_starts,
                *bias,
                *scalars,
                **constants,
                **_launch(config_q),
            )
        if k_sequences.numel():
            _backward_kv_kernel[(k_sequences.numel(), num_heads)](
                q,
                k,
                v,
                grad_out,
                lse,
                delta,
                dk,
                dv,
                q if d_k_cyclic is None else d_k_cyclic,
                q_offsets,
                k_offsets,
                k_sequences,
                k_starts,
                *bias,
                *scalars,
                **constants,
                **_launch(config_kv),
            )
    return (
        dq,
        dk,
        dv,
        None if time_sums is None else time_sums.sum(0),
        None if position_sums is None else position_sums.sum(0),
        d_q_cyclic,
        None if d_k_cyclic is None else d_k_cyclic.sum(1),
    )


def _rows(x: Tensor) -> Tensor:
    """x with contiguous channels; rows and heads may lie anywhere."""
    return x if x.stride(2) == 1 else x.contiguous()


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rebase(
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(q times, k times, thresholds): int32 seconds since each sequence's first event where all spans fit, else int64.

    With every difference within ±(2**31 − 2), thresholds beyond it mean the same when cut to ±(2**31 − 1).
    """
    if q_timestamps is None or k_timestamps is None or thresholds is None:
        return None
    limit = 2**31 - 1
    bounds = torch.iinfo(torch.int64)
    first = torch.full((q_offsets.numel() - 1,), bounds.max, dtype=torch.int64, device=q_offsets.device)
    last = torch.full_like(first, bounds.min)
    for times, offsets in ((q_timestamps, q_offsets), (k_timestamps, k_offsets)):
        begin, end = offsets[:-1].to(torch.int64), offsets[1:].to(torch.int64)
        (filled,) = (end > begin).nonzero(as_tuple=True)
        first[filled] = torch.minimum(first[filled], times[begin[filled]])
        last[filled] = torch.maximum(last[filled], times[end[filled] - 1])
    spans = (last - first)[last >= first]
    if spans.numel() == 0 or int(spans.max()) >= limit:
        return q_timestamps.contiguous(), k_timestamps.contiguous(), thresholds.contiguous()
    q_times, k_times = (
        (times - first[segment_ids(offsets, times.numel())]).to(torch.int32)
        for times, offsets in ((q_timestamps, q_offsets), (k_timestamps, k_offsets))
    )
    return q_times, k_times, thresholds.clamp(-limit, limit).to(torch.int32)


def _bias_arguments(
    times: tuple[Tensor, Tensor, Tensor] | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    absent: Tensor,
) -> list[Tensor]:
    """The eight tensors of the biases in the kernels' order; `absent` stands for what is never read."""
    if position_thresholds is not None:  # positions fit int32, so thresholds beyond it can be cut to it
        position_thresholds = position_thresholds.clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)
    found = (*(times or (None, None, None)), time_table, position_thresholds, position_table, q_cyclic, k_cyclic)
    return [absent if x is None else x.contiguous() for x in found]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _window(causal: bool, left: int, right: int) -> tuple[int, int]:
    """Both limits within int32; causal is a right window of 0. A limit of −1 is not read."""
    longest = 2**30
    return min(left, longest), 0 if causal else min(right, longest)


def _constants(
    q: Tensor,
    time_table: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
) -> dict[str, object]:
    time_buckets = 0 if time_table is None else time_table.shape[1]
    position_buckets = 0 if position_table is None else position_table.shape[1]
    channels = 0 if q_cyclic is None else q_cyclic.shape[2]
    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {
        "HEADS": q.shape[1],
        "HEAD_DIM": q.shape[2],
        "TIME_BUCKETS": time_buckets,
        "POSITION_BUCKETS": position_buckets,
        "CHANNELS": channels,
        "LEFT": window_left >= 0,
        "RIGHT": causal or window_right >= 0,
        "DOT": tl.float32 if triton_interprets() else dtypes[q.dtype],  # the interpreter's bfloat16 dot is wrong
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "BLOCK_D": _block(q.shape[2], 16),
        "BLOCK_T": _block(time_buckets, 16),
        "BLOCK_P": _block(position_buckets, 16),
        "BLOCK_C": _block(channels, 16),
    }


def _block(size: int, smallest: int) -> int:
    return max(smallest, triton.next_power_of_2(size))


def _configs(q: Tensor) -> tuple[Config, Config, Config]:
    configs = FLOAT_CONFIGS if q.dtype == torch.float32 else HALF_CONFIGS
    return configs[_block(q.shape[2], 16)]


def _launch(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _ahead_of_time() -> list[tuple[object, dict[str, str], dict[str, object], dict[str, int]]]:
    """Full bias at every padded head_dim in bf16, the middle ones in fp32, and one case without bias."""
    cases = []
    for dtype, head_dims in (("bf16", HALF_CONFIGS), ("fp32", FLOAT_CONFIGS)):
        configs = HALF_CONFIGS if dtype == "bf16" else FLOAT_CONFIGS
        for head_dim in head_dims:
            for kernel, config in zip((_forward_kernel, _backward_q_kernel, _backward_kv_kernel), configs[head_dim]):
                cases.append(_case(kernel, config, dtype, head_dim))
    return cases


def _case(kernel, config: Config, dtype: str, head_dim: int):
    pointers = {
        "p_q_offsets": "*i64:16",
        "p_k_offsets": "*i64:16",
        "p_tile_sequence": "*i32:16",
        "p_tile_start": "*i32:16",
        "p_q_time": "*i32:16",
        "p_k_time": "*i32:16",
        "p_time_thresholds": "*i32:16",
        "p_position_thresholds": "*i32:16",
    }
    low = {"p_q", "p_k", "p_v", "p_out", "p_grad_out", "p_dq", "p_dk", "p_dv"}
    constants = {
        "HEADS": 4,
        "HEAD_DIM": head_dim,
        "TIME_BUCKETS": 107,
        "POSITION_BUCKETS": 55,
        "CHANNELS": 4,
        "LEFT": True,
        "RIGHT": True,
        "DOT": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "BLOCK_D": head_dim,
        "BLOCK_T": 128,
        "BLOCK_P": 64,
        "BLOCK_C": 16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    signature = {}
    for name in kernel.arg_names:
        if name in pointers:
            signature[name] = pointers[name]
        elif name.startswith("p_"):
            signature[name] = f"*{dtype if name in low else 'fp32'}:16"
        elif name == "scale":
            signature[name] = "fp32"
        elif name not in constants:
            signature[name] = "i32:16" if name.startswith("stride") else "i32"
    return kernel, signature, constants, {"num_warps": config.num_warps, "num_stages": config.num_stages}


AHEAD_OF_TIME = _ahead_of_time()
