"""The backward kernels of jagged attention; both compute the weights again from lse.

`backward_q_kernel` makes dq, d_q_cyclic and the tables' sums of one tile of queries, `backward_kv_kernel` dk, dv and
d_k_cyclic of one tile of keys. Shapes and dtypes as in kernel.py; p_delta float32 [H, Tq] is Σ out·grad_out;
p_time_sums, p_position_sums float32 [tiles, H, buckets]; p_d_k_cyclic float32 [Tk, H, C].
"""

import triton
import triton.language as tl

from alure.kernels.attention.kernel_tiles import (
    LOG2E,
    add_bias,
    add_sums,
    bucket_of,
    load_rows,
    load_times,
    sequence,
    store_rows,
    visible_pairs,
)


@triton.jit
def backward_q_kernel(
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
    q_begin, n_q, k_begin, n_k = sequence(p_q_offsets, p_k_offsets, tl.load(p_tile_sequence + i_tile))
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
    b_q = load_rows(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, DOT)
    if CHANNELS > 0:
        b_qc = load_rows(p_q_cyclic, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, tl.float32)
    if TIME_BUCKETS > 0:
        b_qt, qt_first, qt_last = load_times(p_q_time, row, o_m, m_m, n_q, BLOCK_M)
    b_do = load_rows(p_grad_out, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, DOT)
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
        weights = tl.where(visible, tl.exp2(logits - lse[:, None]), 0.0)
        d_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        d_logits = weights * (d_weights - delta[:, None])
        if TIME_BUCKETS > 0:
            time_sums = add_sums(time_sums, d_logits, elapsed, p_time_thresholds, t_first, t_last, BLOCK_T)
        if POSITION_BUCKETS > 0:
            position_sums = add_sums(position_sums, d_logits, distance, p_position_thresholds, p_first, p_last, BLOCK_P)
        if CHANNELS > 0:
            d_qc += tl.dot(d_logits, b_kc, input_precision=PRECISION)
        dq += tl.dot(d_logits.to(DOT), b_k, input_precision=PRECISION)

    store_rows(p_dq, dq * scale, o_m, m_m, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if CHANNELS > 0:
        p_d_q_cyclic += (q_begin * HEADS + i_head) * CHANNELS
        store_rows(p_d_q_cyclic, d_qc, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C)
    i_program = i_tile.to(tl.int64) * HEADS + i_head
    if TIME_BUCKETS > 0:
        o_b = tl.arange(0, BLOCK_T)
        tl.store(p_time_sums + i_program * TIME_BUCKETS + o_b, time_sums, mask=o_b < TIME_BUCKETS)
    if POSITION_BUCKETS > 0:
        o_b = tl.arange(0, BLOCK_P)
        tl.store(p_position_sums + i_program * POSITION_BUCKETS + o_b, position_sums, mask=o_b < POSITION_BUCKETS)


@triton.jit
def backward_kv_kernel(
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
    q_begin, n_q, k_begin, n_k = sequence(p_q_offsets, p_k_offsets, tl.load(p_tile_sequence + i_tile))
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
    b_k = load_rows(p_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, DOT)
    b_v = load_rows(p_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, DOT)
    if CHANNELS > 0:
        b_kc = load_rows(p_k_cyclic, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, tl.float32)
    if TIME_BUCKETS > 0:
        b_kt, kt_first, kt_last = load_times(p_k_time, start, o_n, m_n, n_k, BLOCK_N)
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
        b_q = load_rows(p_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, DOT)
        if CHANNELS > 0:
            b_qc = load_rows(p_q_cyclic, o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, tl.float32)
        if TIME_BUCKETS > 0:
            b_qt, qt_first, qt_last = load_times(p_q_time, row, o_m, m_m, n_q, BLOCK_M)
        b_do = load_rows(p_grad_out, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, DOT)
        lse = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2E
        delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
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
        weights = tl.where(visible, tl.exp2(logits - lse[:, None]), 0.0)
        d_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        d_logits = weights * (d_weights - delta[:, None])
        dv += tl.dot(tl.trans(weights.to(DOT)), b_do, input_precision=PRECISION)
        if CHANNELS > 0:
            d_kc += tl.dot(tl.trans(d_logits), b_qc, input_precision=PRECISION)
        dk += tl.dot(tl.trans(d_logits.to(DOT)), b_q, input_precision=PRECISION)

    store_rows(p_dk, dk * scale, o_n, m_n, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_rows(p_dv, dv, o_n, m_n, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if CHANNELS > 0:  # k_cyclic is shared by the heads: [Tk, H, C], added up by the launcher
        p_d_k_cyclic += (k_begin * HEADS + i_head) * CHANNELS
        store_rows(p_d_k_cyclic, d_kc, o_n, m_n, HEADS * CHANNELS, CHANNELS, BLOCK_C)
