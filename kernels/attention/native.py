"""Jagged attention on the CPU, float32: hands tensors to the C++ of kernels/native. Arguments as in ops.py.

A sequence's result depends neither on the rest of the batch nor on the number of threads, and both passes sum in a
fixed order. Extra memory: the outputs, and per thread a block of keys and a tile of queries.
"""

import torch
from torch import Tensor

from alure.kernels import _native

INSTRUCTION_SET: str = _native.instruction_set()


def forward(
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
    bias = (time_thresholds, time_table, position_thresholds, position_table, q_cyclic, k_cyclic)
    attention = _arguments(q, k, v, q_offsets, k_offsets, q_timestamps, k_timestamps, *bias)
    out = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _native.attention_forward(
        _native.Attention(*attention, causal, window_left, window_right, scale),
        out.numpy(),
        lse.numpy(),
        INSTRUCTION_SET,
        torch.get_num_threads(),
    )
    return out, lse


def backward(
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
    bias = (time_thresholds, time_table, position_thresholds, position_table, q_cyclic, k_cyclic)
    attention = _arguments(q, k, v, q_offsets, k_offsets, q_timestamps, k_timestamps, *bias)
    dq = torch.zeros(q.shape, dtype=torch.float32)
    dk, dv = (torch.empty(x.shape, dtype=torch.float32) for x in (k, v))
    optional = [None if x is None else torch.zeros(x.shape) for x in (time_table, position_table, q_cyclic, k_cyclic)]
    _native.attention_backward(
        _native.Attention(*attention, causal, window_left, window_right, scale),
        *(_array(x, torch.float32) for x in (grad_out, out, lse)),
        *(x.numpy() for x in (dq, dk, dv)),
        *(None if x is None else x.numpy() for x in optional),
        INSTRUCTION_SET,
        torch.get_num_threads(),
    )
    return dq, dk, dv, optional[0], optional[1], optional[2], optional[3]


def _arguments(
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
) -> list[object]:
    """NumPy views in the order of `_native.Attention`, whose constructor refuses any other dtype or rank."""
    integers, floats = torch.int64, torch.float32
    return [
        *(_array(x, floats) for x in (q, k, v)),
        *(_array(x.to(integers), integers) for x in (q_offsets, k_offsets)),
        *(_array(x, integers) for x in (q_timestamps, k_timestamps, time_thresholds)),
        _array(time_table, floats),
        _array(position_thresholds, integers),
        *(_array(x, floats) for x in (position_table, q_cyclic, k_cyclic)),
    ]


def _array(x: Tensor | None, dtype: torch.dtype) -> object:
    if x is None:
        return None
    if x.dtype != dtype or x.device.type != "cpu":
        raise TypeError(f"native attention: expected {dtype} on the CPU, got {x.dtype} on {x.device}")
    return x.detach().contiguous().numpy()
