"""The forward kernel of jagged attention: a program makes the output and lse of one tile of queries of one head.

Shapes and dtypes as in kernel.py; p_tile_sequence, p_tile_start int32 [tiles] are the tiles of the queries.
"""

import triton
import triton.language as tl

from alure.kernels.attention.kernel_tiles import (
    LN2,
    LOG2E,
    add_bias,
    bucket_of,
    load_rows,
    load_times,
    sequence,
    store_rows,
    visible_pairs,
)


@triton.jit
def forward_kernel(
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
    q_begin, n_q, k_begin, n_k = sequence(p_q_offsets, p_k_offsets, tl.load(p_tile_sequence + i_tile))
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
    b_q = load_rows(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, DOT)
    if CHANNELS > 0:
        b_qc = load_rows(p_q_cyclic, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, tl.float32)
    if TIME_BUCKETS > 0:
        b_qt, qt_first, qt_last = load_times(p_q_time, row, o_m, m_m, n_q, BLOCK_M)
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
        b_k = load_rows(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, DOT)
        b_v = load_rows(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, DOT)
        if CHANNELS > 0:
            b_kc = load_rows(p_k_cyclic, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, tl.float32)
        if TIME_BUCKETS > 0:
            b_kt, kt_first, kt_last = load_times(p_k_time, start, o_n, m_n, n_k, BLOCK_N)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        if CHANNELS > 0:
            logits += tl.dot(b_qc, tl.trans(b_kc), input_precision=PRECISION) * LOG2E
        if TIME_BUCKETS > 0:
            elapsed = b_qt[:, None] - b_kt[None, :]
            t_first = bucket_of(p_time_thresholds, qt_first - kt_last, TIME_BUCKETS, BLOCK_T)
            t_last = bucket_of(p_time_thresholds, qt_last - kt_first, TIME_BUCKETS, BLOCK_T)
            logits = add_bias(logits, elapsed, p_time_thresholds, p_time_table, t_first, t_last)
        distance = (o_m + shift)[:, None] - o_n[None, :]
        if POSITION_BUCKETS > 0:
            p_first = bucket_of(p_position_thresholds, row + shift - start - BLOCK_N + 1, POSITION_BUCKETS, BLOCK_P)
            p_last = bucket_of(p_position_thresholds, row + BLOCK_M - 1 + shift - start, POSITION_BUCKETS, BLOCK_P)
            logits = add_bias(logits, distance, p_position_thresholds, p_position_table, p_first, p_last)
        visible = visible_pairs(distance, m_m, m_n, window_left, window_right, LEFT, RIGHT)
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
    store_rows(p_out, acc / total[:, None], o_m, m_m, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    lse = tl.where(seen, (maximum + tl.log2(total)) * LN2, float("-inf"))
    tl.store(p_lse + o_m, lse, mask=m_m)
