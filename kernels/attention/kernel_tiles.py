"""What the Triton kernels of jagged attention share: the records of tiles, rows, biases, masks and bucket sums.

A work list has one record a tile and one a pair of tiles, int64 and int32; `kernel_plan.py` makes them. The kernels of
queries look at a tile of BLOCK_M queries and run over tiles of BLOCK_N keys, the kernel of dk and dv the other way.
Elements of pairs are broadcast: what belongs to a query comes as [M, 1] or [1, M], what belongs to a key as the other.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST_PLAIN = tl.constexpr(2.0**48)  # that plain weights of a query may add up to, and the inverse of the least

# The classes of pairs of tiles; each has a loop of its own, because products and loads in a branch are not pipelined.
UNIFORM = tl.constexpr(0)  # one bucket of each bias, so one scalar; every pair is seen
FEW = tl.constexpr(1)  # at most 1 threshold of each bias is crossed: compared; every pair is seen
SEVERAL = tl.constexpr(2)  # at most 3 thresholds of time and 2 of position: sums of buckets by comparing, else as MANY
MANY = tl.constexpr(3)  # any number of thresholds: looked up; every pair is seen
GENERAL = tl.constexpr(4)  # any number of thresholds: looked up; some pairs may be hidden
ALL = tl.constexpr(5)  # pairs of any class, in the way of GENERAL

TILE = tl.constexpr(16)  # q_begin, n_q, k_begin, n_k, start, left, right, contexts, history, group, ends of the classes
ENDS = tl.constexpr(10)
PAIR = tl.constexpr(5)  # start of the other tile, first and last bucket of time, first and last bucket of position
UNLIMITED = tl.constexpr(1 << 30)
CELL_SHIFT = tl.constexpr(20)  # bits of a float32 that do not tell cells apart: 8 cells an octave
CELLS = tl.constexpr(4096)
CHUNK = tl.constexpr(16)  # buckets whose sums are made at a time


@triton.jit
def load_rows(p_x, o_row, m_row, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr):
    """Rows of one head, [rows, BLOCK], zeros beyond WIDTH and, if MASK, where m_row is not."""
    o_d = tl.arange(0, BLOCK)
    p = p_x + (o_row[:, None] * stride + o_d[None, :])
    if MASK and WIDTH < BLOCK:
        return tl.load(p, mask=m_row[:, None] & (o_d < WIDTH)[None, :], other=0.0)
    elif MASK:
        return tl.load(p, mask=m_row[:, None], other=0.0)
    elif WIDTH < BLOCK:
        return tl.load(p, mask=(o_d < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def store_rows(p_x, x, o_row, m_row, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)
    p = p_x + (o_row[:, None] * stride + o_d[None, :])
    tl.store(p, x.to(p_x.dtype.element_ty), mask=m_row[:, None] & (o_d < WIDTH)[None, :])


@triton.jit
def load_times(p_time, o_row, m_row, MASK: tl.constexpr):
    if MASK:
        return tl.load(p_time + o_row, mask=m_row, other=0)
    else:
        return tl.load(p_time + o_row)


@triton.jit
def places(i, start, o_row, history, TARGETS: tl.constexpr):
    """Positions p_i and p_j as arguments.py defines them, or both less `start`: only their difference matters.

    i is min(i, history) already; without TARGETS no key of the tile is one.
    """
    if TARGETS:
        return i, tl.minimum(start + o_row, history)
    else:
        return i - start, o_row


@triton.jit
def is_above(query, key, threshold):
    """query − key >= threshold. Where times are below 2³⁰ as int32, query − threshold fits; below 2²⁴ as float32, too:
    it is rounded where it is beyond all keys.
    """
    if query.dtype == tl.int64:
        return query - key >= threshold
    else:
        return key <= query - threshold


@triton.jit
def read_pair(p_pair, time, position, TIME: tl.constexpr, POSITION: tl.constexpr, KIND: tl.constexpr):
    """(start of the other tile, value, step of time, step of position) of a pair of tiles.

    value: log2(e)·bias, if UNIFORM; a step as `read_step` has it, if FEW. Nobody reads the others, which are any.
    Loops read a pair ahead: a load that waits for a load is not pipelined.
    """
    start = tl.load(p_pair)
    value = start
    time_step = (start, start, start)
    position_step = time_step
    if KIND == UNIFORM and (TIME or POSITION):
        value = 0.0
        if TIME:
            value += tl.load(time[3] + tl.load(p_pair + 1)) * LOG2E
        if POSITION:
            value += tl.load(position[3] + tl.load(p_pair + 3)) * LOG2E
    if KIND == FEW and TIME:
        time_step = read_step(p_pair + 1, time)
    if KIND == FEW and POSITION:
        position_step = read_step(p_pair + 3, position)
    return start, value, time_step, position_step


@triton.jit
def read_step(p_first, bias):
    """(threshold, log2(e)·bias below it, at and above it) of a FEW pair of tiles whose lowest bucket is at p_first.

    The threshold after the last bucket is above all differences in the tile.
    """
    p_thresholds, _, _, p_row, buckets = bias
    first = tl.load(p_first)
    low, high = tl.load(p_row + first), tl.load(p_row + tl.minimum(first + 1, buckets - 1))
    return tl.load(p_thresholds + first), low * LOG2E, high * LOG2E


@triton.jit
def step_bias(query, key, step):
    """log2(e)·bias of the pairs of a tile that one threshold crosses; `step` as `read_step` has it."""
    threshold, low, high = step
    return tl.where(is_above(query, key, threshold), high, low)


@triton.jit
def cell_values_kernel(
    p_time_table,
    p_time_cells,
    p_time_values,
    p_position_table,
    p_position_cells,
    p_position_values,
    TIME_BUCKETS: tl.constexpr,
    POSITION_BUCKETS: tl.constexpr,
):
    """values [tables, CELLS]: log2(e)·table [tables, buckets] at the bucket where a cell begins. Grid: (tables, 2)."""
    i_table = tl.program_id(0).to(tl.int64)
    o_cell = tl.arange(0, CELLS)
    if tl.program_id(1) == 0:
        if TIME_BUCKETS > 0:
            bucket = tl.load(p_time_cells + o_cell) >> 32
            value = tl.load(p_time_table + i_table * TIME_BUCKETS + bucket) * LOG2E
            tl.store(p_time_values + i_table * CELLS + o_cell, value)
    elif POSITION_BUCKETS > 0:
        bucket = tl.load(p_position_cells + o_cell) >> 32
        value = tl.load(p_position_table + i_table * POSITION_BUCKETS + bucket) * LOG2E
        tl.store(p_position_values + i_table * CELLS + o_cell, value)


@triton.jit
def look_up(delta, bias, STEPS: tl.constexpr):
    """log2(e)·row[bucket(delta)], delta an integer of any type or a float32 that is one.

    A cell holds all integers whose float32 has the same upper bits. The conversion never decreases, so the integers of
    a cell are consecutive. Where no cell is split by a threshold its value is known; else the bucket is the one in
    which the cell begins, and up to STEPS thresholds within the cell.
    """
    p_thresholds, p_cells, p_values, p_row, _ = bias
    cell = (delta.to(tl.float32).to(tl.uint32, bitcast=True) >> CELL_SHIFT).to(tl.int32)
    if STEPS == 0:
        return tl.load(p_values + cell)
    entry = tl.load(p_cells + cell)
    bucket = (entry >> 32).to(tl.int32)
    if delta.dtype == tl.int32:  # the first threshold within the cell is in the entry
        bucket += (delta >= entry.to(tl.int32)).to(tl.int32)
        for _ in range(STEPS - 1):
            bucket += (delta >= tl.load(p_thresholds + bucket)).to(tl.int32)
    else:
        for _ in range(STEPS):
            bucket += (delta >= tl.load(p_thresholds + bucket)).to(tl.int32)
    return tl.load(p_row + bucket) * LOG2E


@triton.jit
def pair_bias(
    q_time,
    k_time,
    q_place,
    k_place,
    time,
    position,
    always,
    TIME: tl.constexpr,
    POSITION: tl.constexpr,
    TIME_STEPS: tl.constexpr,
    POSITION_STEPS: tl.constexpr,
    BY_KEYS: tl.constexpr,
    TURN: tl.constexpr,
):
    """log2(e)·bias of a tile, [queries, keys] or, BY_KEYS, [keys, queries]; TURN: looked up the other way and turned.

    `always` is a condition that holds. What is read outside a branch and ends in a product is staged through shared
    memory, and takes a stage of those by which keys and values are ahead.
    """
    ROWS: tl.constexpr = k_time.shape[0] if BY_KEYS else q_time.shape[0]
    COLUMNS: tl.constexpr = q_time.shape[0] if BY_KEYS else k_time.shape[0]
    bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    if always:
        if TIME:
            elapsed = q_time[:, None] - k_time[None, :] if BY_KEYS == TURN else q_time[None, :] - k_time[:, None]
            found = look_up(elapsed, time, TIME_STEPS)
        if POSITION:
            i, j = q_place.to(tl.float32), k_place.to(tl.float32)  # their difference is exact, and no conversion
            distance = i[:, None] - j[None, :] if BY_KEYS == TURN else i[None, :] - j[:, None]
            more = look_up(distance, position, POSITION_STEPS)
            found = found + more if TIME else more
        bias = tl.trans(found) if TURN else found
    return bias


@triton.jit
def crossings_kernel(
    p_crossings,
    p_tiles,
    p_q_time,
    p_k_time,
    p_thresholds,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """crossings int32 [Tq, BLOCK]: of the keys of its sequence a query finds so many in a bucket or one above it; they
    are the first ones. Grid: (tiles, BLOCK / CHUNK).
    """
    p_tile = p_tiles + tl.program_id(0) * TILE
    row, n_k = tl.load(p_tile + 4), tl.load(p_tile + 3).to(tl.int32)
    first = tl.load(p_tile) + row
    o_row = tl.arange(0, BLOCK_M)[:, None]
    m_row = row + o_row < tl.load(p_tile + 1)
    bucket = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)[None, :]
    q_time = tl.load(p_q_time + first + o_row, mask=m_row, other=0)
    threshold = tl.load(p_thresholds + bucket - 1, mask=(bucket > 0) & (bucket < BUCKETS), other=0)
    p_key = p_k_time + tl.load(p_tile + 2)
    number = tl.zeros([BLOCK_M, CHUNK], tl.int32)
    rest = n_k  # that may be among them
    while rest > 1:
        half = rest // 2
        number += tl.where(is_above(q_time, tl.load(p_key + number + (half - 1)), threshold), half, 0)
        rest -= half
    m_number = number < n_k
    more = is_above(q_time, tl.load(p_key + number, mask=m_number, other=0), threshold)
    number += tl.where(m_number & more, 1, 0)
    number = tl.where(bucket > 0, number, n_k)
    p_row = p_crossings + (first + o_row) * BLOCK + bucket
    tl.store(p_row, number, mask=m_row)


@triton.jit
def add_sums(
    state,
    total,
    d_logits,
    rounded,
    query,
    key,
    bias,
    p_first,
    p_crossings,
    m_row,
    start,
    history,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    TIME: tl.constexpr,
    TARGETS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(sums, rest) [BLOCK / CHUNK, CHUNK] with the sums of d_logits over the buckets from each bucket of the tile up;
    `rest` without that of the tile's first bucket, so a bucket gets sums[bucket] − rest[bucket + 1], 0 where none is in
    it. total is the sum of all; rounded is d_logits as the products take it.

    Where more than COUNT thresholds are crossed, the keys from a bucket up are a query's first ones in the tile: so
    many as `crossings_kernel` found. Sums of first keys are a product, and of each one is picked.
    """
    sums, rest = state
    p_thresholds = bias[0]
    ROWS: tl.constexpr = d_logits.shape[0]
    WIDTH: tl.constexpr = d_logits.shape[1]
    o_part = tl.arange(0, BLOCK // CHUNK)[:, None]
    o_bucket = tl.arange(0, CHUNK)
    first = tl.load(p_first)
    if KIND >= MANY:
        last = tl.load(p_first + 1)
        if PRECISION == "ieee":
            firsts = tl.cumsum(d_logits, 1)
        else:
            o_n = tl.arange(0, WIDTH)
            ones = (o_n[:, None] <= o_n[None, :]).to(rounded.dtype)
            firsts = tl.dot(rounded, ones, input_precision=PRECISION)
        for part in range(first // CHUNK, last // CHUNK + 1):
            bucket = part * CHUNK + o_bucket
            if TIME:
                o_row = tl.arange(0, ROWS)
                p_number = p_crossings + (o_row[:, None] * BLOCK + bucket[None, :])
                number = tl.load(p_number, mask=m_row[:, None], other=0) - start
            else:
                threshold = tl.load(p_thresholds + bucket - 1, mask=(bucket > 0) & (bucket <= last), other=-UNLIMITED)
                number = query - threshold[None, :] + 1
                if TARGETS:
                    number = tl.where(number > history, WIDTH, number - start)
            found = tl.gather(firsts, tl.minimum(tl.maximum(number - 1, 0), WIDTH - 1), 1)
            found = tl.sum(tl.where(number > 0, found, 0.0), axis=0)
            found = tl.where((bucket >= first) & (bucket <= last), found, 0.0)
            sums += tl.where(o_part == part, found[None, :], 0.0)
            rest += tl.where(o_part == part, tl.where(bucket > first, found, 0.0)[None, :], 0.0)
    else:
        bucket = o_part * CHUNK + o_bucket[None, :]
        sums += tl.where(bucket == first, total, 0.0)
        for step in tl.static_range(COUNT):
            found = tl.sum(tl.where(is_above(query, key, tl.load(p_thresholds + first + step)), d_logits, 0.0))
            sums += tl.where(bucket == first + step + 1, found, 0.0)
            rest += tl.where(bucket == first + step + 1, found, 0.0)
    return sums, rest


@triton.jit
def store_sums(p_sums, state, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """sums and rest of `add_sums`, [2, BUCKETS]."""
    sums, rest = state
    bucket = tl.arange(0, BLOCK // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(p_sums + bucket, sums, mask=bucket < BUCKETS)
    tl.store(p_sums + BUCKETS + bucket, rest, mask=bucket < BUCKETS)


@triton.jit
def visible_keys(i, j, rules, RULES: tl.constexpr):
    """Which keys j [1, N] the queries i [M, 1] see, as arguments.py defines it: by limits that each query has."""
    left, right, contexts, history, n_k = rules
    if RULES:
        position = tl.minimum(i, history)
        context = (i >= 0) & (i < contexts)
        low = tl.where(context, 0, position - left)
        high = tl.where(context, history - 1, tl.minimum(position + right, history - 1))
        alone = tl.where(i >= history, i, -1)
        return (j < contexts) | ((j >= low) & (j <= high)) | (j == alone)
    else:
        return j < n_k


@triton.jit
def visible_queries(i, j, rules, RULES: tl.constexpr):
    """Which queries i [1, M] see the keys j [N, 1]: the same by limits that each key has."""
    left, right, contexts, history, n_k = rules
    if RULES:
        everyone, target = j < contexts, j >= history
        low = tl.where(everyone, -UNLIMITED, tl.where(target, j, j - right))
        high = tl.where(everyone | (j >= history - left), UNLIMITED, j + left)
        high = tl.where(target & (j >= contexts), j, high)
        context = tl.where(target, 0, contexts)  # queries before it see this key
        return ((i >= low) & (i <= high)) | ((i >= 0) & (i < context))
    else:
        return (i >= -UNLIMITED) & (j < n_k)
