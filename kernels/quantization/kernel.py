"""Triton kernel of residual quantisation: one launch a level, one program a block of BLOCK_N rows.

A program scores its residuals against the codes block by block, r·c − ‖c‖²/2, keeps the best of each row in registers,
then writes r − c[best]. Residuals go from one buffer to another, so no program overwrites what its warps still read.

    residual_in, residual_out [n, d] float32 · codebook [codes, d] · half_norms [codes] float32
    codes [n, levels] int64
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import on_device

BLOCK_N = 64
BLOCK_C = 64
BLOCK_D = 32
NUM_WARPS = 8


@triton.jit(do_not_specialize=["n", "level"])
def quantize_level_kernel(
    p_residual_in,
    p_residual_out,
    p_codebook,
    p_half_norms,
    p_codes,
    n,
    level,
    num_levels,
    num_codes,
    d: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = i_n < n
    b_best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_code = tl.zeros((BLOCK_N,), tl.int32)
    for start_c in range(0, num_codes, BLOCK_C):  # loop: codes
        i_c = start_c + tl.arange(0, BLOCK_C)
        m_c = i_c < num_codes
        b_score = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start_d in range(0, d, BLOCK_D):  # loop: products
            i_d = start_d + tl.arange(0, BLOCK_D)
            m_d = i_d < d
            b_r = tl.load(p_residual_in + i_n[:, None] * d + i_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            o_c = i_c[None, :].to(tl.int64) * d + i_d[:, None]
            b_c = tl.load(p_codebook + o_c, mask=m_c[None, :] & m_d[:, None], other=0.0)
            b_score = tl.dot(b_r, b_c, b_score, input_precision="tf32x3")
        b_score -= tl.load(p_half_norms + i_c, mask=m_c, other=0.0)[None, :]
        b_score = tl.where(m_c[None, :], b_score, float("-inf"))
        b_block_best, b_where = tl.max(b_score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = b_block_best > b_best  # strictly: of equals the lower code stays
        b_best = tl.where(better, b_block_best, b_best)
        b_code = tl.where(better, start_c + b_where, b_code)
    tl.store(p_codes + i_n * num_levels + level, b_code.to(tl.int64), mask=m_n)
    for start_d in range(0, d, BLOCK_D):
        i_d = start_d + tl.arange(0, BLOCK_D)
        m = m_n[:, None] & (i_d < d)[None, :]
        o_r = i_n[:, None] * d + i_d[None, :]
        b_c = tl.load(p_codebook + b_code[:, None].to(tl.int64) * d + i_d[None, :], mask=m, other=0.0)
        tl.store(p_residual_out + o_r, tl.load(p_residual_in + o_r, mask=m, other=0.0) - b_c, mask=m)


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int64 [n, levels], residual [n, d] in x's dtype). Arguments must have been checked."""
    (n, d), (num_levels, num_codes, _) = x.shape, codebooks.shape
    codes = torch.empty(n, num_levels, dtype=torch.int64, device=x.device)
    residual = x.to(torch.float32).contiguous()
    if n == 0:
        return codes, x.clone()
    books = codebooks.to(torch.float32).contiguous()
    half_norms = books.square().sum(2) / 2
    buffers = (torch.empty_like(residual), torch.empty_like(residual))
    for level in range(num_levels):
        following = buffers[level % 2]
        with on_device(x):
            quantize_level_kernel[(triton.cdiv(n, BLOCK_N),)](
                residual, following, books[level], half_norms[level], codes, n, level, num_levels, num_codes,
                d=d, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
            )  # fmt: skip
        residual = following
    return codes, residual.to(x.dtype, copy=num_levels == 0)


def _case(d: int) -> tuple:
    signature = dict.fromkeys(("p_residual_in", "p_residual_out", "p_codebook", "p_half_norms"), "*fp32:16")
    signature |= {"p_codes": "*i64:16", "n": "i32", "level": "i32", "num_levels": "i32", "num_codes": "i32"}
    constexprs = {"d": d, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C, "BLOCK_D": BLOCK_D}
    facts = {"name": f"level d={d}", "loops": dict.fromkeys(("codes", "products"), BLOCK_N * BLOCK_C)}
    return quantize_level_kernel, signature, constexprs, {"num_warps": NUM_WARPS}, facts


AHEAD_OF_TIME = [_case(16), _case(96), _case(333), _case(1024)]
