"""Operators on rows on the CPU, float32 or bfloat16 with float32 sums: hands tensors to the C++ of kernels/native.

A row's result depends neither on the other rows nor on the number of threads, and the weight's gradient not on the
threads. Extra memory: the outputs; in the backward of rms_norm sums of the weight's gradient, one for 128 rows.
"""

from typing import Any

import torch
from torch import Tensor

from alure.kernels import _native

INSTRUCTION_SET: str = _native.instruction_set()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _like(x)
    _native.rms_norm(_rows(x), _floats(weight), eps, _rows(out), INSTRUCTION_SET, torch.get_num_threads())
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, in their dtype."""
    d_x, d_weight = _like(x), torch.empty(weight.shape, dtype=torch.float32)
    given, found = (_rows(grad), _rows(x), _floats(weight)), (_rows(d_x), d_weight.numpy())
    _native.rms_norm_backward(*given, eps, *found, INSTRUCTION_SET, torch.get_num_threads())
    return d_x, d_weight.to(weight.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    out = torch.empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype)
    _native.swiglu(_rows(gate_up), _rows(out), INSTRUCTION_SET, torch.get_num_threads())
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    d_gate_up = _like(gate_up)
    _native.swiglu_backward(_rows(grad), _rows(gate_up), _rows(d_gate_up), INSTRUCTION_SET, torch.get_num_threads())
    return d_gate_up


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Any:
    """[rows, columns] of a tensor [..., columns]; bfloat16 as uint16, a type that NumPy has."""
    x = x.detach().contiguous()
    if x.dim() != 2:
        x = x.view(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _floats(x: Tensor) -> Any:
    return x.detach().float().contiguous().numpy()
