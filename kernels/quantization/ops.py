"""`residual_quantize`: vectors to semantic ids, one code a level."""

from typing import Any

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.operators import operator
from alure.kernels.quantization import reference
from alure.kernels.scatter import sum_rows

BACKENDS = ("triton", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def residual_quantize(x: Tensor, codebooks: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise each vector level by level: the nearest code (L2) of the level's codebook, then what remains of it.

    Args:
        x: [n, d], finite.
        codebooks: [levels, codes, d] in x's dtype and on its device, finite; at least one code a level.
        backend: "auto", "triton" (not for float64) or "reference".

    Returns:
        (codes, residual): int64 [n, levels], among equal codes the lowest; and x − Σ_level codebooks[level, code],
        [n, d] in x's dtype, subtracted in float32 (float64 for float64). The residual is differentiable in x and in
        the codebooks, with the codes held fixed, deterministically.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected, and what came.
    """
    _check(x, codebooks)
    backend = resolve_backend(backend, x.device, BACKENDS)
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend: 'triton' computes in float32, got float64 vectors; use backend='reference'")
    residual, codes = _quantize(x, codebooks, backend)
    return codes, residual


def _check(x: Tensor, codebooks: Tensor) -> None:
    """Shapes, dtypes and devices; reads no values."""
    for name, given in (("x", x), ("codebooks", codebooks)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(given).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [n, d], got {list(x.shape)}")
    if codebooks.dtype != x.dtype:
        raise TypeError(f"codebooks: expected {x.dtype} like x, got {codebooks.dtype}; call .to({x.dtype})")
    if codebooks.device != x.device:
        raise ValueError(f"codebooks: expected a tensor on {x.device} like x, got one on {codebooks.device}")
    if codebooks.dim() != 3 or codebooks.shape[2] != x.shape[1] or codebooks.shape[1] < 1:
        expected = f"[levels, codes >= 1, {x.shape[1]}]"
        raise ValueError(f"codebooks: expected shape {expected}, got {list(codebooks.shape)}")


def _check_finite(x: Tensor, name: str) -> None:
    if not bool(x.isfinite().all()):
        where = x.isfinite().logical_not().nonzero()[0].tolist()
        raise ValueError(f"{name}: expected finite values, got {float(x[tuple(where)])} at {where}; drop such vectors")


@operator("residual_quantize")
def _quantize(x: Tensor, codebooks: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    _check(x, codebooks)
    _check_finite(x, "x")
    _check_finite(codebooks, "codebooks")
    if backend == "triton":
        from alure.kernels.quantization import kernel

        codes, residual = kernel.residual_quantize(x, codebooks)
    else:
        codes, residual = reference.residual_quantize(x, codebooks)
    for level, book in enumerate(codebooks):
        codes[:, level] = _lowest_twin(book)[codes[:, level]]
    return residual, codes


def _lowest_twin(book: Tensor) -> Tensor:
    """int64 [codes]: the lowest code with the same vector. A matrix product may round equal columns differently."""
    _, group = torch.unique(book, dim=0, return_inverse=True)
    index = torch.arange(book.shape[0], device=book.device)
    return torch.full_like(index, book.shape[0]).scatter_reduce(0, group, index, "amin")[group]


@_quantize.register_fake
def _(x: Tensor, codebooks: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], codebooks.shape[0], dtype=torch.int64)


@operator("residual_quantize_backward")
def _quantize_backward(grad_residual: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    """[levels, codes, d]: the gradient of the codebooks."""
    compute = torch.promote_types(grad_residual.dtype, torch.float32)
    grad = grad_residual.to(compute)
    books = grad.new_zeros(codes.shape[1], num_codes, grad.shape[1])
    for level in range(codes.shape[1]):
        books[level] = -sum_rows(grad, codes[:, level].contiguous(), num_codes)
    return books.to(grad_residual.dtype)


@_quantize_backward.register_fake
def _(grad_residual: Tensor, codes: Tensor, num_codes: int) -> Tensor:
    return grad_residual.new_empty(codes.shape[1], num_codes, grad_residual.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codes = output
    ctx.mark_non_differentiable(codes)
    ctx.save_for_backward(codes)
    ctx.num_codes = inputs[1].shape[1]


def _backward(ctx: Any, grad_residual: Tensor, grad_codes: Any) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    return grad_residual, _quantize_backward(grad_residual, codes, ctx.num_codes), None


_quantize.register_autograd(_backward, setup_context=_setup_context)
