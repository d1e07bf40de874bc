"""Triton kernels of the backward of `encode_events`. No atomics: every sum has one order, fixed by the batch's shape.

time_features: one program a block of events writes the features of time, and a 1 for the bias, and the rows of the
position and frequency table.
weight_gradient: one program a block of features × a block of columns × a split of the events sums xᵀ · grad; splits are
added up in order. Gathered embeddings, dense and time features are all such x; the first are gathered again.
sum_rows: gradients of tables. The rows' indices are sorted; one program a chunk of them sums each run of equal indices,
and a second kernel joins the runs that cross chunks, whose pieces lie side by side.

The gradient of a gathered embedding is grad · id_weightᵀ, a plain product. A phase turns its sine into its cosine and
its cosine into minus its sine, in every event alike, so its gradient is made of those of the time weight.

    grad [total, D] · x [total, F] · partials [splits, F, D] · features [2 + 2P + 1, total];  sums in float32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import on_device
from alure.kernels.encoding.arguments import EventColumns, EventEncoder, Gradients
from alure.kernels.encoding.kernel_features import cycle, decay, octave
from alure.kernels.jagged import segment_ids

BLOCK_EVENTS = 128  # of time_features
BLOCK_T = {2: 64, 4: 32}  # events of a product at a time, by bytes of its operands
MAX_BLOCK = 64  # features, and columns, of a product
MAX_SPLITS = 64
CHUNK = 64  # sorted rows a program of sum_rows
JOINED = 16  # chunks joined at a time


@triton.jit(do_not_specialize=["total"])
def time_features_kernel(
    p_features,
    p_positions,
    p_frequencies,
    p_sequence,
    p_offsets,
    p_times,
    p_reference_times,
    p_counts,
    p_utc_offsets,
    p_periods,
    p_phases,
    total,
    tau,
    num_positions,
    P: tl.constexpr,
    F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = i_t < total
    stride = tl.cast(total, tl.int64)
    b_time, b_order, b_age, b_gap = decay(p_sequence, p_offsets, p_times, p_reference_times, i_t, m_t, tau)
    tl.store(p_features + i_t, b_age, mask=m_t)
    tl.store(p_features + stride + i_t, b_gap, mask=m_t)
    if p_utc_offsets is not None:
        b_time += tl.load(p_utc_offsets + i_t, mask=m_t, other=0)
    for p in tl.static_range(P):
        b_sine, b_cosine = cycle(b_time, p_periods, p_phases, p)
        tl.store(p_features + (2 + p) * stride + i_t, b_sine, mask=m_t)
        tl.store(p_features + (2 + P + p) * stride + i_t, b_cosine, mask=m_t)
    tl.store(p_features + (2 + 2 * P) * stride + i_t, tl.full((BLOCK_T,), 1.0, tl.float32), mask=m_t)
    tl.store(p_positions + i_t, tl.minimum(b_order, num_positions - 1), mask=m_t)
    if p_counts is not None:
        tl.store(p_frequencies + i_t, octave(p_counts, i_t, m_t, F), mask=m_t)


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=["x_feature"])
def weight_gradient_kernel(
    p_partials,
    p_x,
    p_ids,
    p_grad,
    total,
    split,
    x_row,
    x_feature,
    A: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """x [rows, F] at strides (x_row, x_feature); row ids[t, a] of attribute a for event t, or row t without ids."""
    BLOCKS_F: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    a = tl.program_id(0) // BLOCKS_F
    i_f = tl.program_id(0) % BLOCKS_F * BLOCK_F + tl.arange(0, BLOCK_F)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i_split = tl.program_id(2).to(tl.int64)
    m_f = i_f < F
    m_d = i_d < D
    begin = i_split * split
    end = tl.minimum(begin + split, total)
    b_sum = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    for t in range(begin, end, BLOCK_T):
        i_t = t + tl.arange(0, BLOCK_T)
        m_t = i_t < end
        if p_ids is not None:
            b_row = tl.load(p_ids + i_t * A + a, mask=m_t, other=-1)
        else:
            b_row = tl.where(m_t, i_t, -1)
        o_x = b_row[None, :] * x_row + i_f[:, None].to(tl.int64) * x_feature
        b_x = tl.load(p_x + o_x, mask=(b_row >= 0)[None, :] & m_f[:, None], other=0.0)
        b_grad = tl.load(p_grad + i_t[:, None] * D + i_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_sum = tl.dot(b_x.to(DOT), b_grad.to(DOT), b_sum, input_precision="tf32x3")
    o_partial = (i_split * A * F + a * F + i_f)[:, None] * D + i_d[None, :]
    tl.store(p_partials + o_partial, b_sum, mask=m_f[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["total"])
def sum_runs_kernel(
    p_out,
    p_heads,
    p_tails,
    p_keys,
    p_order,
    p_x,
    total,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Runs inside a chunk → out; what continues a run of the chunk before → heads; what the next continues → tails."""
    i_chunk = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < D
    begin = i_chunk * CHUNK
    end = tl.minimum(begin + CHUNK, total)
    before = tl.load(p_keys + begin - 1, mask=begin > 0, other=-1)
    key = tl.load(p_keys + begin)
    continues = (begin > 0) & (before == key)
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(begin, end):
        row = tl.load(p_order + i)
        b_sum += tl.load(p_x + row * D + i_d, mask=m_d, other=0.0).to(tl.float32)
        following = tl.load(p_keys + i + 1, mask=i + 1 < total, other=-1)
        goes_on = (i + 1 < total) & (following == key)
        if (i + 1 == end) | (following != key):
            if continues:
                tl.store(p_heads + i_chunk * D + i_d, b_sum, mask=m_d)
            elif goes_on:
                tl.store(p_tails + i_chunk * D + i_d, b_sum, mask=m_d)
            elif key >= 0:
                tl.store(p_out + key * D + i_d, b_sum.to(p_out.dtype.element_ty), mask=m_d)
            b_sum = tl.zeros((BLOCK_D,), tl.float32)
            continues = continues & False
            key = following


@triton.jit(do_not_specialize=["total", "num_chunks"])
def join_runs_kernel(
    p_out,
    p_heads,
    p_tails,
    p_keys,
    total,
    num_chunks,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    JOINED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The run that begins in a chunk and goes on after it: its tail and the heads of the chunks it reaches."""
    i_chunk = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = i_d < D
    begin = i_chunk * CHUNK
    last = tl.minimum(begin + CHUNK, total) - 1
    key = tl.load(p_keys + last)
    following = tl.load(p_keys + last + 1, mask=last + 1 < total, other=-1)
    before = tl.load(p_keys + begin - 1, mask=begin > 0, other=-1)
    if (key >= 0) & (key == following) & (key != before):
        b_sum = tl.load(p_tails + i_chunk * D + i_d, mask=m_d, other=0.0)
        first = i_chunk + 1
        reached = first < num_chunks
        while reached:
            i_c = first + tl.arange(0, JOINED)
            m_c = i_c < num_chunks
            m_c = m_c & (tl.load(p_keys + i_c * CHUNK, mask=m_c, other=-1) == key)
            o_head = i_c[:, None] * D + i_d[None, :]
            b_sum += tl.sum(tl.load(p_heads + o_head, mask=m_c[:, None] & m_d[None, :], other=0.0), 0)
            first += JOINED
            reached = tl.sum(m_c.to(tl.int32), 0) == JOINED
        tl.store(p_out + key * D + i_d, b_sum.to(p_out.dtype.element_ty), mask=m_d)


def encode_events_backward(
    grad: Tensor, table: Tensor, events: EventColumns, encoder: EventEncoder, wants_dense: bool
) -> Gradients:
    """Gradients for `grad` [total, D], each in the dtype of its argument. Arguments must have been checked."""
    grad, dtype = grad.contiguous(), table.dtype
    attributes, d_e, width = encoder.id_weight.shape
    num_periods = encoder.periods.numel()
    features, positions, frequencies = _time_features(events, encoder)

    d_ids = _weight_gradient(table.contiguous(), grad, events.ids.contiguous())
    d_time = _weight_gradient(features.T, grad, None)
    d_dense_weight = grad.new_empty(0, width, dtype=torch.float32)
    d_dense = grad.new_empty(0, dtype=torch.float32)
    if events.dense is not None and encoder.dense_weight is not None:
        dense = events.dense.to(torch.float32) if events.dense.dtype == torch.float64 else events.dense
        d_dense_weight = _weight_gradient(dense.contiguous(), grad, None)
        if wants_dense:
            d_dense = (grad @ encoder.dense_weight.T).to(events.dense.dtype)
    sines, cosines = encoder.time_weight[2:].to(torch.float32).tensor_split(2)
    d_sines, d_cosines = d_time[2:-1].tensor_split(2)

    found = (grad @ encoder.id_weight.flatten(0, 1).T).view(-1, d_e)
    return Gradients(
        table=sum_rows(found, events.ids.flatten(), table.shape[0]),
        dense=d_dense,
        id_weight=d_ids.view(attributes, d_e, width).to(dtype),
        dense_weight=d_dense_weight.to(dtype),
        time_weight=d_time[: 2 + 2 * num_periods].to(dtype, copy=True),
        bias=d_time[-1].to(dtype, copy=True),
        position_table=sum_rows(grad, positions, encoder.position_table.shape[0]),
        frequency_table=torch.zeros_like(encoder.frequency_table, memory_format=torch.contiguous_format)
        if frequencies is None
        else sum_rows(grad, frequencies, encoder.frequency_table.shape[0]),
        phases=(sines * d_cosines - cosines * d_sines).sum(1).to(encoder.phases.dtype),
    )


def sum_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """[num_rows, d] like x [n, d]: row i is the sum of the rows whose `index` (int64 [n], −1 for none) is i."""
    (n, d), x = x.shape, x.contiguous()
    out = x.new_zeros(num_rows, d)
    if n == 0 or d == 0:
        return out
    keys, order = torch.sort(index, stable=True)
    num_chunks, block = triton.cdiv(n, CHUNK), min(128, triton.next_power_of_2(d))
    heads, tails = (torch.empty(num_chunks, d, dtype=torch.float32, device=x.device) for _ in range(2))
    grid = num_chunks, triton.cdiv(d, block)
    with on_device(x):
        sum_runs_kernel[grid](out, heads, tails, keys, order, x, n, D=d, CHUNK=CHUNK, BLOCK_D=block, num_warps=1)
        join_runs_kernel[grid](
            out, heads, tails, keys, n, num_chunks, D=d, CHUNK=CHUNK, JOINED=JOINED, BLOCK_D=block, num_warps=1
        )
    return out


def _time_features(events: EventColumns, encoder: EventEncoder) -> tuple[Tensor, Tensor, Tensor | None]:
    """features [2 + 2P + 1, total] float32, the last row 1; rows of the position and frequency table, int64 [total]."""
    total, num_periods, device = events.ids.shape[0], encoder.periods.numel(), events.ids.device
    features = torch.empty(3 + 2 * num_periods, total, dtype=torch.float32, device=device)
    positions = torch.empty(total, dtype=torch.int64, device=device)
    frequencies = None if events.counts is None else torch.empty_like(positions)
    if total:
        columns = (
            segment_ids(events.offsets, total), events.offsets, events.timestamps, events.reference_times,
            events.counts, events.utc_offsets, encoder.periods, encoder.phases,
        )  # fmt: skip
        with on_device(features):
            time_features_kernel[(triton.cdiv(total, BLOCK_EVENTS),)](
                features,
                positions,
                frequencies,
                *(None if x is None else x.contiguous() for x in columns),
                total,
                encoder.tau,
                encoder.position_table.shape[0],
                P=num_periods,
                F=min(encoder.frequency_table.shape[0], 63),  # counts are below 2^62
                BLOCK_T=BLOCK_EVENTS,
            )
    return features, positions, frequencies


def _weight_gradient(x: Tensor, grad: Tensor, ids: Tensor | None) -> Tensor:
    """float32 [A·F, D]: xᵀ · grad, of the rows ids [total, A] of x [rows, F], or of all rows (A = 1)."""
    (total, width), num_features = grad.shape, x.shape[1]
    attributes = 1 if ids is None else ids.shape[1]
    out_rows = attributes * num_features
    if total == 0 or out_rows == 0 or width == 0:
        return torch.zeros(out_rows, width, dtype=torch.float32, device=grad.device)
    tiles = _tiles(attributes, num_features, width, torch.promote_types(x.dtype, grad.dtype))
    split = triton.cdiv(triton.cdiv(total, MAX_SPLITS), tiles["BLOCK_T"]) * tiles["BLOCK_T"]
    splits = triton.cdiv(total, split)
    partials = torch.empty(splits, out_rows, width, dtype=torch.float32, device=grad.device)
    grid = (
        attributes * triton.cdiv(num_features, tiles["BLOCK_F"]),
        triton.cdiv(width, tiles["BLOCK_D"]),
        splits,
    )
    with on_device(grad):
        weight_gradient_kernel[grid](partials, x, ids, grad, total, split, *x.stride(), **tiles)
    return partials.sum(0)


def _tiles(attributes: int, num_features: int, width: int, dtype: torch.dtype) -> dict:
    """Tile sizes, and what products read: the interpreter's bfloat16 products are wrong, so float32 there."""
    native = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    return {
        "A": attributes,
        "F": num_features,
        "D": width,
        "BLOCK_T": BLOCK_T[dtype.itemsize],
        "BLOCK_F": max(16, min(MAX_BLOCK, triton.next_power_of_2(num_features))),
        "BLOCK_D": max(16, min(MAX_BLOCK, triton.next_power_of_2(width))),
        "DOT": tl.float32 if triton.knobs.runtime.interpret else native,
        "num_warps": 4,
    }


def _cases(attributes: int, d_e: int, width: int, d_dense: int, dtype: torch.dtype) -> list[tuple]:
    """The kernels of a shipped shape; those with dense features have the other optional columns too."""
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    shape = f"{kind} {attributes}x{d_e} {d_dense} {width}"
    chunk = {"CHUNK": CHUNK, "BLOCK_D": min(128, triton.next_power_of_2(d_e)), "D": d_e}
    runs = dict.fromkeys(("p_heads", "p_tails"), "*fp32:16") | {"p_out": f"*{kind}:16", "p_keys": "*i64:16"}
    one_warp = {"num_warps": 1}
    cases = [
        (
            sum_runs_kernel,
            runs | {"p_order": "*i64:16", "p_x": f"*{kind}:16", "total": "i32"},
            chunk,
            one_warp,
            {"name": f"sum runs {shape}"},
        ),
        (
            join_runs_kernel,
            runs | {"total": "i32", "num_chunks": "i32"},
            chunk | {"JOINED": JOINED},
            one_warp,
            {"name": f"join runs {shape}"},
        ),
    ]
    products = [("ids", kind, attributes, d_e), ("time", "fp32", 1, 15)] + [("dense", "fp32", 1, d_dense)] * (
        d_dense > 0
    )
    for name, x, count, features in products:
        operands = torch.float32 if "fp32" in (x, kind) else dtype
        constexprs = _tiles(count, features, width, operands)
        options = {"num_warps": constexprs.pop("num_warps")}
        signature = {
            "p_partials": "*fp32:16",
            "p_x": f"*{x}:16",
            "p_grad": f"*{kind}:16",
            "total": "i32",
            "split": "i32:16",
        }
        signature["x_feature" if name == "time" else "x_row"] = "i32"
        constexprs["x_row" if name == "time" else "x_feature"] = 1
        if name == "ids":
            signature["p_ids"] = "*i64:16"
        else:
            constexprs["p_ids"] = None
        cases.append((weight_gradient_kernel, signature, constexprs, options, {"name": f"{name} weight {shape}"}))
    columns = ("sequence", "offsets", "times", "reference_times", "periods")
    signature = {f"p_{name}": "*i64:16" for name in columns} | {"p_phases": "*fp32:16", "p_features": "*fp32:16"}
    signature |= {"p_positions": "*i64:16", "total": "i32", "tau": "fp32", "num_positions": "i32"}
    optional = ("p_frequencies", "p_counts", "p_utc_offsets")
    constexprs = {"P": 6, "F": 16, "BLOCK_T": BLOCK_EVENTS}
    if d_dense:
        signature |= dict.fromkeys(optional, "*i64:16")
    else:
        constexprs |= dict.fromkeys(optional)
    return [*cases, (time_features_kernel, signature, constexprs, {}, {"name": f"time features {shape}"})]


AHEAD_OF_TIME = [
    *_cases(5, 32, 64, 0, torch.float32),
    *_cases(4, 64, 192, 384, torch.bfloat16),
    *_cases(8, 100, 100, 50, torch.float32),
]
