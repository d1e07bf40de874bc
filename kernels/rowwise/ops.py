"""`rms_norm` and `swiglu`: what a layer does to each token's row between its products, in one pass each.

The reference is PyTorch, which fuses RMSNorm on CUDA but takes both apart on a CPU: into six passes and two, and in
bfloat16 casts between them. So there is no Triton kernel, and the native one is worth its lines.
"""

from typing import Any

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.operators import operator
from alure.kernels.rowwise import reference

BACKENDS = ("native", "reference")
NATIVE_FLOATS = (torch.float32, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """x / √(mean(x²) + eps) ⊙ weight over the last axis (Zhang and Sennrich 2019, equation 4).

    Args:
        x: [..., d].
        weight: [d].
        backend: "auto", "native" (x and weight both float32 or both bfloat16) or "reference" (PyTorch's own).

    Returns:
        [..., d] in x's dtype, differentiable in both; the backward is deterministic. Sums run in float32.

    Raises:
        ValueError: naming the argument, what was expected, and what came.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected one value a channel of x {list(x.shape)}, got shape {list(weight.shape)}")
    if _resolve(backend, x, weight) == "native":
        return _rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) ⊙ up of gates and values side by side (Shazeer 2020, equation 6, without its products).

    Args:
        gate_up: [..., 2h], the gate first.
        backend: "auto", "native" (float32 and bfloat16, computed in float32) or "reference" (PyTorch's own).

    Returns:
        [..., h] in gate_up's dtype, differentiable.

    Raises:
        ValueError: naming the argument, what was expected, and what came.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even number of channels, got shape {list(gate_up.shape)}")
    return _swiglu(gate_up) if _resolve(backend, gate_up) == "native" else reference.swiglu(gate_up)


def _resolve(backend: str, x: Tensor, *others: Tensor) -> str:
    """The backend for these tensors. "auto" leaves out the native one where it cannot; asked for by name it raises."""
    dtypes = {x.dtype, *(other.dtype for other in others)}
    able = len(dtypes) == 1 and x.dtype in NATIVE_FLOATS
    if backend == "native" and not able:
        got = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(f"backend: 'native' takes float32 or bfloat16, one of them, got {got}; use 'reference'")
    return resolve_backend(backend, x.device, BACKENDS if able else ["reference"])


@operator("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from alure.kernels.rowwise import native

    return native.rms_norm(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@operator("rms_norm_backward")
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from alure.kernels.rowwise import native

    return native.rms_norm_backward(grad, x, weight, eps)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_rms_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None)


_rms_norm.register_autograd(_differentiate_rms_norm, setup_context=_save_rms_norm)


@operator("swiglu")
def _swiglu(gate_up: Tensor) -> Tensor:
    from alure.kernels.rowwise import native

    return native.swiglu(gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@operator("swiglu_backward")
def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    from alure.kernels.rowwise import native

    return native.swiglu_backward(grad, gate_up)


@_swiglu_backward.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_swiglu(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu.register_autograd(_differentiate_swiglu, setup_context=_save_swiglu)
