"""Triton kernel of `encode_events`; kernel_backward.py has those of its backward.

One program makes BLOCK_T rows × BLOCK_D columns of the output. It gathers the table's rows attribute by attribute and
multiplies them by that attribute's weight, streams the dense features through the same accumulator, and adds the CFEE
terms as rank-1 updates from registers. Events cross memory once in and once out; no feature matrix is made.

    ids [total, A] int64 · table [R, D_E] · sequence [total] int64 · offsets [batch + 1] · times [total] int64
    reference_times [batch] int64 · dense [total, d_dense] · out [total, D];  sums in float32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import HOPPER, capability, on_device
from alure.kernels.encoding import kernel_backward
from alure.kernels.encoding.arguments import EventColumns, EventEncoder
from alure.kernels.encoding.kernel_features import cycle, decay, octave
from alure.kernels.jagged import segment_ids

MAX_BLOCK_D = 128
MAX_BLOCK_K = {2: 64, 4: 32}  # by bytes of the table's dtype; larger tiles of float32 spill


@triton.jit(do_not_specialize=["total"])
def encode_events_kernel(
    p_out,
    p_table,
    p_ids,
    p_sequence,
    p_offsets,
    p_times,
    p_reference_times,
    p_counts,
    p_dense,
    p_utc_offsets,
    p_id_weight,
    p_dense_weight,
    p_time_weight,
    p_bias,
    p_position_table,
    p_frequency_table,
    p_periods,
    p_phases,
    total,
    tau,
    num_positions,
    A: tl.constexpr,
    D_E: tl.constexpr,
    D_DENSE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t = i_t < total
    m_d = i_d < D
    b_out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    b_out += tl.load(p_bias + i_d, mask=m_d, other=0.0).to(tl.float32)[None, :]

    # content: Σ_a table[ids[:, a]] @ id_weight[a]
    for a in range(A):  # loop: attributes
        b_id = tl.load(p_ids + i_t * A + a, mask=m_t, other=-1)
        m_id = b_id >= 0
        for e in range(0, D_E, BLOCK_E):
            i_e = e + tl.arange(0, BLOCK_E)
            m_e = i_e < D_E
            b_x = tl.load(p_table + b_id[:, None] * D_E + i_e[None, :], mask=m_id[:, None] & m_e[None, :], other=0.0)
            o_w = (a * D_E + i_e)[:, None] * D + i_d[None, :]
            b_w = tl.load(p_id_weight + o_w, mask=m_e[:, None] & m_d[None, :], other=0.0)
            b_out = tl.dot(b_x.to(DOT), b_w.to(DOT), b_out, input_precision="tf32x3")
    if p_dense is not None:
        for k in range(0, D_DENSE, BLOCK_K):  # loop: dense
            i_k = k + tl.arange(0, BLOCK_K)
            m_k = i_k < D_DENSE
            b_dense = tl.load(p_dense + i_t[:, None] * D_DENSE + i_k, mask=m_t[:, None] & m_k, other=0.0)
            o_dense = i_k[:, None].to(tl.int64) * D + i_d[None, :]
            b_weight = tl.load(p_dense_weight + o_dense, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_out = tl.dot(b_dense.to(DOT), b_weight.to(DOT), b_out, input_precision="tf32x3")

    # temporal decay and cycles: rank-1 updates
    b_time, b_order, b_age, b_gap = decay(p_sequence, p_offsets, p_times, p_reference_times, i_t, m_t, tau)
    b_w = tl.load(p_time_weight + i_d, mask=m_d, other=0.0).to(tl.float32)
    b_out += b_age[:, None] * b_w[None, :]
    b_w = tl.load(p_time_weight + D + i_d, mask=m_d, other=0.0).to(tl.float32)
    b_out += b_gap[:, None] * b_w[None, :]
    if p_utc_offsets is not None:
        b_time += tl.load(p_utc_offsets + i_t, mask=m_t, other=0)
    for p in tl.static_range(P):
        b_sine, b_cosine = cycle(b_time, p_periods, p_phases, p)
        b_w = tl.load(p_time_weight + (2 + p) * D + i_d, mask=m_d, other=0.0).to(tl.float32)
        b_out += b_sine[:, None] * b_w[None, :]
        b_w = tl.load(p_time_weight + (2 + P + p) * D + i_d, mask=m_d, other=0.0).to(tl.float32)
        b_out += b_cosine[:, None] * b_w[None, :]

    # absolute position and frequency
    m_td = m_t[:, None] & m_d[None, :]
    o_position = tl.minimum(b_order, num_positions - 1)[:, None] * D + i_d[None, :]
    b_out += tl.load(p_position_table + o_position, mask=m_td, other=0.0).to(tl.float32)
    if p_counts is not None:
        o_frequency = octave(p_counts, i_t, m_t, F)[:, None] * D + i_d[None, :]
        b_out += tl.load(p_frequency_table + o_frequency, mask=m_td, other=0.0).to(tl.float32)
    tl.store(p_out + i_t[:, None] * D + i_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_td)


def encode_events(table: Tensor, events: EventColumns, encoder: EventEncoder) -> Tensor:
    """[total, D] in the table's dtype (float16, bfloat16 or float32). Arguments must have been checked."""
    total, attributes = events.ids.shape
    d_e, width = encoder.id_weight.shape[1:]
    out = torch.empty(total, width, dtype=table.dtype, device=table.device)
    if total == 0 or width == 0:
        return out
    dense = events.dense
    if dense is not None and dense.dtype == torch.float64:
        dense = dense.to(torch.float32)
    d_dense = 0 if dense is None else dense.shape[1]
    pointers = (
        out, table, events.ids, segment_ids(events.offsets, total), events.offsets, events.timestamps,
        events.reference_times, events.counts, dense, events.utc_offsets, encoder.id_weight, encoder.dense_weight,
        encoder.time_weight, encoder.bias, encoder.position_table, encoder.frequency_table, encoder.periods,
        encoder.phases,
    )  # fmt: skip
    tiles = _tiles(d_e, d_dense, width, table.dtype, capability(table.device))
    with on_device(table):
        encode_events_kernel[(triton.cdiv(total, tiles["BLOCK_T"]), triton.cdiv(width, tiles["BLOCK_D"]))](
            *(None if x is None else x.contiguous() for x in pointers),
            total,
            encoder.tau,
            encoder.position_table.shape[0],
            A=attributes,
            P=encoder.periods.numel(),
            F=min(encoder.frequency_table.shape[0], 63),  # counts are below 2^62
            **tiles,
        )
    return out


def _tiles(d_e: int, d_dense: int, width: int, dtype: torch.dtype, major: int) -> dict:
    """Tile sizes, and what matrix products read: the interpreter's bfloat16 products are wrong, so float32 there.

    Hopper multiplies 64 rows at a time, with half of the instructions a value or less; elsewhere so many spill. They do
    on Hopper, too, where rows of weights are not read by whole vectors, or those of the table by whole words: then each
    value has an address, and twice as many warps share them.
    """
    native = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    block_d, longest = _block(width, MAX_BLOCK_D), MAX_BLOCK_K[dtype.itemsize]
    vectors = width * dtype.itemsize % 16 == 0 and all(size * dtype.itemsize % 4 == 0 for size in (d_e, d_dense))
    hopper = major == HOPPER and vectors
    few_warps = (block_d <= 64 and vectors) or (hopper and dtype.itemsize == 2)
    return {
        "D_E": d_e,
        "D_DENSE": d_dense,
        "D": width,
        "BLOCK_T": 64 if hopper else 32,
        "BLOCK_E": _block(d_e, longest),
        "BLOCK_K": _block(d_dense, longest),
        "BLOCK_D": block_d,
        "DOT": tl.float32 if triton.knobs.runtime.interpret else native,
        "num_warps": 4 if few_warps else 8,
    }


def _block(size: int, largest: int) -> int:
    """A power of two that tl.dot accepts."""
    return max(16, min(largest, triton.next_power_of_2(max(size, 1))))


def _case(
    attributes: int, d_e: int, width: int, d_dense: int, dtype: torch.dtype, architectures: tuple[int, ...]
) -> tuple:
    """A shipped shape; those with dense features have the other optional columns too."""
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    floats = ("out", "table", "id_weight", "time_weight", "bias", "position_table", "frequency_table")
    integers = ("ids", "sequence", "offsets", "times", "reference_times", "periods")
    signature = {f"p_{name}": f"*{kind}:16" for name in floats} | {f"p_{name}": "*i64:16" for name in integers}
    signature |= {"p_phases": "*fp32:16", "total": "i32", "tau": "fp32", "num_positions": "i32"}
    tiles = _tiles(d_e, d_dense, width, dtype, architectures[0] // 10)
    constexprs = {"A": attributes, "P": 6, "F": 16, **tiles}
    options = {"num_warps": constexprs.pop("num_warps")}
    if d_dense:
        signature |= {"p_dense": "*fp32:16", "p_dense_weight": f"*{kind}:16"}
        signature |= {"p_counts": "*i64:16", "p_utc_offsets": "*i64:16"}
    else:
        constexprs |= {"p_dense": None, "p_dense_weight": None, "p_counts": None, "p_utc_offsets": None}
    loops = ("attributes", "dense") if d_dense else ("attributes",)
    facts = {
        "name": f"forward {kind} {attributes}x{d_e} {d_dense} {width}" + " hopper" * (90 in architectures),
        "loops": dict.fromkeys(loops, tiles["BLOCK_T"] * tiles["BLOCK_D"]),
        "architectures": architectures,
    }
    return encode_events_kernel, signature, constexprs, options, facts


_SHAPES = (
    (3, 32, 64, 0, torch.float32),
    (4, 32, 64, 64, torch.float16),
    (4, 64, 192, 384, torch.bfloat16),
    (8, 128, 512, 768, torch.bfloat16),
    (8, 100, 100, 50, torch.float32),
    (2, 70, 150, 100, torch.bfloat16),
)
AHEAD_OF_TIME = [
    *(_case(*shape, architectures) for shape in _SHAPES for architectures in ((90,), (80, 100))),
    *kernel_backward.AHEAD_OF_TIME,
]
