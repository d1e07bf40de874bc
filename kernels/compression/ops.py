"""`compress`: the n pooled vectors of a user become k unit embeddings."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alure.kernels.backend import resolve_backend
from alure.kernels.compression import reference
from alure.kernels.compression.interaction import compress_interaction
from alure.kernels.compression.parameters import (
    DotLinearCompression,
    InteractionCompression,
    check_dot_linear,
    check_interaction,
)
from alure.kernels.operators import operator

BACKENDS = ("triton", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compress(x: Tensor, compression: DotLinearCompression | InteractionCompression, *, backend: str = "auto") -> Tensor:
    """Compress the n vectors of each user to k embeddings of length 1.

    dot-linear:   Z = W_L X;  D = X(XᵀY);  E = Norm(Z + gate ⊙ reshape(MLP(Norm(flatten D))))
    interaction:  the k seeds attend to the n vectors, then to each other.

    Norm is RMSNorm without parameters: over the n·r products of a user inside, over the d values of each embedding
    outside. The MLP has one hidden layer with GELU (tanh form). Then each embedding is divided by its L2 norm; a zero
    vector stays zero.

    Args:
        x: [B, n, d].
        compression: the parameters, in x's dtype and on its device; they decide the form.
        backend: "auto", "triton" or "reference"; what is not a kernel of its own (MLP, projections) is torch.matmul.

    Returns:
        [B, k, d] in x's dtype, differentiable in x and in every parameter; the backward is deterministic.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected, and what came.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [batch, n, d], got {list(x.shape)}")
    if isinstance(compression, InteractionCompression):
        check_interaction(x, compression)
        ours = _resolve(backend, x, x.shape[2], 0)
        return _normalize(compress_interaction(x, compression, backend), ours)
    check_dot_linear(x, compression)
    rows_of_w = compression.linear.shape[0] + compression.mix.shape[1]
    return _compress_dot_linear(x, compression, _resolve(backend, x, x.shape[2], rows_of_w))


def _resolve(backend: str, x: Tensor, d: int, rows_of_w: int) -> str:
    """The backend of the two kernels here. "auto" takes the reference where the kernels have no such shape or dtype."""
    chosen = resolve_backend(backend, x.device, BACKENDS)
    if chosen == "reference":
        return chosen
    from alure.kernels.compression import kernel

    reasons = []
    if x.dtype == torch.float64:
        reasons.append("computes in float32, got float64 vectors")
    if rows_of_w > kernel.MAX_WEIGHTS:
        reasons.append(f"holds r + k up to {kernel.MAX_WEIGHTS}, got {rows_of_w}")
    if d > kernel.MAX_D:
        reasons.append(f"holds d up to {kernel.MAX_D}, got {d}")
    if reasons and backend == "triton":
        raise ValueError(f"backend: 'triton' {'; '.join(reasons)}; use backend='reference'")
    return "reference" if reasons else chosen


def _compress_dot_linear(x: Tensor, compression: DotLinearCompression, backend: str) -> Tensor:
    c = compression
    z, products = _dot_linear(x, c.linear, c.mix, backend)
    hidden = F.gelu(reference.rms_norm(products.flatten(1)) @ c.hidden_weight + c.hidden_bias, approximate="tanh")
    update = (hidden @ c.output_weight + c.output_bias).view_as(z)
    return _gate_normalize(z, update, c.gate, backend)


def _normalize(x: Tensor, backend: str) -> Tensor:
    """L2(RMSNorm(x)): the last kernel with nothing added."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return _gate_normalize(x, zero.expand_as(x), zero.expand(x.shape[1:]), backend)


@operator("dot_linear")
def _dot_linear(x: Tensor, linear: Tensor, mix: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from alure.kernels.compression import kernel

        return kernel.dot_linear(x, linear, mix)
    return reference.dot_linear(x, linear, mix)


@_dot_linear.register_fake
def _(x: Tensor, linear: Tensor, mix: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, n, d = x.shape
    return x.new_empty(batch, linear.shape[0], d), x.new_empty(batch, n, mix.shape[1])


@operator("dot_linear_backward")
def _dot_linear_backward(
    grad_z: Tensor, grad_products: Tensor, x: Tensor, linear: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.dot_linear_backward(grad_z, grad_products, x, linear, mix)


@_dot_linear_backward.register_fake
def _(grad_z: Tensor, grad_products: Tensor, x: Tensor, linear: Tensor, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), linear.new_empty(linear.shape), mix.new_empty(mix.shape)


def _save_dot_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_dot_linear(ctx: Any, grad_z: Tensor, grad_products: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dot_linear_backward(grad_z, grad_products, *ctx.saved_tensors), None)


_dot_linear.register_autograd(_differentiate_dot_linear, setup_context=_save_dot_linear)


@operator("gate_normalize")
def _gate_normalize(z: Tensor, update: Tensor, gate: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from alure.kernels.compression import kernel

        return kernel.gate_normalize(z, update, gate)
    return reference.gate_normalize(z, update, gate)


@_gate_normalize.register_fake
def _(z: Tensor, update: Tensor, gate: Tensor, backend: str) -> Tensor:
    return z.new_empty(z.shape)


@operator("gate_normalize_backward")
def _gate_normalize_backward(grad: Tensor, z: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.gate_normalize_backward(grad, z, update, gate)


@_gate_normalize_backward.register_fake
def _(grad: Tensor, z: Tensor, update: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return z.new_empty(z.shape), update.new_empty(update.shape), gate.new_empty(gate.shape)


def _save_gate_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _differentiate_gate_normalize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gate_normalize_backward(grad, *ctx.saved_tensors), None)


_gate_normalize.register_autograd(_differentiate_gate_normalize, setup_context=_save_gate_normalize)
