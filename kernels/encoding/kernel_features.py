"""Parts of the Triton kernels of `encode_events`: an event's CFEE features from its integers, in registers."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) to full relative precision for x >= 0: the rounding of 1 + x is divided out."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def sine_and_cosine(turns):
    """sin(2πx) and cos(2πx). Turns reduce exactly, so no slow path for large angles, and its stack, is compiled in."""
    turns -= tl.floor(turns)
    quarter = tl.floor(turns * 4.0 + 0.5)
    y = (turns - quarter * 0.25) * 6.283185307179586  # in [−π/4, π/4]
    z = y * y
    # minimax polynomials of Cephes' sinf and cosf, error below 1e-7
    sine = y + y * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    swapped = (quarter == 1.0) | (quarter == 3.0)
    rotated_sine = tl.where(swapped, cosine, sine)
    rotated_cosine = tl.where(swapped, sine, cosine)
    rotated_sine = tl.where((quarter == 2.0) | (quarter == 3.0), -rotated_sine, rotated_sine)
    rotated_cosine = tl.where((quarter == 1.0) | (quarter == 2.0), -rotated_cosine, rotated_cosine)
    return rotated_sine, rotated_cosine


@triton.jit
def decay(p_sequence, p_offsets, p_times, p_reference_times, i_t, m_t, tau):
    """(time, order from the newest, log1p(age / τ), log1p(gap / τ)): integers until the differences are taken."""
    i_sequence = tl.load(p_sequence + i_t, mask=m_t, other=0)
    b_begin = tl.load(p_offsets + i_sequence, mask=m_t, other=0).to(tl.int64)
    b_end = tl.load(p_offsets + i_sequence + 1, mask=m_t, other=0).to(tl.int64)
    b_time = tl.load(p_times + i_t, mask=m_t, other=0)
    b_previous = tl.load(p_times + i_t - 1, mask=m_t & (i_t > b_begin), other=0)
    b_gap = tl.where(i_t > b_begin, b_time - b_previous, 0)
    b_age = tl.maximum(tl.load(p_reference_times + i_sequence, mask=m_t, other=0) - b_time, 0)
    return b_time, b_end - 1 - i_t, log1p(b_age.to(tl.float32) / tau), log1p(b_gap.to(tl.float32) / tau)


@triton.jit
def cycle(b_time, p_periods, p_phases, p):
    """(sine, cosine) of period p: t mod p in integers, then in turns."""
    period = tl.load(p_periods + p)
    b_rest = b_time % period
    b_rest = tl.where(b_rest < 0, b_rest + period, b_rest)  # % truncates towards 0
    phase = tl.load(p_phases + p).to(tl.float32) * 0.15915494309189535
    return sine_and_cosine(b_rest.to(tl.float32) / period.to(tl.float32) + phase)


@triton.jit
def octave(p_counts, i_t, m_t, F: tl.constexpr):
    """Row of the frequency table: min(⌊log2(1 + count)⌋, F − 1), by shifts."""
    b_count = tl.load(p_counts + i_t, mask=m_t, other=0) + 1
    b_octave = tl.zeros(b_count.shape, tl.int64)
    for s in tl.static_range(1, F):
        b_octave += tl.where((b_count >> s) > 0, 1, 0)
    return b_octave
