"""The kernel of `hstu`: q, k, v [total, H, D]; offsets, times int64; table [buckets] float32; a program makes BLOCK_M
queries of one head of one sequence.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import triton_interprets

CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s)
    for m, n, w, s in ((64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 4, 2), (128, 64, 4, 2), (128, 64, 8, 2))
]


def forward(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, times: Tensor, table: Tensor, longest: int, per_bucket: float
) -> Tensor:
    """[total, H, D] in q's dtype."""
    out = torch.empty_like(q)
    _, heads, head_dim = q.shape

    def grid(config: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(longest, config["BLOCK_M"]), heads * (len(offsets) - 1)

    scale = head_dim**-0.5 * 1.4426950408889634
    forward_kernel[grid](
        q, k, v, out, offsets, times, table, scale, 1.0 / per_bucket, len(table), HEADS=heads, HEAD_DIM=head_dim
    )
    return out


@triton.autotune(CONFIGS[:1] if triton_interprets() else CONFIGS, key=["HEAD_DIM"])
@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_offsets,
    p_times,
    p_table,
    scale,
    buckets_per_log,
    buckets,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_sequence, i_head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    begin = tl.load(p_offsets + i_sequence)
    n = (tl.load(p_offsets + i_sequence + 1) - begin).to(tl.int32)
    row = tl.program_id(0) * BLOCK_M
    if row >= n:
        return
    base = begin * HEADS * HEAD_DIM + i_head * HEAD_DIM
    o_m = row + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, HEAD_DIM)
    m_m = o_m < n
    o_q = base + o_m[:, None] * HEADS * HEAD_DIM + o_d[None, :]
    b_q = tl.load(p_q + o_q, mask=m_m[:, None], other=0.0)
    t_q = tl.load(p_times + begin + o_m, mask=m_m, other=0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < n
        o_k = base + o_n[:, None] * HEADS * HEAD_DIM + o_d[None, :]
        b_k = tl.load(p_k + o_k, mask=m_n[:, None], other=0.0)
        b_v = tl.load(p_v + o_k, mask=m_n[:, None], other=0.0)
        t_k = tl.load(p_times + begin + o_n, mask=m_n, other=0)
        logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        elapsed = tl.abs((t_q[:, None] - t_k[None, :]).to(tl.float32))
        bucket = (tl.log(tl.maximum(elapsed, 1.0)) * buckets_per_log).to(tl.int32)
        bucket = tl.maximum(tl.minimum(bucket, buckets - 1), 0)
        logits += tl.load(p_table + bucket) * 1.4426950408889634
        logits = tl.where(m_n[None, :], logits, float("-inf"))
        new = tl.maximum(maximum, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new[:, None])
        decay = tl.exp2(maximum - new)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision="ieee")
        maximum = new
    tl.store(p_out + o_q, (acc / total[:, None]).to(p_out.dtype.element_ty), mask=m_m[:, None])
