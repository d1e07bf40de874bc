"""Dot-linear compression and the final normalisation in eager PyTorch: the oracle, and the backward of Triton.

Everything runs in float32, or in float64 where the inputs are float64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from alure.kernels.compression.parameters import DotLinearCompression

RMS_EPSILON = 1e-6  # inside RMSNorm's square root
L2_EPSILON = 1e-12  # smallest norm that an embedding is divided by
INT8_LARGEST = 127


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, in x's dtype; no parameters."""
    wide = widen(x)
    return (wide * inverse_rms(wide)).to(x.dtype)


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x²) + ε) over the last dimension, which stays with length 1."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPSILON)


def widen(x: Tensor) -> Tensor:
    """x in the dtype that is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dot_linear(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Embeddings [B, k, d] in x's dtype and the hidden layer before its activation, [B, h]."""
    v, hidden = _dot_linear(x, compression)
    return normalize(v).to(x.dtype), hidden


def dot_linear_int8(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Codes int8 [B, k, d] and scales float32 [B, k]."""
    return normalize_int8(_dot_linear(x, compression)[0])


def _dot_linear(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Embeddings before they are normalised, and the hidden layer. XXᵀ is never made."""
    x, c = widen(x), _widen_all(compression)
    products = x @ (x.mT @ c.mix)  # D [B, n, r]
    hidden = rms_norm(products.flatten(1)) @ c.hidden_weight + c.hidden_bias
    update = F.gelu(hidden, approximate="tanh") @ c.output_weight + c.output_bias
    return c.linear @ x + c.gate * update.unflatten(1, c.gate.shape), hidden


def dot_linear_backward(
    grad: Tensor, x: Tensor, compression: DotLinearCompression, hidden: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters in their order, for `grad` of the embeddings.

    Of the forward only `hidden` is kept. D is computed again from S = XᵀY, which the backward needs anyway.
    """
    wide, c = widen(x), _widen_all(compression)
    activation = F.gelu(hidden, approximate="tanh")
    update = (activation @ c.output_weight + c.output_bias).view_as(grad)
    grad_v = normalize_backward(grad, c.linear @ wide + c.gate * update)
    grad_update = (grad_v * c.gate).flatten(1)
    grad_hidden = torch.ops.aten.gelu_backward(grad_update @ c.output_weight.T, hidden, approximate="tanh")

    summary = wide.mT @ c.mix  # S [B, d, r]
    products = wide @ summary  # D [B, n, r]
    flat = products.flatten(1)
    scale = inverse_rms(flat)
    grad_normalized = grad_hidden @ c.hidden_weight.T
    # RMSNorm: s (g − u mean(u g)) with u = s D, and Σ u g = Σ over the hidden layer, which is far smaller
    along = (grad_hidden * (hidden - c.hidden_bias)).sum(1, keepdim=True) / max(flat.shape[1], 1)
    grad_products = (scale * (grad_normalized - flat * (scale * along))).view_as(products)
    grad_summary = wide.mT @ grad_products  # [B, d, r]

    gradients = DotLinearCompression(
        linear=(grad_v @ wide.mT).sum(0),
        mix=(wide @ grad_summary).sum(0),
        hidden_weight=flat.T @ (scale * grad_hidden),
        hidden_bias=grad_hidden.sum(0),
        output_weight=activation.T @ grad_update,
        output_bias=grad_update.sum(0),
        gate=(grad_v * update).sum(0),
    )
    grad_x = c.linear.T @ grad_v + grad_products @ summary.mT + c.mix @ grad_summary.mT
    return grad_x.to(x.dtype), *(g.to(p.dtype) for g, p in zip(gradients.tensors(), compression.tensors()))


def normalize(v: Tensor) -> Tensor:
    """L2(RMSNorm(v)) over the last dimension, in v's dtype; a zero vector stays zero."""
    wide = widen(v)
    rms, length = _normalization(wide)
    return (wide * rms / length).to(v.dtype)


def normalize_backward(grad: Tensor, v: Tensor) -> Tensor:
    """The gradient of v."""
    wide, grad = widen(v), widen(grad)
    scale, length = _normalization(wide)
    u = wide * scale
    e = u / length
    # below ε the divisor is constant, so nothing is projected out
    along = torch.where(length > L2_EPSILON, (e * grad).sum(-1, keepdim=True), 0)
    grad_u = (grad - e * along) / length
    return (scale * (grad_u - u * (u * grad_u).mean(-1, keepdim=True))).to(v.dtype)


def normalize_int8(v: Tensor) -> tuple[Tensor, Tensor]:
    """normalize(v) ≈ scale · code: codes int8 [..., d] and scales float32 [...].

    Codes are v / step with step = max |v| / 127, rounded half to even: they do not depend on how the norms were summed.
    Where the step is not finite, or too small to divide by, they are 0; a NaN in v makes the scale NaN.
    """
    v = widen(v)
    rms, length = _normalization(v)
    step = v.abs().amax(-1, keepdim=True) / INT8_LARGEST
    usable = (step >= torch.finfo(torch.float32).tiny) & step.isfinite()
    codes = torch.where(usable, (v / step).round(), 0).to(torch.int8)
    return codes, (step * rms / length).squeeze(-1).float()


def _normalization(v: Tensor) -> tuple[Tensor, Tensor]:
    """1 / RMS(v) and the length that v / RMS(v) is divided by."""
    rms = inverse_rms(v)
    return rms, torch.linalg.vector_norm(v * rms, dim=-1, keepdim=True).clamp_min(L2_EPSILON)


def _widen_all(compression: DotLinearCompression) -> DotLinearCompression:
    return DotLinearCompression(*(widen(x) for x in compression.tensors()))
