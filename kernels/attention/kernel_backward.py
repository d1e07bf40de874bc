"""The backward kernels of jagged attention; both compute the weights again from lse.

`backward_q_kernel` makes dq, d_q_cyclic and the tables' sums of tiles of queries, `backward_kv_kernel` dk, dv and
d_k_cyclic of tiles of keys, from turned logits, [keys, queries]: so each product finds its left side in registers.
Shapes and dtypes as in kernel.py; p_time_sums, p_position_sums float32 [tiles, H, 2, buckets] and p_crossings int32
[Tq, BLOCK_T] as in kernel_tiles.py; p_d_k_cyclic float32 [Tk, Hk, C]; p_lse by log 2, +inf where no key is seen.
"""

import triton
import triton.language as tl

from alure.kernels.attention.kernel_tiles import (
    CELLS,
    CHUNK,
    ENDS,
    FEW,
    GENERAL,
    LOG2E,
    MANY,
    PAIR,
    SEVERAL,
    TILE,
    UNIFORM,
    add_sums,
    load_rows,
    load_times,
    pair_bias,
    places,
    read_pair,
    step_bias,
    store_rows,
    store_sums,
    visible_keys,
    visible_queries,
)


@triton.jit(do_not_specialize=["total_q"])
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
    p_crossings,
    p_tiles,
    p_pairs,
    p_q_time,
    p_k_time,
    p_time_thresholds,
    p_time_cells,
    p_time_values,
    p_time_table,
    p_position_thresholds,
    p_position_cells,
    p_position_values,
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
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RULES: tl.constexpr,
    TIME_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i_work = tl.program_id(0)
    i_head = tl.cast(i_work % HEADS, tl.int64)
    i_tile = i_work // HEADS
    p_tile = p_tiles + i_tile * TILE
    q_begin, k_begin = tl.load(p_tile), tl.load(p_tile + 2)
    n_q, n_k, row = tl.load(p_tile + 1).to(tl.int32), tl.load(p_tile + 3).to(tl.int32), tl.load(p_tile + 4).to(tl.int32)
    left, right = tl.load(p_tile + 5).to(tl.int32), tl.load(p_tile + 6).to(tl.int32)
    contexts, history = tl.load(p_tile + 7).to(tl.int32), tl.load(p_tile + 8).to(tl.int32)
    rules = (left, right, contexts, history, n_k)
    i_table = tl.load(p_tile + 9) * HEADS + i_head
    i_kv = i_head // (HEADS // KV_HEADS)

    first = q_begin + row
    o_row = tl.arange(0, BLOCK_M)
    m_row = row + o_row < n_q
    p_row, p_g = p_q + first * stride_q + i_head * stride_qh, p_grad_out + first * stride_g + i_head * stride_gh
    b_q = load_rows(p_row, o_row, m_row, stride_q, HEAD_DIM, BLOCK_D, True).to(DOT)
    b_do = load_rows(p_g, o_row, m_row, stride_g, HEAD_DIM, BLOCK_D, True).to(DOT)
    o_lse = i_head * total_q + first
    lse = tl.load(p_lse + o_lse + o_row, mask=m_row, other=float("inf"))  # no weight beyond the sequence
    delta = tl.load(p_delta + o_lse + o_row, mask=m_row, other=0.0)
    b_qc = b_q
    if CHANNELS > 0:
        p_qc = p_q_cyclic + (first * HEADS + i_head) * CHANNELS
        b_qc = load_rows(p_qc, o_row, m_row, HEADS * CHANNELS, CHANNELS, BLOCK_C, True) * (1 / scale)
    q_time = o_row
    if TIME_BUCKETS > 0:
        q_time = tl.load(p_q_time + first + o_row, mask=m_row, other=0)
    i = row + o_row + n_k - n_q

    queries = (b_q, b_do, b_qc, lse, delta, q_time, i, p_crossings + first * BLOCK_T, m_row)
    keys = (
        p_k + k_begin * stride_k + i_kv * stride_kh,
        p_v + k_begin * stride_v + i_kv * stride_vh,
        p_k_time + k_begin,
        p_k_cyclic + k_begin * CHANNELS,
        stride_k,
        stride_v,
    )
    p_time_row, p_position_row = p_time_table + i_table * TIME_BUCKETS, p_position_table + i_table * POSITION_BUCKETS
    p_time_cell, p_position_cell = p_time_values + i_table * CELLS, p_position_values + i_table * CELLS
    time = (p_time_thresholds, p_time_cells, p_time_cell, p_time_row, TIME_BUCKETS)
    position = (p_position_thresholds, p_position_cells, p_position_cell, p_position_row, POSITION_BUCKETS)
    problem = (queries, keys, time, position, rules, p_pairs, p_tile + ENDS, scale)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_qc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    no_time = tl.zeros([BLOCK_T // CHUNK, CHUNK], tl.float32)
    no_position = tl.zeros([BLOCK_P // CHUNK, CHUNK], tl.float32)
    state = (dq, d_qc, (no_time, no_time), (no_position, no_position))
    state = attend_keys(  # loop: uniform
        state,
        problem,
        HEAD_DIM,
        TIME_BUCKETS,
        POSITION_BUCKETS,
        CHANNELS,
        RULES,
        TIME_STEPS,
        POSITION_STEPS,
        DOT,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_C,
        BLOCK_T,
        BLOCK_P,
        UNIFORM,
        WHOLE,
    )
    if TIME_BUCKETS + POSITION_BUCKETS > 0:
        state = attend_keys(  # loop: few
            state,
            problem,
            HEAD_DIM,
            TIME_BUCKETS,
            POSITION_BUCKETS,
            CHANNELS,
            RULES,
            TIME_STEPS,
            POSITION_STEPS,
            DOT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_C,
            BLOCK_T,
            BLOCK_P,
            FEW,
            WHOLE,
        )
        state = attend_keys(  # loop: several
            state,
            problem,
            HEAD_DIM,
            TIME_BUCKETS,
            POSITION_BUCKETS,
            CHANNELS,
            RULES,
            TIME_STEPS,
            POSITION_STEPS,
            DOT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_C,
            BLOCK_T,
            BLOCK_P,
            SEVERAL,
            WHOLE,
        )
    state = attend_keys(  # loop: general
        state,
        problem,
        HEAD_DIM,
        TIME_BUCKETS,
        POSITION_BUCKETS,
        CHANNELS,
        RULES,
        TIME_STEPS,
        POSITION_STEPS,
        DOT,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_C,
        BLOCK_T,
        BLOCK_P,
        GENERAL,
        WHOLE,
    )
    dq, d_qc, time_sums, position_sums = state

    p_row = p_dq + (first * HEADS + i_head) * HEAD_DIM
    store_rows(p_row, dq * scale, o_row, m_row, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if CHANNELS > 0:
        p_qc = p_d_q_cyclic + (first * HEADS + i_head) * CHANNELS
        store_rows(p_qc, d_qc, o_row, m_row, HEADS * CHANNELS, CHANNELS, BLOCK_C)
    o_sums = (i_tile * HEADS + i_head) * 2
    if TIME_BUCKETS > 0:
        store_sums(p_time_sums + o_sums * TIME_BUCKETS, time_sums, TIME_BUCKETS, BLOCK_T)
    if POSITION_BUCKETS > 0:
        store_sums(p_position_sums + o_sums * POSITION_BUCKETS, position_sums, POSITION_BUCKETS, BLOCK_P)


@triton.jit
def attend_keys(
    state,
    problem,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RULES: tl.constexpr,
    TIME_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(dq, d_q_cyclic, sums of the time table, of the position table) with the pairs of one class."""
    queries, keys, time, position, rules, p_pairs, p_ends, scale = problem
    dq, d_qc, time_sums, position_sums = state
    b_q, b_do, b_qc, lse, delta, q_time, i, p_crossings, m_row = queries
    p_k, p_v, p_k_time, p_kc, stride_k, stride_v = keys
    history, n_k = rules[3], rules[4]
    TIME: tl.constexpr = TIME_BUCKETS > 0
    POSITION: tl.constexpr = POSITION_BUCKETS > 0
    BIASED: tl.constexpr = TIME or POSITION
    LOOKED: tl.constexpr = BIASED and KIND >= SEVERAL
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    MASK: tl.constexpr = KIND == GENERAL
    PARTS: tl.constexpr = 1 if KIND <= WHOLE or BLOCK_N == 16 else 2
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    T_COUNT: tl.constexpr = 0 if KIND == UNIFORM else (1 if KIND == FEW else 3)
    P_COUNT: tl.constexpr = 0 if KIND == UNIFORM else (1 if KIND == FEW else 2)
    o_n = tl.arange(0, WIDTH)
    q_position = tl.minimum(i, history)

    begin = tl.load(p_ends + (MANY if BIASED and MASK else KIND))  # sums of many buckets cost more than masks
    end = tl.load(p_ends + (KIND + 1 if BIASED or MASK else GENERAL))
    ahead = read_pair(p_pairs + begin * PAIR, time, position, TIME, POSITION, KIND)
    for i_part in range(begin * PARTS, end * PARTS):
        p_pair = p_pairs + i_part // PARTS * PAIR
        start, value, time_step, position_step = ahead
        start += tl.cast(i_part % PARTS * WIDTH, tl.int32)
        ahead = read_pair(p_pairs + (i_part + 1) // PARTS * PAIR, time, position, TIME, POSITION, KIND)
        m_n = start + o_n < n_k
        start_k = start.to(tl.int64)
        k_time = o_n
        if TIME and KIND != UNIFORM:
            k_time = load_times(p_k_time + start, o_n, m_n, MASK)
        q_place, k_place = places(q_position, start, o_n, history, MASK and RULES)
        if LOOKED and not EXACT:  # while the product is computed
            bias = pair_bias(
                q_time, k_time, q_place, k_place, time, position, end > begin,
                TIME, POSITION, TIME_STEPS, POSITION_STEPS, False, True
            )  # fmt: skip
        b_k = load_rows(p_k + start_k * stride_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, MASK).to(DOT)
        b_v = load_rows(p_v + start_k * stride_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, MASK).to(DOT)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if CHANNELS > 0:
            b_kc = load_rows(p_kc + start_k * CHANNELS, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, MASK)
            logits = tl.dot(b_qc, tl.trans(b_kc), logits, input_precision=PRECISION)
        if LOOKED and EXACT:  # products that take all registers
            bias = pair_bias(
                q_time, k_time, q_place, k_place, time, position, end > begin,
                TIME, POSITION, TIME_STEPS, POSITION_STEPS, False, True
            )  # fmt: skip
        if KIND == UNIFORM:
            if not BIASED:
                value = 0.0
            weights = tl.exp2(logits * (scale * LOG2E) + (value - lse)[:, None])
        else:
            logits *= scale * LOG2E
            if LOOKED:
                logits += bias
            if TIME and KIND == FEW:
                logits += step_bias(q_time[:, None], k_time[None, :], time_step)
            if POSITION and KIND == FEW:
                logits += step_bias(q_place[:, None], k_place[None, :], position_step)
            weights = tl.exp2(logits - lse[:, None])
            if MASK:
                visible = visible_keys(i[:, None], (start + o_n)[None, :], rules, RULES)
                weights = tl.where(visible, weights, 0.0)
        d_weights = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        d_logits = weights * (d_weights - delta[:, None])
        rounded = d_logits.to(DOT)
        if BIASED:
            sum_all = tl.sum(d_logits)
            if TIME_BUCKETS > 0:
                time_sums = add_sums(
                    time_sums, sum_all, d_logits, rounded, q_time[:, None], k_time[None, :], time, p_pair + 1,
                    p_crossings, m_row, start, history, T_COUNT, BLOCK_T, KIND, True, MASK and RULES, PRECISION
                )  # fmt: skip
            if POSITION_BUCKETS > 0:
                position_sums = add_sums(
                    position_sums, sum_all, d_logits, rounded, q_place[:, None], k_place[None, :], position, p_pair + 3,
                    p_crossings, m_row, start, history, P_COUNT, BLOCK_P, KIND, False, MASK and RULES, PRECISION
                )  # fmt: skip
        if CHANNELS > 0:
            d_qc = tl.dot(rounded, b_kc.to(DOT), d_qc, input_precision=PRECISION)
        dq = tl.dot(rounded, b_k, dq, input_precision=PRECISION)
    return dq, d_qc, time_sums, position_sums


@triton.jit(do_not_specialize=["total_q"])
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
    p_tiles,
    p_pairs,
    p_q_time,
    p_k_time,
    p_time_thresholds,
    p_time_cells,
    p_time_values,
    p_time_table,
    p_position_thresholds,
    p_position_cells,
    p_position_values,
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
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RULES: tl.constexpr,
    TIME_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i_work = tl.program_id(0)
    i_kv = tl.cast(i_work % KV_HEADS, tl.int64)
    i_tile = i_work // KV_HEADS
    p_tile = p_tiles + i_tile * TILE
    q_begin, k_begin = tl.load(p_tile), tl.load(p_tile + 2)
    n_q, n_k, row = tl.load(p_tile + 1).to(tl.int32), tl.load(p_tile + 3).to(tl.int32), tl.load(p_tile + 4).to(tl.int32)
    left, right = tl.load(p_tile + 5).to(tl.int32), tl.load(p_tile + 6).to(tl.int32)
    contexts, history = tl.load(p_tile + 7).to(tl.int32), tl.load(p_tile + 8).to(tl.int32)
    rules = (left, right, contexts, history, n_k)
    i_group = tl.load(p_tile + 9)

    first = k_begin + row
    o_row = tl.arange(0, BLOCK_N)
    m_row = row + o_row < n_k
    p_row = p_k + first * stride_k + i_kv * stride_kh
    b_k = load_rows(p_row, o_row, m_row, stride_k, HEAD_DIM, BLOCK_D, True).to(DOT)
    p_row = p_v + first * stride_v + i_kv * stride_vh
    b_v = load_rows(p_row, o_row, m_row, stride_v, HEAD_DIM, BLOCK_D, True).to(DOT)
    b_kc = b_k
    if CHANNELS > 0:
        p_row = p_k_cyclic + first * CHANNELS
        b_kc = load_rows(p_row, o_row, m_row, CHANNELS, CHANNELS, BLOCK_C, True) * (1 / scale)
    k_time = o_row
    if TIME_BUCKETS > 0:
        k_time = tl.load(p_k_time + first + o_row, mask=m_row, other=0)
    keys = (b_k, b_v, b_kc, k_time, row + o_row)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    state = (dk, dv, tl.zeros([BLOCK_N, BLOCK_C], tl.float32))
    SHARE: tl.constexpr = HEADS // KV_HEADS
    for i_share in range(SHARE):
        i_head = i_kv * SHARE + i_share
        o_lse = i_head * total_q + q_begin
        queries = (
            p_q + q_begin * stride_q + i_head * stride_qh,
            p_grad_out + q_begin * stride_g + i_head * stride_gh,
            p_lse + o_lse,
            p_delta + o_lse,
            p_q_time + q_begin,
            p_q_cyclic + (q_begin * HEADS + i_head) * CHANNELS,
            stride_q,
            stride_g,
            n_q,
        )
        i_table = i_group * HEADS + i_head
        p_time_row, p_position_row = (
            p_time_table + i_table * TIME_BUCKETS,
            p_position_table + i_table * POSITION_BUCKETS,
        )
        p_time_cell, p_position_cell = p_time_values + i_table * CELLS, p_position_values + i_table * CELLS
        time = (p_time_thresholds, p_time_cells, p_time_cell, p_time_row, TIME_BUCKETS)
        position = (p_position_thresholds, p_position_cells, p_position_cell, p_position_row, POSITION_BUCKETS)
        problem = (queries, keys, time, position, rules, p_pairs, p_tile + ENDS, scale)
        state = attend_queries(  # loop: uniform
            state,
            problem,
            HEADS,
            HEAD_DIM,
            TIME_BUCKETS,
            POSITION_BUCKETS,
            CHANNELS,
            RULES,
            TIME_STEPS,
            POSITION_STEPS,
            DOT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_C,
            UNIFORM,
            WHOLE,
        )
        if TIME_BUCKETS + POSITION_BUCKETS > 0:
            state = attend_queries(  # loop: few
                state,
                problem,
                HEADS,
                HEAD_DIM,
                TIME_BUCKETS,
                POSITION_BUCKETS,
                CHANNELS,
                RULES,
                TIME_STEPS,
                POSITION_STEPS,
                DOT,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_C,
                FEW,
                WHOLE,
            )
            state = attend_queries(  # loop: many
                state,
                problem,
                HEADS,
                HEAD_DIM,
                TIME_BUCKETS,
                POSITION_BUCKETS,
                CHANNELS,
                RULES,
                TIME_STEPS,
                POSITION_STEPS,
                DOT,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_C,
                MANY,
                WHOLE,
            )
        state = attend_queries(  # loop: general
            state,
            problem,
            HEADS,
            HEAD_DIM,
            TIME_BUCKETS,
            POSITION_BUCKETS,
            CHANNELS,
            RULES,
            TIME_STEPS,
            POSITION_STEPS,
            DOT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_C,
            GENERAL,
            WHOLE,
        )
    dk, dv, d_kc = state

    o_out = (first * KV_HEADS + i_kv) * HEAD_DIM
    store_rows(p_dk + o_out, dk * scale, o_row, m_row, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_rows(p_dv + o_out, dv, o_row, m_row, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if CHANNELS > 0:  # k_cyclic is shared by the heads: [Tk, Hk, C], added up by the launcher
        p_row = p_d_k_cyclic + (first * KV_HEADS + i_kv) * CHANNELS
        store_rows(p_row, d_kc, o_row, m_row, KV_HEADS * CHANNELS, CHANNELS, BLOCK_C)


@triton.jit
def attend_queries(
    state,
    problem,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RULES: tl.constexpr,
    TIME_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(dk, dv, d_k_cyclic) with the pairs of one class and head."""
    queries, keys, time, position, rules, p_pairs, p_ends, scale = problem
    dk, dv, d_kc = state
    p_q, p_g, p_lse, p_delta, p_q_time, p_qc, stride_q, stride_g, n_q = queries
    b_k, b_v, b_kc, k_time, j = keys
    history, n_k = rules[3], rules[4]
    TIME: tl.constexpr = TIME_BUCKETS > 0
    POSITION: tl.constexpr = POSITION_BUCKETS > 0
    BIASED: tl.constexpr = TIME or POSITION
    LOOKED: tl.constexpr = BIASED and KIND >= MANY
    EXACT: tl.constexpr = b_k.dtype == tl.float32
    MASK: tl.constexpr = KIND == GENERAL
    PARTS: tl.constexpr = 1 if KIND <= WHOLE or BLOCK_M == 16 else 2
    WIDTH: tl.constexpr = BLOCK_M // PARTS
    o_m = tl.arange(0, WIDTH)
    k_position = tl.minimum(j, history)

    begin = tl.load(p_ends + (SEVERAL if KIND == MANY else KIND))
    end = tl.load(p_ends + (KIND + 1 if BIASED or MASK else GENERAL))
    ahead = read_pair(p_pairs + begin * PAIR, time, position, TIME, POSITION, KIND)
    for i_part in range(begin * PARTS, end * PARTS):
        start, value, time_step, position_step = ahead
        start += tl.cast(i_part % PARTS * WIDTH, tl.int32)
        ahead = read_pair(p_pairs + (i_part + 1) // PARTS * PAIR, time, position, TIME, POSITION, KIND)
        m_m = start + o_m < n_q  # a tile whose pairs are all seen may still end beyond the queries
        start_q = start.to(tl.int64)
        i = start + o_m + n_k - n_q
        q_position = tl.minimum(i, history)
        q_time = o_m
        if TIME and KIND != UNIFORM:
            q_time = tl.load(p_q_time + start + o_m, mask=m_m, other=0)
        if LOOKED and not EXACT:  # while the product is computed
            bias = pair_bias(
                q_time, k_time, q_position, k_position, time, position, end > begin,
                TIME, POSITION, TIME_STEPS, POSITION_STEPS, True, EXACT or BLOCK_D <= 64
            )  # fmt: skip
        b_q = load_rows(p_q + start_q * stride_q, o_m, m_m, stride_q, HEAD_DIM, BLOCK_D, True).to(DOT)
        b_do = load_rows(p_g + start_q * stride_g, o_m, m_m, stride_g, HEAD_DIM, BLOCK_D, True).to(DOT)
        lse = tl.load(p_lse + start + o_m, mask=m_m, other=float("inf"))  # no weight beyond the sequence
        delta = tl.load(p_delta + start + o_m, mask=m_m, other=0.0)
        logits = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if CHANNELS > 0:
            b_qc = load_rows(p_qc + start_q * (HEADS * CHANNELS), o_m, m_m, HEADS * CHANNELS, CHANNELS, BLOCK_C, True)
            logits = tl.dot(b_kc, tl.trans(b_qc), logits, input_precision=PRECISION)
        if LOOKED and EXACT:  # products that take all registers
            bias = pair_bias(
                q_time, k_time, q_position, k_position, time, position, end > begin,
                TIME, POSITION, TIME_STEPS, POSITION_STEPS, True, EXACT or BLOCK_D <= 64
            )  # fmt: skip
        if KIND == UNIFORM:
            if not BIASED:
                value = 0.0
            weights = tl.exp2(logits * (scale * LOG2E) + (value - lse)[None, :])
        else:
            logits *= scale * LOG2E
            if LOOKED:
                logits += bias
            if TIME and KIND == FEW:
                logits += step_bias(q_time[None, :], k_time[:, None], time_step)
            if POSITION and KIND == FEW:
                logits += step_bias(q_position[None, :], k_position[:, None], position_step)
            weights = tl.exp2(logits - lse[None, :])
            if MASK:
                visible = visible_queries(i[None, :], j[:, None], rules, RULES)
                weights = tl.where(visible, weights, 0.0)
        d_weights = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        dv = tl.dot(weights.to(DOT), b_do, dv, input_precision=PRECISION)
        d_logits = (weights * (d_weights - delta[None, :])).to(DOT)
        if CHANNELS > 0:
            d_kc = tl.dot(d_logits, b_qc.to(DOT), d_kc, input_precision=PRECISION)
        dk = tl.dot(d_logits, b_q, dk, input_precision=PRECISION)
    return dk, dv, d_kc
