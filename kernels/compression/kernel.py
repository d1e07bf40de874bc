"""Triton kernels of compression. Sums in float32.

dot_linear: one program a user. XᵀY and W_L X both contract over n, so [Y | W_Lᵀ] is one matrix W [n, r + k].
First XᵀW [d, r + k] stays in registers over the whole loop: r columns of S, then k columns of Zᵀ. Then D = X S, rows
block by block; this second look at X (77 KB at n = 400, d = 96 in bfloat16) comes from the cache.

    x [B, n, d] · mix [n, r] · linear [k, n] · z [B, k, d] float32 · products [B, n, r] · scale = 1 / RMS(D) [B] float32

activate: hidden = scale · D W₁ + b₁ and its GELU, all [B, h]: RMSNorm's factor commutes with the product.

normalize: one program a block of rows of L2(RMSNorm(v)), v = z + gate ⊙ update, all [B·k, d]; as codes where there are
scales.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import on_device
from alure.kernels.compression.parameters import DotLinearCompression
from alure.kernels.compression.reference import INT8_LARGEST, L2_EPSILON, RMS_EPSILON

SMALLEST_STEP = torch.finfo(torch.float32).tiny


@triton.jit
def dot_linear_kernel(
    p_x,
    p_mix,
    p_linear,
    p_z,
    p_products,
    p_scale,
    n: tl.constexpr,
    d: tl.constexpr,
    r: tl.constexpr,
    k: tl.constexpr,
    epsilon: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DOT: tl.constexpr,
):
    i_user = tl.program_id(0).to(tl.int64)
    p_x += i_user * n * d
    p_z += i_user * k * d
    p_products += i_user * n * r
    i_w = tl.arange(0, BLOCK_W)[None, :]
    i_d = tl.arange(0, BLOCK_D)
    m_s = i_w < r
    m_z = (i_w >= r) & (i_w < r + k)

    b_s = tl.zeros((BLOCK_D, BLOCK_W), tl.float32)
    for start_n in range(0, n, BLOCK_N):
        i_n = start_n + tl.arange(0, BLOCK_N)[:, None]
        m_n = i_n < n
        b_x = tl.load(p_x + i_n * d + i_d[None, :], mask=m_n & (i_d < d)[None, :], other=0.0)
        b_mix = tl.load(p_mix + i_n * r + i_w, mask=m_n & m_s, other=0.0)
        b_linear = tl.load(p_linear + (i_w - r) * n + i_n, mask=m_n & m_z, other=0.0)
        b_w = tl.where(m_s, b_mix, b_linear)
        b_s = tl.dot(tl.trans(b_x.to(DOT)), b_w.to(DOT), b_s, input_precision="tf32x3")
    tl.store(p_z + (i_w - r) * d + i_d[:, None], b_s, mask=m_z & (i_d < d)[:, None])

    b_summary = b_s.to(DOT)
    b_squares = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for start_n in range(0, n, BLOCK_N):
        i_n = start_n + tl.arange(0, BLOCK_N)[:, None]
        m_n = i_n < n
        b_x = tl.load(p_x + i_n * d + i_d[None, :], mask=m_n & (i_d < d)[None, :], other=0.0)
        b_products = tl.dot(b_x.to(DOT), b_summary, input_precision="tf32x3")
        b_products = tl.where(m_s, b_products, 0.0)
        b_squares += b_products * b_products
        tl.store(p_products + i_n * r + i_w, b_products.to(p_products.dtype.element_ty), mask=m_n & m_s)
    b_sum = tl.sum(tl.sum(b_squares, 1, keep_dims=True), 0, keep_dims=True)  # [1, 1]: sm_100 reduces no vector from MMA
    tl.store(p_scale + i_user + tl.zeros_like(b_sum).to(tl.int32), tl.rsqrt(b_sum / (n * r) + epsilon))


@triton.jit
def activate_kernel(p_product, p_scale, p_bias, p_hidden, p_activation, size, width, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < size
    b_product = tl.load(p_product + i, mask=m, other=0.0).to(tl.float32)
    b_scale = tl.load(p_scale + i // width, mask=m, other=0.0)
    b_bias = tl.load(p_bias + i % width, mask=m, other=0.0).to(tl.float32)
    b_hidden = b_product * b_scale + b_bias
    # GELU, tanh form: x · sigmoid(2 √(2/π) (x + 0.044715 x³))
    b_activation = b_hidden * tl.sigmoid(1.5957691216 * (b_hidden + 0.044715 * b_hidden * b_hidden * b_hidden))
    tl.store(p_hidden + i, b_hidden, mask=m)
    tl.store(p_activation + i, b_activation.to(p_activation.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows"])
def normalize_kernel(
    p_z,
    p_update,
    p_gate,
    p_out,
    p_scales,
    num_rows,
    k,
    d,
    rms_epsilon,
    l2_epsilon,
    largest_code,
    smallest_step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i_d = tl.arange(0, BLOCK_D)
    m = (i_row < num_rows)[:, None] & (i_d < d)[None, :]
    o_row = i_row[:, None] * d + i_d[None, :]
    b_v = tl.load(p_z + o_row, mask=m, other=0.0).to(tl.float32)
    if p_update is not None:
        b_update = tl.load(p_update + o_row, mask=m, other=0.0).to(tl.float32)
        b_gate = tl.load(p_gate + (i_row % k)[:, None] * d + i_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_v += b_gate * b_update
    b_sum = tl.sum(b_v * b_v, 1)
    b_rms = tl.rsqrt(b_sum / d + rms_epsilon)
    b_u = b_v * b_rms[:, None]
    b_length = tl.maximum(tl.sqrt(tl.sum(b_u * b_u, 1)), l2_epsilon)
    if p_scales is None:
        tl.store(p_out + o_row, (b_u / b_length[:, None]).to(p_out.dtype.element_ty), mask=m)
    else:
        b_largest = tl.where(b_sum == b_sum, tl.max(tl.abs(b_v), 1), b_sum)  # a maximum can lose a NaN
        b_step = tl.div_rn(b_largest, tl.zeros_like(b_largest) + largest_code)
        m_usable = (b_step >= smallest_step) & (b_step < float("inf"))
        b_divisor = tl.where(m_usable, b_step, 1.0)[:, None]
        b_codes = tl.div_rn(b_v, tl.zeros_like(b_v) + b_divisor)
        b_codes = (b_codes + 12582912.0) - 12582912.0  # 1.5·2^23: rounds half to even
        tl.store(p_out + o_row, tl.where(m_usable[:, None], b_codes, 0.0).to(tl.int8), mask=m)
        tl.store(p_scales + i_row, b_step * b_rms / b_length, mask=i_row < num_rows)


def dot_linear(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Embeddings [B, k, d] in x's dtype and the hidden layer before its activation, [B, h] float32."""
    z, update, hidden = _dot_linear(x, compression)
    out = torch.empty(z.shape, dtype=x.dtype, device=x.device)
    _normalize(z, update, compression.gate, out, None)
    return out, hidden


def dot_linear_int8(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Codes int8 [B, k, d] and scales float32 [B, k]."""
    z, update, _ = _dot_linear(x, compression)
    codes, scales = _empty_int8(z)
    _normalize(z, update, compression.gate, codes, scales)
    return codes, scales


def normalize(v: Tensor) -> Tensor:
    """L2(RMSNorm(v)) over the last dimension, in v's dtype."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _normalize(v, None, None, out, None)
    return out


def normalize_int8(v: Tensor) -> tuple[Tensor, Tensor]:
    """The same as codes int8, like v, and scales float32 [...]."""
    codes, scales = _empty_int8(v)
    _normalize(v, None, None, codes, scales)
    return codes, scales


def _empty_int8(v: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(v.shape, dtype=torch.int8, device=v.device)
    return codes, torch.empty(v.shape[:-1], dtype=torch.float32, device=v.device)


def _dot_linear(x: Tensor, c: DotLinearCompression) -> tuple[Tensor, Tensor, Tensor]:
    """Z [B, k, d] float32, the MLP's update [B, k·d] in x's dtype, the hidden layer [B, h] float32."""
    (batch, n, d), k, r, h = x.shape, c.linear.shape[0], c.mix.shape[1], c.hidden_bias.shape[0]
    z = torch.empty(batch, k, d, dtype=torch.float32, device=x.device)
    products = torch.empty(batch, n * r, dtype=x.dtype, device=x.device)
    scale = torch.empty(batch, dtype=torch.float32, device=x.device)
    hidden = torch.empty(batch, h, dtype=torch.float32, device=x.device)
    activation = torch.empty(batch, h, dtype=x.dtype, device=x.device)
    if batch:
        tensors = (x.contiguous(), c.mix.contiguous(), c.linear.contiguous(), z, products, scale)
        with on_device(x):
            dot_linear_kernel[(batch,)](*tensors, n=n, d=d, r=r, k=k, **_tiles(n, d, r + k, x.dtype))
    if hidden.numel():
        product = products @ c.hidden_weight
        tensors = (product, scale, c.hidden_bias.contiguous(), hidden, activation)
        with on_device(x):
            activate_kernel[(triton.cdiv(batch * h, 1024),)](*tensors, batch * h, h, BLOCK=1024)
    return z, torch.addmm(c.output_bias, activation, c.output_weight), hidden


def _normalize(z: Tensor, update: Tensor | None, gate: Tensor | None, out: Tensor, scales: Tensor | None) -> None:
    """Writes `out`: embeddings, or codes where `scales` take what they are to be multiplied by."""
    k, d = z.shape[-2:]
    if out.numel() == 0:
        return
    rows, gate = out.numel() // d, None if gate is None else gate.contiguous()
    block = _normalize_block(d)
    numbers = (RMS_EPSILON, L2_EPSILON, float(INT8_LARGEST), SMALLEST_STEP)
    grid = (triton.cdiv(rows, block["BLOCK_ROWS"]),)
    with on_device(z):
        normalize_kernel[grid](z.contiguous(), update, gate, out, scales, rows, k, d, *numbers, **block)


def _normalize_block(d: int) -> dict:
    block_d = triton.next_power_of_2(d)
    return {"BLOCK_ROWS": max(1, 1024 // block_d), "BLOCK_D": block_d}


def _tiles(n: int, d: int, weights: int, dtype: torch.dtype) -> dict:
    """Tile sizes, and what matrix products read: the interpreter's bfloat16 products are wrong, so float32 there."""
    native = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    block_d = max(16, triton.next_power_of_2(d))
    block_w = max(32 if block_d > 128 else 16, triton.next_power_of_2(weights))
    large = block_d * block_w > 4096
    # three TF32 products for one of float32 hold the parts of both factors in registers
    most_n = 16 if large and dtype == torch.float32 else min(64, 32768 // (block_d * dtype.itemsize))
    return {
        "epsilon": RMS_EPSILON,
        "BLOCK_N": max(16, min(most_n, triton.next_power_of_2(n))),
        "BLOCK_D": block_d,
        "BLOCK_W": block_w,
        "DOT": tl.float32 if triton.knobs.runtime.interpret else native,
        "num_warps": 8 if large else 4,
    }


KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def _dot_linear_case(n: int, d: int, k: int, r: int, dtype: torch.dtype) -> tuple:
    kind = KINDS[dtype]
    signature = {f"p_{name}": f"*{kind}:16" for name in ("x", "mix", "linear", "products")}
    signature |= {"p_z": "*fp32:16", "p_scale": "*fp32:16"}
    constexprs = {"n": n, "d": d, "k": k, "r": r, **_tiles(n, d, r + k, dtype)}
    options = {"num_warps": constexprs.pop("num_warps")}
    return dot_linear_kernel, signature, constexprs, options, {"name": f"dot_linear {kind} n={n} d={d} k={k} r={r}"}


def _activate_case(dtype: torch.dtype) -> tuple:
    kind = KINDS[dtype]
    signature = {"p_product": f"*{kind}:16", "p_scale": "*fp32:16", "p_bias": f"*{kind}:16", "p_hidden": "*fp32:16"}
    signature |= {"p_activation": f"*{kind}:16", "size": "i32", "width": "i32"}
    return activate_kernel, signature, {"BLOCK": 1024}, {}, {"name": f"activate {kind}"}


def _normalize_case(d: int, dtype: torch.dtype, gated: bool, int8: bool) -> tuple:
    kind = KINDS[dtype]
    signature = {"p_z": "*fp32:16" if gated else f"*{kind}:16", "p_out": "*i8:16" if int8 else f"*{kind}:16"}
    signature |= {"num_rows": "i32", "k": "i32", "d": "i32"}
    signature |= dict.fromkeys(("rms_epsilon", "l2_epsilon", "largest_code", "smallest_step"), "fp32")
    absent = {}
    for name, kind_here, here in (("update", kind, gated), ("gate", kind, gated), ("scales", "fp32", int8)):
        (signature if here else absent)[f"p_{name}"] = f"*{kind_here}:16" if here else None
    name = f"normalize {kind} d={d}" + " gated" * gated + " int8" * int8
    return normalize_kernel, signature, _normalize_block(d) | absent, {}, {"name": name}


AHEAD_OF_TIME = [
    _dot_linear_case(16, 64, 2, 8, torch.float32),
    _dot_linear_case(64, 64, 2, 8, torch.bfloat16),
    _dot_linear_case(256, 96, 2, 24, torch.float32),
    _dot_linear_case(256, 96, 2, 24, torch.bfloat16),
    _dot_linear_case(250, 192, 4, 24, torch.float16),
    _dot_linear_case(250, 192, 4, 60, torch.bfloat16),
    _dot_linear_case(250, 192, 4, 28, torch.float32),
    _dot_linear_case(130, 100, 4, 60, torch.float32),
    _dot_linear_case(512, 512, 4, 28, torch.bfloat16),
    _dot_linear_case(511, 256, 3, 13, torch.float32),
    _activate_case(torch.bfloat16),
    _activate_case(torch.float32),
    _normalize_case(64, torch.float32, gated=True, int8=False),
    _normalize_case(500, torch.bfloat16, gated=True, int8=True),
    _normalize_case(4096, torch.float32, gated=False, int8=False),
    _normalize_case(96, torch.float16, gated=False, int8=True),
]
