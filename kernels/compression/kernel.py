"""Triton kernels of dot-linear compression.

dot_linear: one program a user. XᵀY and W_L X both contract over n, so the rows [Yᵀ; W_L] are one matrix W [r + k, n].
First T = W X, columns block by block: r rows of (XᵀY)ᵀ, then k rows of Z. Then D = X Tᵀ, rows block by block.
The second look at X comes from the cache: a program's X (77 KB at n = 400, d = 96 in bfloat16) was read just before.

    x [B, n, d] · w [r + k, n] · t [B, r, d] float32 scratch · z [B, k, d] · products [B, n, r];  sums in float32

gate_normalize: one program a block of rows of E = L2(RMSNorm(z + gate ⊙ update)), all [B·k, d].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.compression.reference import L2_EPSILON, RMS_EPSILON

MAX_WEIGHTS = 64  # r + k, the rows of W that one tile holds
MAX_D = 8192  # a row of gate_normalize stays in registers
BLOCK_N = 32
BLOCK_D = 32


@triton.jit
def dot_linear_kernel(
    p_x,
    p_w,
    p_t,
    p_z,
    p_products,
    n: tl.constexpr,
    d: tl.constexpr,
    r: tl.constexpr,
    k: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DOT: tl.constexpr,
):
    i_user = tl.program_id(0).to(tl.int64)
    p_x += i_user * n * d
    p_t += i_user * r * d
    p_z += i_user * k * d
    p_products += i_user * n * r
    i_w = tl.arange(0, BLOCK_W)

    for start_d in range(0, d, BLOCK_D):
        i_d = start_d + tl.arange(0, BLOCK_D)
        m_d = i_d < d
        b_t = tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
        for start_n in range(0, n, BLOCK_N):
            i_n = start_n + tl.arange(0, BLOCK_N)
            m_n = i_n < n
            m_w = (i_w < r + k)[:, None] & m_n[None, :]
            b_w = tl.load(p_w + i_w[:, None] * n + i_n[None, :], mask=m_w, other=0.0)
            b_x = tl.load(p_x + i_n[:, None] * d + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_t = tl.dot(b_w.to(DOT), b_x.to(DOT), b_t, input_precision="tf32x3")
        o_t = i_w[:, None] * d + i_d[None, :]
        tl.store(p_t + o_t, b_t, mask=(i_w < r)[:, None] & m_d[None, :])
        m_z = ((i_w >= r) & (i_w < r + k))[:, None] & m_d[None, :]
        tl.store(p_z + o_t - r * d, b_t.to(p_z.dtype.element_ty), mask=m_z)

    tl.debug_barrier()  # other warps of this program wrote parts of t
    for start_n in range(0, n, BLOCK_N):
        i_n = start_n + tl.arange(0, BLOCK_N)
        m_n = i_n < n
        b_products = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
        for start_d in range(0, d, BLOCK_D):
            i_d = start_d + tl.arange(0, BLOCK_D)
            m_d = i_d < d
            b_x = tl.load(p_x + i_n[:, None] * d + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_s = tl.load(p_t + i_w[None, :] * d + i_d[:, None], mask=m_d[:, None] & (i_w < r)[None, :], other=0.0)
            b_products = tl.dot(b_x.to(DOT), b_s.to(DOT), b_products, input_precision="tf32x3")
        o_products = i_n[:, None] * r + i_w[None, :]
        m_products = m_n[:, None] & (i_w < r)[None, :]
        tl.store(p_products + o_products, b_products.to(p_products.dtype.element_ty), mask=m_products)


@triton.jit
def gate_normalize_kernel(
    p_z,
    p_update,
    p_gate,
    p_out,
    num_rows,
    k,
    d,
    rms_epsilon,
    l2_epsilon,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i_d = tl.arange(0, BLOCK_D)
    m = (i_row < num_rows)[:, None] & (i_d < d)[None, :]
    o_row = i_row[:, None] * d + i_d[None, :]
    b_z = tl.load(p_z + o_row, mask=m, other=0.0).to(tl.float32)
    b_update = tl.load(p_update + o_row, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + (i_row % k)[:, None] * d + i_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_v = b_z + b_gate * b_update
    b_u = b_v * tl.rsqrt(tl.sum(b_v * b_v, 1) / d + rms_epsilon)[:, None]
    b_norm = tl.sqrt(tl.sum(b_u * b_u, 1))
    b_e = b_u / tl.maximum(b_norm, l2_epsilon)[:, None]
    tl.store(p_out + o_row, b_e.to(p_out.dtype.element_ty), mask=m)


def dot_linear(x: Tensor, linear: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Z = W_L X [B, k, d] and D = X(XᵀY) [B, n, r] in x's dtype. Arguments must have been checked."""
    (batch, n, d), k, r = x.shape, linear.shape[0], mix.shape[1]
    z = torch.empty(batch, k, d, dtype=x.dtype, device=x.device)
    products = torch.empty(batch, n, r, dtype=x.dtype, device=x.device)
    if batch == 0:
        return z, products
    t = torch.empty(batch, r, d, dtype=torch.float32, device=x.device)
    w = torch.cat([mix.T, linear])
    dot_linear_kernel[(batch,)](x.contiguous(), w, t, z, products, n=n, d=d, r=r, k=k, **_tiles(r + k, x.dtype))
    return z, products


def gate_normalize(z: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """L2(RMSNorm(z + gate ⊙ update)) [B, k, d] in z's dtype. Arguments must have been checked."""
    batch, k, d = z.shape
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if out.numel() == 0:
        return out
    block_d = triton.next_power_of_2(d)
    block_rows = max(1, 1024 // block_d)
    tensors = (z.contiguous(), update.contiguous(), gate.contiguous(), out)
    gate_normalize_kernel[(triton.cdiv(batch * k, block_rows),)](
        *tensors, batch * k, k, d, RMS_EPSILON, L2_EPSILON, BLOCK_ROWS=block_rows, BLOCK_D=block_d
    )
    return out


def _tiles(weights: int, dtype: torch.dtype) -> dict:
    """Tile sizes, and what matrix products read: the interpreter's bfloat16 products are wrong, so float32 there."""
    native = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    return {
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": BLOCK_D,
        "BLOCK_W": max(16, triton.next_power_of_2(weights)),
        "DOT": tl.float32 if triton.knobs.runtime.interpret else native,
        "num_warps": 4 if weights <= 32 else 8,
    }


def _dot_linear_case(n: int, d: int, k: int, r: int, dtype: torch.dtype) -> tuple:
    kind = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    signature = {f"p_{name}": f"*{kind}:16" for name in ("x", "w", "z", "products")} | {"p_t": "*fp32:16"}
    constexprs = {"n": n, "d": d, "k": k, "r": r, **_tiles(r + k, dtype)}
    return dot_linear_kernel, signature, constexprs, {"num_warps": constexprs.pop("num_warps")}


def _gate_normalize_case(d: int, kind: str) -> tuple:
    signature = {f"p_{name}": f"*{kind}:16" for name in ("z", "update", "gate", "out")}
    signature |= {"num_rows": "i32", "k": "i32", "d": "i32", "rms_epsilon": "fp32", "l2_epsilon": "fp32"}
    block_d = triton.next_power_of_2(d)
    return gate_normalize_kernel, signature, {"BLOCK_ROWS": max(1, 1024 // block_d), "BLOCK_D": block_d}


AHEAD_OF_TIME = [
    _dot_linear_case(16, 64, 2, 8, torch.float32),
    _dot_linear_case(400, 96, 2, 24, torch.bfloat16),
    _dot_linear_case(250, 192, 4, 24, torch.float16),
    _dot_linear_case(512, 512, 4, MAX_WEIGHTS - 4, torch.bfloat16),
    _dot_linear_case(511, 333, 3, MAX_WEIGHTS - 3, torch.float32),
    _gate_normalize_case(64, "fp32"),
    _gate_normalize_case(500, "bf16"),
    _gate_normalize_case(MAX_D, "fp32"),
]
