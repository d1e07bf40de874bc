"""Dot-linear compression on the CPU, sums in float32: hands tensors to the C++ of kernels/native.

A user's result and the gradient of its vectors depend neither on the rest of the batch nor on the number of threads;
the weights' gradients not on the threads. Extra memory: forward, per thread the products [n · r] of a block of at most
48 users; backward, once, about twice the products of at most 512 users or 8 MiB.
"""

from typing import Any

import torch
from torch import Tensor

from alure.kernels import _native
from alure.kernels.compression.parameters import DotLinearCompression

INSTRUCTION_SET: str = _native.instruction_set()


def dot_linear(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Embeddings [B, k, d] in x's dtype and the hidden layer before its activation, [B, h] float32."""
    embeddings = torch.empty(x.shape[0], *compression.gate.shape)
    hidden = torch.empty(x.shape[0], compression.hidden_bias.shape[0])
    outputs = embeddings.numpy(), hidden.numpy()
    _native.compress_dot_linear(_arguments(x, compression), *outputs, INSTRUCTION_SET, torch.get_num_threads())
    return embeddings.to(x.dtype), hidden


def dot_linear_backward(
    grad: Tensor, x: Tensor, compression: DotLinearCompression, hidden: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of x and of the parameters in their order, for `grad` of the embeddings."""
    weights = compression.tensors()
    d_x, *d_weights = (torch.empty(t.shape) for t in (x, *weights))
    arrays: Any = tuple(d.numpy() for d in d_weights)  # one a weight
    _native.compress_dot_linear_backward(
        _arguments(x, compression),
        grad.float().contiguous().numpy(),
        hidden.contiguous().numpy(),
        d_x.numpy(),
        arrays,
        INSTRUCTION_SET,
        torch.get_num_threads(),
    )
    return d_x.to(x.dtype), *(d.to(w.dtype) for d, w in zip(d_weights, weights))


def dot_linear_int8(x: Tensor, compression: DotLinearCompression) -> tuple[Tensor, Tensor]:
    """Codes int8 [B, k, d] and scales float32 [B, k]."""
    codes = torch.empty(x.shape[0], *compression.gate.shape, dtype=torch.int8)
    scales = torch.empty(codes.shape[:2])
    outputs = codes.numpy(), scales.numpy()
    _native.compress_dot_linear_int8(_arguments(x, compression), *outputs, INSTRUCTION_SET, torch.get_num_threads())
    return codes, scales


def _arguments(x: Tensor, compression: DotLinearCompression) -> _native.DotLinear:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        raise TypeError(f"native compression: expected float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}")
    x = x.detach().contiguous()
    as_floats, as_bits = (x.numpy(), None) if x.dtype == torch.float32 else (None, x.view(torch.uint16).numpy())
    weights = (w.detach().float().contiguous().numpy() for w in compression.tensors())
    return _native.DotLinear(as_floats, as_bits, *weights)
