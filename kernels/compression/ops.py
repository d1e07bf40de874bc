"""`compress` and `compress_int8`: the n pooled vectors of a user become k unit embeddings.

The functions every backend module (reference, kernel, native) implements; `c` is a DotLinearCompression:

    dot_linear(x, c)      -> embeddings [B, k, d] in x's dtype, hidden [B, h] before its activation, float32
    dot_linear_int8(x, c) -> codes int8 [B, k, d], scales float32 [B, k]
    dot_linear_backward(grad, x, c, hidden) -> gradients of x and the parameters    (reference and native)
    normalize(v)          -> L2(RMSNorm(v)) in v's dtype        (reference and kernel: the end of the interaction form)
    normalize_int8(v)     -> the same as codes and scales

The backward of "triton" is the reference's, as is that of the normalisation alone.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.compression import reference
from alure.kernels.compression.interaction import InteractionPlan, compress_interaction
from alure.kernels.compression.parameters import (
    DotLinearCompression,
    InteractionCompression,
    check_dot_linear,
    check_interaction,
)
from alure.kernels.operators import operator

BACKENDS = ("triton", "native", "reference")
NATIVE_FLOATS = (torch.float32, torch.bfloat16)
TRITON_MAX_ROW = 1024  # bytes of a row of X: tiles of rows stay in shared memory
TRITON_MAX_SUMMARY = 32768  # bytes of XᵀW [d, r + k], which stays in registers
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compress(
    x: Tensor,
    compression: DotLinearCompression | InteractionCompression,
    *,
    plan: InteractionPlan | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compress the n vectors of each user to k embeddings of length 1.

    dot-linear:   Z = W_L X;  D = X(XᵀY);  E = Norm(Z + gate ⊙ reshape(MLP(Norm(flatten D))))
    interaction:  the k seeds attend to the n vectors, then to each other.

    Norm is RMSNorm without parameters: over the n·r products of a user inside, over the d values of each embedding
    outside. The MLP has one hidden layer with GELU (tanh form). Then each embedding is divided by its L2 norm; a zero
    vector stays zero.

    Args:
        x: [B, n, d].
        compression: the parameters, in x's dtype and on its device; they decide the form.
        plan: for the interaction form, `InteractionPlan.of` so many users, moved to x's device: then nothing waits for
            the device. The dot-linear form never does.
        backend: "auto", "triton", "native" (float32 and bfloat16 with float32 sums) or "reference". In the interaction
            form it is that of the attention; its projections, and the MLP of "triton", are torch.matmul.

    Returns:
        [B, k, d] in x's dtype, differentiable in x and in every parameter; the backward is deterministic.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected, and what came.
    """
    chosen = _check(x, compression, plan, backend)
    if isinstance(compression, InteractionCompression):
        return _normalize(compress_interaction(x, compression, plan, backend), chosen)
    embeddings, _ = _dot_linear(x, *compression.tensors(), chosen)
    return embeddings


@torch.no_grad()
def compress_int8(
    x: Tensor,
    compression: DotLinearCompression | InteractionCompression,
    *,
    plan: InteractionPlan | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`compress` for inference, embeddings e as bytes: e ≈ scale · code, at most scale / 2 off in each value.

    Arguments and errors as `compress`; nothing here is differentiable. The largest value of an embedding has the code
    127 or −127; codes are rounded half to even.

    Returns:
        codes int8 [B, k, d] and scales float32 [B, k]. A zero embedding has scale 0; one with a value that is not
        finite has codes 0 and a scale of NaN.
    """
    chosen = _check(x, compression, plan, backend)
    if isinstance(compression, InteractionCompression):
        codes, scales = _normalize_int8(compress_interaction(x, compression, plan, backend), chosen)
    else:
        codes, scales = _dot_linear_int8(x, *compression.tensors(), chosen)
    return codes, scales


@torch.no_grad()
def normalize_int8(v: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The bytes that `compress_int8` ends in, of any vectors [B, k, d]: each is divided by its length first."""
    if v.dtype not in FLOATS:
        raise TypeError(f"v: expected float16, bfloat16, float32 or float64, got {v.dtype}")
    chosen = _resolve(backend, v, 0)
    codes, scales = _normalize_int8(v, "reference" if chosen == "native" else chosen)
    return codes, scales


def _check(
    x: Tensor,
    compression: DotLinearCompression | InteractionCompression,
    plan: InteractionPlan | None,
    backend: str,
) -> str:
    """The backend of the operators here; raises where x and the parameters do not fit together."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [batch, n, d], got {list(x.shape)}")
    if isinstance(compression, InteractionCompression):
        check_interaction(x, compression)
        chosen = _resolve(backend, x, 0)
        return "reference" if chosen == "native" else chosen  # normalising alone has no native kernel
    if not isinstance(compression, DotLinearCompression):
        raise TypeError(
            f"compression: expected DotLinearCompression or InteractionCompression, got {type(compression).__name__}"
        )
    if plan is not None:
        raise ValueError("plan: the dot-linear form has none; expected None")
    check_dot_linear(x, compression)
    return _resolve(backend, x, compression.linear.shape[0] + compression.mix.shape[1])


def _resolve(backend: str, x: Tensor, weights: int) -> str:
    """The backend for x and r + k = `weights`, 0 where only the end is needed. "auto" takes one that can."""
    chosen = resolve_backend(backend, x.device, BACKENDS)
    reasons = []
    if chosen == "native" and x.dtype not in NATIVE_FLOATS:
        reasons.append(f"takes float32 and bfloat16, got {x.dtype}")
    if chosen == "triton":
        if x.dtype == torch.float64:
            reasons.append("computes in float32, got float64 vectors")
        if weights:
            d, size = x.shape[2], x.element_size()
            if d * size > TRITON_MAX_ROW:
                reasons.append(f"holds d up to {TRITON_MAX_ROW // size} in {x.dtype}, got {d}")
            elif _power_of_2(d) * _power_of_2(weights) * size > TRITON_MAX_SUMMARY:
                most = TRITON_MAX_SUMMARY // size // _power_of_2(d)
                reasons.append(f"holds r + k up to {most} with d = {d} in {x.dtype}, got {weights}")
    if reasons and backend != "auto":
        raise ValueError(f"backend: '{backend}' {'; '.join(reasons)}; use backend='reference'")
    return "reference" if reasons else chosen


def _power_of_2(size: int) -> int:
    return 1 << max(4, (size - 1).bit_length())  # at least 16, the smallest side of a matrix product


def _module(backend: str) -> ModuleType:
    name = {"triton": "kernel"}.get(backend, backend)
    return importlib.import_module(f"alure.kernels.compression.{name}")


@operator("compress_dot_linear")
def _dot_linear(
    x: Tensor,
    linear: Tensor,
    mix: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mlp = (hidden_weight, hidden_bias, output_weight, output_bias)
    return _module(backend).dot_linear(x, DotLinearCompression(linear, mix, *mlp, gate))


@_dot_linear.register_fake
def _(x, linear, mix, hidden_weight, hidden_bias, output_weight, output_bias, gate, backend):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], *gate.shape), x.new_empty(x.shape[0], *hidden_bias.shape, dtype=wide)


@operator("compress_dot_linear_backward")
def _dot_linear_backward(
    grad: Tensor,
    x: Tensor,
    linear: Tensor,
    mix: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    hidden: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mlp = (hidden_weight, hidden_bias, output_weight, output_bias)
    module = _module(backend) if backend == "native" else reference
    return module.dot_linear_backward(grad, x, DotLinearCompression(linear, mix, *mlp, gate), hidden)


@_dot_linear_backward.register_fake
def _(grad, *rest):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in rest[:-2])


def _save_dot_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, hidden = output
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(*inputs[:-1], hidden)
    ctx.backend = inputs[-1]


def _differentiate_dot_linear(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_dot_linear_backward(grad, *ctx.saved_tensors, ctx.backend), None)


_dot_linear.register_autograd(_differentiate_dot_linear, setup_context=_save_dot_linear)


@operator("compress_dot_linear_int8")
def _dot_linear_int8(
    x: Tensor,
    linear: Tensor,
    mix: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    gate: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mlp = (hidden_weight, hidden_bias, output_weight, output_bias)
    return _module(backend).dot_linear_int8(x, DotLinearCompression(linear, mix, *mlp, gate))


@_dot_linear_int8.register_fake
def _(x, linear, mix, hidden_weight, hidden_bias, output_weight, output_bias, gate, backend):  # type: ignore[no-untyped-def]
    shape = (x.shape[0], *gate.shape)
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(shape[:2], dtype=torch.float32)


@operator("normalize")
def _normalize(v: Tensor, backend: str) -> Tensor:
    return _module(backend).normalize(v)


@_normalize.register_fake
def _(v: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape)


@operator("normalize_backward")
def _normalize_backward(grad: Tensor, v: Tensor) -> Tensor:
    return reference.normalize_backward(grad, v)


@_normalize_backward.register_fake
def _(grad: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


def _save_normalize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_normalize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _normalize_backward(grad, *ctx.saved_tensors), None


_normalize.register_autograd(_differentiate_normalize, setup_context=_save_normalize)


@operator("normalize_int8")
def _normalize_int8(v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _module(backend).normalize_int8(v)


@_normalize_int8.register_fake
def _(v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape, dtype=torch.int8), v.new_empty(v.shape[:-1], dtype=torch.float32)
