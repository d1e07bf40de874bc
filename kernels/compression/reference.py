"""The two fused halves of dot-linear compression in eager PyTorch: the kernel's oracle, and the backward everywhere.

Sums run in float32, or in float64 where the inputs are float64.
"""

import torch
from torch import Tensor

RMS_EPSILON = 1e-6  # inside RMSNorm's square root
L2_EPSILON = 1e-12  # smallest norm that an embedding is divided by


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, in x's dtype; no parameters."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPSILON)).to(x.dtype)


def dot_linear(x: Tensor, linear: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Z = W_L X [B, k, d] and D = X(XᵀY) [B, n, r], of x [B, n, d], in x's dtype. XXᵀ is never made."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(compute)
    z = linear.to(compute) @ x32
    products = x32 @ (x32.mT @ mix.to(compute))
    return z.to(x.dtype), products.to(x.dtype)


def dot_linear_backward(
    grad_z: Tensor, grad_products: Tensor, x: Tensor, linear: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, linear and mix."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x32, y, gz, gd = x.to(compute), mix.to(compute), grad_z.to(compute), grad_products.to(compute)
    summary = x32.mT @ y  # S = XᵀY [B, d, r]
    grad_summary = x32.mT @ gd  # [B, d, r]
    grad_x = linear.to(compute).T @ gz + gd @ summary.mT + y @ grad_summary.mT
    grad_linear = (gz @ x32.mT).sum(0)
    grad_mix = (x32 @ grad_summary).sum(0)
    return grad_x.to(x.dtype), grad_linear.to(linear.dtype), grad_mix.to(mix.dtype)


def gate_normalize(z: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """L2(RMSNorm(z + gate ⊙ update)), [B, k, d]; a zero vector stays zero."""
    compute = torch.promote_types(z.dtype, torch.float32)
    v = rms_norm(z.to(compute) + gate.to(compute) * update.to(compute))
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return (v / norm.clamp_min(L2_EPSILON)).to(z.dtype)


def gate_normalize_backward(grad: Tensor, z: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, update and gate."""
    compute = torch.promote_types(z.dtype, torch.float32)
    g, m, w = grad.to(compute), update.to(compute), gate.to(compute)
    v = z.to(compute) + w * m
    scale = torch.rsqrt(v.square().mean(-1, keepdim=True) + RMS_EPSILON)
    u = v * scale
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    length = norm.clamp_min(L2_EPSILON)
    e = u / length
    # below ε the divisor is constant, so nothing is projected out
    along = torch.where(norm > L2_EPSILON, (e * g).sum(-1, keepdim=True), 0)
    grad_u = (g - e * along) / length
    grad_v = scale * (grad_u - u * (u * grad_u).mean(-1, keepdim=True))
    return grad_v.to(z.dtype), (grad_v * w).to(update.dtype), (grad_v * m).sum(0).to(gate.dtype)
