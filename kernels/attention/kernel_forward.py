"""The forward kernel of jagged attention: out and lse of tiles of queries, one tile of one head at a time.

In bfloat16 a weight is 2^logit, as it is: no maxima, and nothing that was summed shrinks. Where a query's weights add
up to something far from 1, its tile is computed again, with the query's maximum so far subtracted. In the other types
that is the only way: float16 holds too few weights, and float32 waits for its products.

Shapes and dtypes as in kernel.py; the records of tiles and pairs as in kernel_tiles.py.
"""

import triton
import triton.language as tl

from alure.kernels.attention.kernel_tiles import (
    ALL,
    CELLS,
    ENDS,
    FEW,
    GENERAL,
    LN2,
    LOG2E,
    MANY,
    MOST_PLAIN,
    PAIR,
    SEVERAL,
    TILE,
    UNIFORM,
    load_rows,
    load_times,
    pair_bias,
    places,
    read_pair,
    step_bias,
    store_rows,
    visible_keys,
)


@triton.jit(do_not_specialize=["total_q"])
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
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
    PLAIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i_work = tl.program_id(0)
    i_head = tl.cast(i_work % HEADS, tl.int64)
    p_tile = p_tiles + i_work // HEADS * TILE
    q_begin, k_begin = tl.load(p_tile), tl.load(p_tile + 2)
    n_q, n_k, row = (
        tl.load(p_tile + 1).to(tl.int32),
        tl.load(p_tile + 3).to(tl.int32),
        tl.load(p_tile + 4).to(tl.int32),
    )
    left, right = tl.load(p_tile + 5).to(tl.int32), tl.load(p_tile + 6).to(tl.int32)
    contexts, history = tl.load(p_tile + 7).to(tl.int32), tl.load(p_tile + 8).to(tl.int32)
    rules = (left, right, contexts, history, n_k)
    i_table = tl.load(p_tile + 9) * HEADS + i_head
    i_kv = i_head // (HEADS // KV_HEADS)

    first = q_begin + row
    o_row = tl.arange(0, BLOCK_M)
    m_row = row + o_row < n_q
    b_q = load_rows(p_q + first * stride_q + i_head * stride_qh, o_row, m_row, stride_q, HEAD_DIM, BLOCK_D, True)
    b_q = b_q.to(DOT)
    b_qc = b_q
    if CHANNELS > 0:
        p_qc = p_q_cyclic + (first * HEADS + i_head) * CHANNELS
        b_qc = load_rows(p_qc, o_row, m_row, HEADS * CHANNELS, CHANNELS, BLOCK_C, True) * (1 / scale)
    q_time = o_row
    if TIME_BUCKETS > 0:
        q_time = tl.load(p_q_time + first + o_row, mask=m_row, other=0)
    i = row + o_row + n_k - n_q

    queries = (b_q, b_qc, q_time, i)
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

    none = tl.zeros([BLOCK_M], tl.float32)
    nothing = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32), none + float("-inf"), none)
    state = nothing
    state = attend(  # loop: uniform
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
        UNIFORM,
        PLAIN,
        WHOLE,
    )
    if TIME_BUCKETS + POSITION_BUCKETS > 0:
        state = attend(  # loop: few
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
            FEW,
            PLAIN,
            WHOLE,
        )
        state = attend(  # loop: many
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
            MANY,
            PLAIN,
            WHOLE,
        )
    state = attend(  # loop: general
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
        GENERAL,
        PLAIN,
        WHOLE,
    )
    if PLAIN:
        _, _, total = state
        fits = (total > 1 / MOST_PLAIN) & (total < MOST_PLAIN)
        if tl.min((fits | ~m_row).to(tl.int32), axis=0) == 0:
            state = attend(  # loop: again
                nothing,
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
                ALL,
                False,
                WHOLE,
            )
    acc, maximum, total = state

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    p_row = p_out + (first * HEADS + i_head) * HEAD_DIM
    store_rows(p_row, acc / total[:, None], o_row, m_row, HEADS * HEAD_DIM, HEAD_DIM, BLOCK_D)
    lse = tl.where(seen, (finite(maximum) + tl.log2(total)) * LN2, float("-inf"))
    tl.store(p_lse + i_head * total_q + first + o_row, lse, mask=m_row)


@triton.jit
def attend(
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
    KIND: tl.constexpr,
    PLAIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The running (acc, maximum, total) after the pairs of one class; of all classes, in the way of GENERAL, if KIND is
    ALL. If PLAIN the maximum is not read, and stays.
    """
    CLASS: tl.constexpr = GENERAL if KIND == ALL else KIND
    queries, keys, time, position, rules, p_pairs, p_ends, scale = problem
    acc, maximum, total = state
    b_q, b_qc, q_time, i = queries
    p_k, p_v, p_k_time, p_kc, stride_k, stride_v = keys
    history, n_k = rules[3], rules[4]
    TIME: tl.constexpr = TIME_BUCKETS > 0
    POSITION: tl.constexpr = POSITION_BUCKETS > 0
    BIASED: tl.constexpr = TIME or POSITION
    LOOKED: tl.constexpr = BIASED and CLASS >= MANY
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    MASK: tl.constexpr = CLASS == GENERAL
    # to compute again must not take more registers than the rest
    PARTS: tl.constexpr = 1 if not BIASED or CLASS <= WHOLE else min(4 if KIND == ALL else 2, BLOCK_N // 16)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    o_n = tl.arange(0, WIDTH)
    q_position = tl.minimum(i, history)

    begin = tl.load(p_ends + (UNIFORM if KIND == ALL else SEVERAL if CLASS == MANY else CLASS))
    end = tl.load(p_ends + (CLASS + 1 if BIASED or MASK else GENERAL))  # without a bias all but GENERAL are one loop
    ahead = read_pair(p_pairs + begin * PAIR, time, position, TIME, POSITION, CLASS)
    for i_part in range(begin * PARTS, end * PARTS):
        start, value, time_step, position_step = ahead
        start += tl.cast(i_part % PARTS * WIDTH, tl.int32)
        ahead = read_pair(p_pairs + (i_part + 1) // PARTS * PAIR, time, position, TIME, POSITION, CLASS)
        m_n = start + o_n < n_k
        start_k = start.to(tl.int64)
        k_time = o_n
        if TIME and CLASS != UNIFORM:
            k_time = load_times(p_k_time + start, o_n, m_n, MASK)
        q_place, k_place = places(q_position, start, o_n, history, MASK and RULES)
        if LOOKED and not EXACT:  # while the product is computed
            bias = pair_bias(
                q_time, k_time, q_place, k_place, time, position, end > begin,
                TIME, POSITION, TIME_STEPS, POSITION_STEPS, False, True
            )  # fmt: skip
        b_k = load_rows(p_k + start_k * stride_k, o_n, m_n, stride_k, HEAD_DIM, BLOCK_D, MASK).to(DOT)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if CHANNELS > 0:
            b_kc = load_rows(p_kc + start_k * CHANNELS, o_n, m_n, CHANNELS, CHANNELS, BLOCK_C, MASK)
            logits = tl.dot(b_qc, tl.trans(b_kc), logits, input_precision=PRECISION)
        if LOOKED and EXACT:  # products that take all registers
            bias = pair_bias(
                q_time, k_time, q_place, k_place, time, position, end > begin,
                TIME, POSITION, TIME_STEPS, POSITION_STEPS, False, True
            )  # fmt: skip
        if CLASS == UNIFORM:
            if not BIASED:
                value = 0.0
            if PLAIN:
                weights = tl.exp2(logits * (scale * LOG2E) + value)
            else:
                new = tl.maximum(maximum, tl.max(logits, axis=1) * (scale * LOG2E) + value)
                reference = finite(new)
                weights = tl.exp2(logits * (scale * LOG2E) + (value - reference)[:, None])
        else:
            logits *= scale * LOG2E
            if LOOKED:
                logits += bias
            if TIME and CLASS == FEW:
                logits += step_bias(q_time[:, None], k_time[None, :], time_step)
            if POSITION and CLASS == FEW:
                logits += step_bias(q_place[:, None], k_place[None, :], position_step)
            if MASK:
                visible = visible_keys(i[:, None], (start + o_n)[None, :], rules, RULES)
                logits = tl.where(visible, logits, float("-inf"))
            if PLAIN:
                weights = tl.exp2(logits)
            else:
                new = tl.maximum(maximum, tl.max(logits, axis=1))
                reference = finite(new)
                weights = tl.exp2(logits - reference[:, None])
        if not PLAIN:
            decay = tl.exp2(maximum - reference)
            acc, total, maximum = acc * decay[:, None], total * decay, new
        total += tl.sum(weights, axis=1)
        b_v = load_rows(p_v + start_k * stride_v, o_n, m_n, stride_v, HEAD_DIM, BLOCK_D, MASK).to(DOT)
        acc = tl.dot(weights.to(DOT), b_v, acc, input_precision=PRECISION)
    return acc, maximum, total


@triton.jit
def finite(maximum):
    """0 for a row that has seen no key yet: not −inf − (−inf)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
