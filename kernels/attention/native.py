"""Jagged attention on the CPU: hands tensors to the C++ of kernels/native. Arguments as in arguments.py.

Takes float32 and bfloat16; sums are float32. Products of bfloat16 are exact, and where the machine has tiles for them
(AMX), weights and the gradients of logits are rounded to bfloat16. A sequence's result depends neither on the rest of
the batch nor on the number of threads, and both passes sum in a fixed order. Extra memory: the outputs, of the backward
dk and dv in float32, and per thread a block of keys and a part of a sequence's queries.
"""

from typing import Any

import torch
from torch import Tensor

from alure.kernels import _native
from alure.kernels.attention.arguments import Batch, Bias, Gradients

INSTRUCTION_SET: str = _native.instruction_set()


def forward(q: Tensor, k: Tensor, v: Tensor, batch: Batch, bias: Bias, scale: float) -> tuple[Tensor, Tensor]:
    """out [Tq, H, D] like q and lse [H, Tq] float32."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    attention = _attention(q, k, v, batch, bias, scale)
    _native.attention_forward(attention, _values(out), lse.numpy(), INSTRUCTION_SET, torch.get_num_threads())
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: Batch,
    bias: Bias,
    scale: float,
) -> Gradients:
    """The weights are computed again from lse."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    sums = [x if x.dtype == torch.float32 else torch.empty(x.shape, dtype=torch.float32) for x in (dk, dv)]
    of_bias = [
        None if x is None else torch.zeros(x.shape, dtype=torch.float32)
        for x in (bias.time_table, bias.position_table, bias.q_cyclic, bias.k_cyclic)
    ]
    arguments: list[Any] = [
        *(_values(x.to(q.dtype)) for x in (grad_out, out)),
        *(_array(x) for x in (grad_lse, lse)),
        *(_values(x) for x in (dq, dk, dv)),
        *(None if x is None else x.numpy() for x in (*sums, *of_bias)),
        INSTRUCTION_SET,
        torch.get_num_threads(),
    ]
    attention = _attention(q, k, v, batch, bias, scale)
    _native.attention_backward(attention, *arguments)
    return Gradients(dq, dk, dv, *of_bias)


def _attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, bias: Bias, scale: float) -> _native.Attention:
    """NumPy views of the arguments; the module refuses types and shapes that do not fit together."""
    q_values, k_values, v_values = (_values(x) for x in (q, k, v))
    return _native.Attention(
        q_values,
        k_values,
        v_values,
        _array(batch.q_offsets.to(torch.int64)),
        _array(batch.k_offsets.to(torch.int64)),
        _array(batch.q_timestamps),
        _array(batch.k_timestamps),
        _array(batch.rules),
        _array(batch.groups),
        _array(bias.time_thresholds),
        _array(bias.time_table),
        _array(bias.position_thresholds),
        _array(bias.position_table),
        _array(bias.q_cyclic),
        _array(bias.k_cyclic),
        scale,
    )


def _values(x: Tensor) -> Any:
    """x as it lies in memory, if only its channels are neighbours; bfloat16 as uint16, a type that NumPy has."""
    x = x.detach()
    x = x if x.stride(-1) == 1 else x.contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()
