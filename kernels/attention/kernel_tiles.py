"""What the Triton kernels of jagged attention share: a tile's rows, times, buckets, bias and mask."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(p_x, o_row, m_row, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of one head, [rows, BLOCK], zeros where masked."""
    o_d = tl.arange(0, BLOCK)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_times(p_time, row, o_row, m_row, n, BLOCK: tl.constexpr):
    """Times of a tile's rows, and its first and last time (they are sorted)."""
    return (
        tl.load(p_time + o_row, mask=m_row, other=0),
        tl.load(p_time + row),
        tl.load(p_time + tl.minimum(row + BLOCK, n) - 1),
    )


@triton.jit
def bucket_of(p_thresholds, delta, BUCKETS: tl.constexpr, BLOCK_B: tl.constexpr):
    """The bucket of a scalar delta: how many of the BUCKETS − 1 thresholds are <= delta."""
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < BUCKETS - 1
    return tl.sum((m_b & (tl.load(p_thresholds + o_b, mask=m_b, other=0) <= delta)).to(tl.int32), axis=0)


@triton.jit
def add_bias(logits, delta, p_thresholds, p_row, first, last):
    """logits + log2(e)·row[bucket(delta)], where every bucket of the tile is in first … last.

    The loop carries sums with the logits and not the bias alone: that keeps the layout of the dot product, where a
    tensor of its own would pass through shared memory in every tile.
    """
    biased = logits + tl.load(p_row + first) * LOG2E
    for bucket in range(first, last):
        biased = tl.where(delta >= tl.load(p_thresholds + bucket), logits + tl.load(p_row + bucket + 1) * LOG2E, biased)
    return biased


@triton.jit
def add_sums(sums, d_logits, delta, p_thresholds, first, last, BLOCK_B: tl.constexpr):
    """sums [BLOCK_B] + the sum of d_logits in each bucket first … last of the tile."""
    o_b = tl.arange(0, BLOCK_B)
    rest = d_logits
    for bucket in range(first, last):
        above = delta >= tl.load(p_thresholds + bucket)
        sums += tl.where(o_b == bucket, tl.sum(tl.where(above, 0.0, rest)), 0.0)
        rest = tl.where(above, rest, 0.0)
    return sums + tl.where(o_b == last, tl.sum(rest), 0.0)


@triton.jit
def sequence(p_q_offsets, p_k_offsets, i_sequence):
    """(first row of q, rows of q, first row of k, rows of k) of a sequence."""
    q_begin = tl.load(p_q_offsets + i_sequence).to(tl.int64)
    k_begin = tl.load(p_k_offsets + i_sequence).to(tl.int64)
    n_q = (tl.load(p_q_offsets + i_sequence + 1).to(tl.int64) - q_begin).to(tl.int32)
    n_k = (tl.load(p_k_offsets + i_sequence + 1).to(tl.int64) - k_begin).to(tl.int32)
    return q_begin, n_q, k_begin, n_k


@triton.jit
def visible_pairs(distance, m_q, m_k, window_left, window_right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Pairs within both sequences and the window; distance = i − j. Causal is a right window of 0."""
    visible = m_q[:, None] & m_k[None, :]
    if LEFT:
        visible = visible & (distance <= window_left)
    if RIGHT:
        visible = visible & (distance >= -window_right)
    return visible


@triton.jit
def store_rows(p_x, x, o_row, m_row, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    p = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p, x.to(p_x.dtype.element_ty), mask=mask)
