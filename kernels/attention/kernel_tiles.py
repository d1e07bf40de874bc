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

# The classes of pairs of tiles; each has a loop of its own, because a loop with a branch in it is not pipelined.
UNIFORM = tl.constexpr(0)  # one bucket of each bias, so one scalar; every pair is seen
FEW = tl.constexpr(1)  # at most 1 threshold of each bias is crossed: compared; every pair is seen
SEVERAL = tl.constexpr(2)  # at most 3 thresholds of time and 2 of position: compared; every pair is seen
GENERAL = tl.constexpr(3)  # any number of thresholds: looked up; some pairs may be hidden
ALL = tl.constexpr(4)  # pairs of any class, in the way of GENERAL

TILE = tl.constexpr(15)  # q_begin, n_q, k_begin, n_k, start, left, right, contexts, history, group, ends of the classes
ENDS = tl.constexpr(10)
PAIR = tl.constexpr(5)  # start of the other tile, first and last bucket of time, first and last bucket of position
UNLIMITED = tl.constexpr(1 << 30)
CELL_SHIFT = tl.constexpr(20)  # bits of a float32 that do not tell cells apart: 8 cells an octave


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
    """query − key >= threshold. Times and thresholds that are int32 are below 2**30, so query − threshold fits."""
    if query.dtype == tl.int64:
        return query - key >= threshold
    else:
        return key <= query - threshold


@triton.jit
def add_bias(logits, query, key, bias, first, COUNT: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr):
    """logits + log2(e)·row[bucket(query − key)], where `first` is the lowest bucket of the tile.

    COUNT thresholds are compared; those after the last bucket are above all differences in the tile.
    """
    p_thresholds, p_cells, p_row, buckets = bias
    if KIND == GENERAL:
        return logits + tl.load(p_row + look_up(query - key, p_thresholds, p_cells, STEPS)) * LOG2E
    else:
        value = tl.load(p_row + first) * LOG2E
        for step in tl.static_range(COUNT):
            above = is_above(query, key, tl.load(p_thresholds + first + step))
            value = tl.where(above, tl.load(p_row + tl.minimum(first + step + 1, buckets - 1)) * LOG2E, value)
        return logits + value


@triton.jit
def look_up(delta, p_thresholds, p_cells, STEPS: tl.constexpr):
    """The bucket of delta: the bucket in which its cell begins, and up to STEPS thresholds within the cell.

    A cell holds all integers whose float32 has the same upper bits. The conversion never decreases, so the integers
    of a cell are consecutive.
    """
    entry = tl.load(p_cells + (delta.to(tl.float32).to(tl.uint32, bitcast=True) >> CELL_SHIFT))
    bucket = (entry >> 32).to(tl.int32)
    if delta.dtype == tl.int32:  # the first threshold within the cell is in the entry
        bucket += (delta >= entry.to(tl.int32)).to(tl.int32)
        for _ in range(STEPS - 1):
            bucket += (delta >= tl.load(p_thresholds + bucket)).to(tl.int32)
    else:
        for _ in range(STEPS):
            bucket += (delta >= tl.load(p_thresholds + bucket)).to(tl.int32)
    return bucket


@triton.jit
def add_sums(
    sums, total, d_logits, query, key, bias, first, last, COUNT: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr
):
    """sums [BLOCK] + the sum of d_logits in each bucket first … last of the tile; total is the sum of all."""
    p_thresholds = bias[0]
    o_b = tl.arange(0, BLOCK)
    rest = total  # of the buckets from `bucket` up
    if KIND == GENERAL:
        delta = query - key
        for bucket in range(first, last):
            above = tl.sum(tl.where(delta >= tl.load(p_thresholds + bucket), d_logits, 0.0))
            sums += tl.where(o_b == bucket, rest - above, 0.0)
            rest = above
        sums += tl.where(o_b == last, rest, 0.0)
    else:
        for step in tl.static_range(COUNT):
            above = tl.sum(tl.where(is_above(query, key, tl.load(p_thresholds + first + step)), d_logits, 0.0))
            sums += tl.where(o_b == first + step, rest - above, 0.0)
            rest = above
        sums += tl.where(o_b == first + COUNT, rest, 0.0)
    return sums


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
