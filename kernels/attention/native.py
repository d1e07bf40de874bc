"""Jagged attention on the CPU, float32: hands tensors to the C++ of kernels/native. Arguments as in ops.py.

A sequence's result depends neither on the rest of the batch nor on the number of threads, and both passes sum in a
fixed order. Extra memory: the outputs, and per thread a block of keys and a tile of queries.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from alure.kernels import _native
from alure.kernels.attention import flat

INSTRUCTION_SET: str = _native.instruction_set()


def flat_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, D] and lse [H, Tq], float32."""
    tensors = (q, k, v, q_offsets, k_offsets, q_timestamps, k_timestamps, time_thresholds, time_table)
    bias = (position_thresholds, position_table, q_cyclic, k_cyclic)
    attention = _attention(*tensors, *bias, (causal, window_left, window_right, scale))
    out = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _native.attention_forward(attention, out.numpy(), lse.numpy(), INSTRUCTION_SET, torch.get_num_threads())
    return out, lse


def flat_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, both tables and both cyclic channels; the weights are computed again from lse."""
    tensors = (q, k, v, q_offsets, k_offsets, q_timestamps, k_timestamps, time_thresholds, time_table)
    bias = (position_thresholds, position_table, q_cyclic, k_cyclic)
    attention = _attention(*tensors, *bias, (causal, window_left, window_right, scale))
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = (torch.empty(x.shape, dtype=torch.float32) for x in (k, v))
    d_time, d_position, d_q_cyclic, d_k_cyclic = (
        None if x is None else torch.zeros(x.shape, dtype=torch.float32)
        for x in (time_table, position_table, q_cyclic, k_cyclic)
    )
    _native.attention_backward(
        attention,
        _array(grad_out, torch.float32),
        _array(out, torch.float32),
        _array(lse, torch.float32),
        dq.numpy(),
        dk.numpy(),
        dv.numpy(),
        None if d_time is None else d_time.numpy(),
        None if d_position is None else d_position.numpy(),
        None if d_q_cyclic is None else d_q_cyclic.numpy(),
        None if d_k_cyclic is None else d_k_cyclic.numpy(),
        INSTRUCTION_SET,
        torch.get_num_threads(),
    )
    return dq, dk, dv, d_time, d_position, d_q_cyclic, d_k_cyclic


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    options: tuple[bool, int, int, float],
) -> _native.Attention:
    """NumPy views of the arguments; the module refuses shapes that do not fit together."""
    return _native.Attention(
        _array(q, torch.float32),
        _array(k, torch.float32),
        _array(v, torch.float32),
        _array(q_offsets.to(torch.int64), torch.int64),
        _array(k_offsets.to(torch.int64), torch.int64),
        _array(q_timestamps, torch.int64),
        _array(k_timestamps, torch.int64),
        _array(time_thresholds, torch.int64),
        _array(time_table, torch.float32),
        _array(position_thresholds, torch.int64),
        _array(position_table, torch.float32),
        _array(q_cyclic, torch.float32),
        _array(k_cyclic, torch.float32),
        *options,
    )


def _array(x: Tensor | None, dtype: torch.dtype) -> Any:
    if x is None:
        return None
    if x.dtype != dtype or x.device.type != "cpu":
        raise TypeError(f"native attention: expected {dtype} on the CPU, got {x.dtype} on {x.device}")
    return x.detach().contiguous().numpy()


def forward(*arguments):  # type: ignore[no-untyped-def]
    return flat.forward(sys.modules[__name__], *arguments)


def backward(*arguments):  # type: ignore[no-untyped-def]
    return flat.backward(sys.modules[__name__], *arguments)
