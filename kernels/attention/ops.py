"""`jagged_attention`: validation, registration with torch.library, choice of the backend.

The boundary every backend module (reference, kernel, native) implements; T is the rows of all sequences together:

    forward(q, k, v,                               # [Tq, H, D] [Tk, H, D] [Tk, H, D]
            q_offsets, k_offsets,                  # [B + 1] int32 | int64, checked
            q_timestamps, k_timestamps,            # [Tq] [Tk] int64, sorted in each sequence | None
            time_thresholds, time_table,           # [buckets − 1] int64 increasing, [H, buckets] float32 | None
            position_thresholds, position_table,   # the same over i − j | None
            q_cyclic, k_cyclic,                    # [Tq, H, C] [Tk, C] float32 | None
            causal, window_left, window_right,     # bool, int, int; −1: no limit
            scale)                                 # float
        -> out [Tq, H, D] like q, lse [H, Tq] float32

    backward(grad_out, q, k, v, out, lse, …the same from q_offsets on…)
        -> dq, dk, dv, d_time_table, d_position_table, d_q_cyclic, d_k_cyclic    # None for what was None

    logits(i, j) = scale · q_i·k_j + time_table[bucket] + position_table[bucket] + q_cyclic_i·k_cyclic_j
    i = row of the query in its sequence + (length of k − length of q), j = row of the key
    visible: j <= i where causal; i − window_left <= j <= i + window_right

A query that sees no key gives a row of zeros and lse = −inf. The float32 above is float64 where q is float64.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from alure.kernels.attention.bias import (
    PositionBias,
    TimeBias,
    check_position_bias,
    check_time_bias,
    cyclic_channels,
)
from alure.kernels.backend import resolve_backend
from alure.kernels.jagged import check_offsets, check_timestamps
from alure.kernels.operators import operator

BACKENDS = ("triton", "native", "reference")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_TRITON_HEAD = 256


def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor | None = None,
    *,
    q_timestamps: Tensor | None = None,
    k_timestamps: Tensor | None = None,
    time_bias: TimeBias | None = None,
    position_bias: PositionBias | None = None,
    causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention within each sequence of a jagged batch; [total_q, heads, head_dim], like q.

    q [total_q, heads, head_dim], k and v [total_k, heads, head_dim]: float16, bfloat16, float32 or float64.
    q_offsets, k_offsets [batch + 1] int32 or int64; without k_offsets, keys are the queries' own sequences.
    q_timestamps [total_q], k_timestamps [total_k]: int64 seconds, sorted within a sequence; needed by `time_bias`.
    Where q and k differ in length their last rows are aligned (causal, window, position bias).
    causal: a query sees the keys up to its own position. window_size: (left, right), or one int for both sides.
    softmax_scale: 1/sqrt(head_dim) by default. A query that sees no key gives zeros.
    Gradients flow to q, k, v and to the table, cosine and sine of the biases; the backward is deterministic.
    Raises ValueError or TypeError before any kernel runs where an argument does not fit.
    """
    _check_values(q, k, v)
    num_heads, head_dim = q.shape[1:]
    _check_rows(q_offsets, None, "q_offsets", q.device)
    if k_offsets is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"k_offsets: needed because q has {q.shape[0]} rows and k has {k.shape[0]}; "
                "without it keys are the queries' own sequences"
            )
        k_offsets = q_offsets
        k_timestamps = q_timestamps if k_timestamps is None else k_timestamps
    _check_rows(k_offsets, None, "k_offsets", q.device)
    if k_offsets.shape != q_offsets.shape:
        raise ValueError(
            f"k_offsets: expected as many sequences as q_offsets, {q_offsets.numel() - 1}, got {k_offsets.numel() - 1}"
        )
    window_left, window_right = _window(window_size)
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    resolved = _backend(backend, q)

    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    time_table = position_table = q_cyclic = k_cyclic = None
    for rows, total, name in ((q_timestamps, q.shape[0], "q_timestamps"), (k_timestamps, k.shape[0], "k_timestamps")):
        if rows is not None:
            _check_rows(rows, total, name, q.device)
        elif time_bias is not None:
            raise ValueError(f"{name}: needed by time_bias; give int64 unix seconds, one a row")
    if time_bias is not None:
        assert q_timestamps is not None
        assert k_timestamps is not None
        check_time_bias(time_bias, num_heads, q.device)
        time_table = time_bias.table.to(accumulate)
        if time_bias.periods is not None:
            q_cyclic, k_cyclic = cyclic_channels(time_bias, q_timestamps, k_timestamps, accumulate)
    else:
        q_timestamps = k_timestamps = None
    if position_bias is not None:
        check_position_bias(position_bias, num_heads, q.device)
        position_table = position_bias.table.to(accumulate)
    out, _ = _attention(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        q_timestamps,
        k_timestamps,
        time_bias.thresholds if time_bias is not None else None,
        time_table,
        position_bias.thresholds if position_bias is not None else None,
        position_table,
        q_cyclic,
        k_cyclic,
        causal,
        window_left,
        window_right,
        scale,
        resolved,
    )
    return out


def _check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name}: expected shape [total, heads, head_dim], got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
    if k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(
            "k and v: expected one shape, [total_k, heads, head_dim] with the heads and head_dim of q, "
            f"{list(q.shape[1:])}; got {list(k.shape)} and {list(v.shape)}"
        )
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"q: expected at least one head and one channel, got shape {list(q.shape)}")


def _check_rows(x: Tensor, total: int | None, name: str, device: torch.device) -> None:
    """What can be checked of offsets (total None) and timestamps without reading them; the operator reads them."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if total is None and (x.dim() != 1 or x.shape[0] < 1):
        raise ValueError(f"{name}: expected shape [batch + 1], got {list(x.shape)}")
    if total is not None and x.shape != (total,):
        raise ValueError(f"{name}: expected shape [{total}], one a row, got {list(x.shape)}")
    if x.dtype != torch.int64 and (total is not None or x.dtype != torch.int32):
        expected = "int32 or int64" if total is None else "int64 unix seconds"
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}; move it there")


def _window(window_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if window_size is None:
        return -1, -1
    left, right = (window_size, window_size) if isinstance(window_size, int) else window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size: expected numbers of positions >= 0, or -1 for no limit, got {window_size}")
    return left, right


def _backend(backend: str, q: Tensor) -> str:
    """The backend for these values. What a backend cannot do is left out of "auto" and named where asked for."""
    supported = ["reference"]
    if q.dtype != torch.float64 and q.shape[2] <= _LARGEST_TRITON_HEAD:
        supported.append("triton")
    elif backend == "triton":
        raise ValueError(
            f"backend: 'triton' takes float16, bfloat16 and float32 with head_dim <= {_LARGEST_TRITON_HEAD}, "
            f"got {q.dtype} with head_dim {q.shape[2]}; use backend='reference'"
        )
    if q.dtype == torch.float32:
        supported.append("native")
    elif backend == "native" and q.dtype != torch.float32:
        raise ValueError(f"backend: 'native' takes float32, got {q.dtype}; use backend='reference'")
    return resolve_backend(backend, q.device, supported)


def _module(backend: str) -> ModuleType:
    name = {"triton": "kernel", "native": "native"}.get(backend, "reference")
    return importlib.import_module(f"alure.kernels.attention.{name}")


@operator("jagged_attention")
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
    causal: bool,
    window_left: int,
    window_right: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_offsets(q_offsets, q.shape[0], "q_offsets", q.device)
    check_offsets(k_offsets, k.shape[0], "k_offsets", q.device)
    if q_timestamps is not None and k_timestamps is not None:
        check_timestamps(q_timestamps, q_offsets, q.shape[0], "q_timestamps")
        check_timestamps(k_timestamps, k_offsets, k.shape[0], "k_timestamps")
        _check_range(q_timestamps, "q_timestamps")
        _check_range(k_timestamps, "k_timestamps")
    for thresholds, name in ((time_thresholds, "time_bias"), (position_thresholds, "position_bias")):
        if thresholds is not None and bool((thresholds[1:] <= thresholds[:-1]).any()):
            raise ValueError(f"{name}.thresholds: expected increasing integers, got {thresholds.tolist()}")
    return _module(backend).forward(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        q_timestamps,
        k_timestamps,
        time_thresholds,
        time_table,
        position_thresholds,
        position_table,
        q_cyclic,
        k_cyclic,
        causal,
        window_left,
        window_right,
        scale,
    )


def _check_range(timestamps: Tensor, name: str) -> None:
    """Differences of times must fit int64."""
    if timestamps.numel() and max(abs(int(edge)) for edge in torch.stack(torch.aminmax(timestamps)).tolist()) >= 2**62:
        raise ValueError(f"{name}: expected unix seconds, |t| < 2**62, so that differences fit int64")


@_attention.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[1], q.shape[0]), dtype=accumulate
    )


@operator("jagged_attention_backward")
def _attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _module(backend).backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        q_offsets,
        k_offsets,
        q_timestamps,
        k_timestamps,
        time_thresholds,
        time_table,
        position_thresholds,
        position_table,
        q_cyclic,
        k_cyclic,
        causal,
        window_left,
        window_right,
        scale,
    )
    absent = [lse.new_empty(0) if gradient is None else gradient for gradient in gradients]
    return absent[0], absent[1], absent[2], absent[3], absent[4], absent[5], absent[6]


@_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, q_offsets, k_offsets, *rest):  # type: ignore[no-untyped-def]
    time_table, position_table, q_cyclic, k_cyclic = rest[3], rest[5], rest[6], rest[7]
    contiguous = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    optional = [
        lse.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (time_table, position_table, q_cyclic, k_cyclic)
    ]
    return (*contiguous, *optional)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:13], *output)
    ctx.options = inputs[13:]


def _differentiate(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    """The gradient through `out`; lse is saved for the backward and is not differentiable itself."""
    *inputs, out, lse = ctx.saved_tensors
    q, k, v, q_offsets, k_offsets, *bias = inputs
    gradients = _attention_backward(grad_out, q, k, v, out, lse, q_offsets, k_offsets, *bias, *ctx.options)
    dq, dk, dv, d_time, d_position, d_q_cyclic, d_k_cyclic = gradients
    _, _, _, time_table, _, position_table, q_cyclic, k_cyclic = bias
    return (
        dq,
        dk,
        dv,
        None,
        None,
        None,
        None,
        None,
        d_time if time_table is not None else None,
        None,
        d_position if position_table is not None else None,
        d_q_cyclic if q_cyclic is not None else None,
        d_k_cyclic if k_cyclic is not None else None,
        None,
        None,
        None,
        None,
        None,
    )


_attention.register_autograd(_differentiate, setup_context=_save)
