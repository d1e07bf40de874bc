"""Jagged attention in Triton, forward and backward.

One program makes one tile of one head: forward and dq a tile of queries, dk and dv a tile of keys. A tile lies in one
sequence, so work grows with Σ n_q·n_k and nothing crosses sequences. Buckets are found without gathers: sorted times
give the first and the last bucket of a tile of pairs from its corners, and a chain of compare-and-selects over the
buckets between them gives the bias. Far from the diagonal a tile lies in one bucket and the chain is empty.
The gradient of a table is summed bucket by bucket in each program, stored, and added up in a fixed order: no atomics,
and the same bits every time. Logits live in units of log 2, for exp2.

    q [Tq, H, D]  k, v [Tk, H, D]  fp16 | bf16 | fp32, any strides with contiguous channels
    offsets [B + 1] int32 | int64; times [T] and time thresholds int32 where every sequence's span fits, else int64
    tables [H, buckets] fp32; q_cyclic [Tq, H, C], k_cyclic [Tk, C] fp32; lse, delta [H, Tq] fp32
"""

import contextlib
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.attention import flat
from alure.kernels.attention.kernel_backward import backward_kv_kernel, backward_q_kernel
from alure.kernels.attention.kernel_forward import forward_kernel
from alure.kernels.backend import triton_interprets
from alure.kernels.jagged import segment_ids, tile_list


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By padded head_dim: (forward, dq, dk and dv). Untuned: the largest tiles found that compile without spills for sm_80,
# sm_90 and sm_100 with every bias. float32 multiplies in float32: three tf32 products need twice the registers.
HALF_CONFIGS = {
    16: (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(64, 32, 4, 2)),
    32: (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(64, 32, 4, 2)),
    64: (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(64, 32, 4, 2)),
    128: (Config(64, 32, 8, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    256: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}
FLOAT_CONFIGS = {
    16: (Config(32, 32, 4, 1), Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    32: (Config(32, 16, 4, 1), Config(32, 16, 4, 1), Config(32, 32, 8, 1)),
    64: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 16, 4, 1)),
    128: (Config(32, 32, 4, 1), Config(32, 16, 4, 1), Config(32, 16, 4, 1)),
    256: (Config(32, 16, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
}


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
    """out [Tq, H, D] like q and lse [H, Tq]; arguments as in ops.py."""
    total_q, num_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, total_q), dtype=torch.float32, device=q.device)
    if total_q == 0:
        return out, lse
    config = _configs(q)[0]
    q, k, v = _rows(q), _rows(k), _rows(v)
    times = _rebase(q_timestamps, k_timestamps, q_offsets, k_offsets, time_thresholds)
    sequences, starts = tile_list(q_offsets, config.block_m)
    with _device(q):
        forward_kernel[(sequences.numel(), num_heads)](
            q,
            k,
            v,
            out,
            lse,
            q_offsets,
            k_offsets,
            sequences,
            starts,
            *_bias_arguments(times, time_table, position_thresholds, position_table, q_cyclic, k_cyclic, q),
            *_strides(q, k, v),
            total_q,
            scale,
            *_window(causal, window_left, window_right),
            **_constants(q, time_table, position_table, q_cyclic, causal, window_left, window_right),
            **_launch(config),
        )
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
    total_q, num_heads, _ = q.shape
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    delta = (grad_out.float() * out.float()).sum(-1).t().contiguous()  # [H, Tq]
    _, config_q, config_kv = _configs(q)
    times = _rebase(q_timestamps, k_timestamps, q_offsets, k_offsets, time_thresholds)
    q_sequences, q_starts = tile_list(q_offsets, config_q.block_m)
    k_sequences, k_starts = tile_list(k_offsets, config_kv.block_n)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_q_cyclic = None if q_cyclic is None else torch.empty_like(q_cyclic)
    d_k_cyclic = None if k_cyclic is None else k_cyclic.new_empty((k.shape[0], num_heads, k_cyclic.shape[1]))
    time_sums, position_sums = (
        None if table is None else table.new_empty((q_sequences.numel(), *table.shape))
        for table in (time_table, position_table)
    )
    bias = _bias_arguments(times, time_table, position_thresholds, position_table, q_cyclic, k_cyclic, q)
    scalars = (*_strides(q, k, v, grad_out), total_q, scale, *_window(causal, window_left, window_right))
    constants = _constants(q, time_table, position_table, q_cyclic, causal, window_left, window_right)
    with _device(q):
        if q_sequences.numel():
            backward_q_kernel[(q_sequences.numel(), num_heads)](
                q,
                k,
                v,
                grad_out,
                lse,
                delta,
                dq,
                q if d_q_cyclic is None else d_q_cyclic,
                q if time_sums is None else time_sums,
                q if position_sums is None else position_sums,
                q_offsets,
                k_offsets,
                q_sequences,
                q_starts,
                *bias,
                *scalars,
                **constants,
                **_launch(config_q),
            )
        if k_sequences.numel():
            backward_kv_kernel[(k_sequences.numel(), num_heads)](
                q,
                k,
                v,
                grad_out,
                lse,
                delta,
                dk,
                dv,
                q if d_k_cyclic is None else d_k_cyclic,
                q_offsets,
                k_offsets,
                k_sequences,
                k_starts,
                *bias,
                *scalars,
                **constants,
                **_launch(config_kv),
            )
    return (
        dq,
        dk,
        dv,
        None if time_sums is None else time_sums.sum(0),
        None if position_sums is None else position_sums.sum(0),
        d_q_cyclic,
        None if d_k_cyclic is None else d_k_cyclic.sum(1),
    )


def _rows(x: Tensor) -> Tensor:
    """x with contiguous channels; rows and heads may lie anywhere."""
    return x if x.stride(2) == 1 else x.contiguous()


def _device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rebase(
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    thresholds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(q times, k times, thresholds): int32 seconds since each sequence's first event where all spans fit, else int64.

    With every difference within ±(2**31 − 2), thresholds beyond it mean the same when cut to ±(2**31 − 1).
    """
    if q_timestamps is None or k_timestamps is None or thresholds is None:
        return None
    limit = 2**31 - 1
    bounds = torch.iinfo(torch.int64)
    first = torch.full((q_offsets.numel() - 1,), bounds.max, dtype=torch.int64, device=q_offsets.device)
    last = torch.full_like(first, bounds.min)
    for times, offsets in ((q_timestamps, q_offsets), (k_timestamps, k_offsets)):
        begin, end = offsets[:-1].to(torch.int64), offsets[1:].to(torch.int64)
        (filled,) = (end > begin).nonzero(as_tuple=True)
        first[filled] = torch.minimum(first[filled], times[begin[filled]])
        last[filled] = torch.maximum(last[filled], times[end[filled] - 1])
    spans = (last - first)[last >= first]
    if spans.numel() == 0 or int(spans.max()) >= limit:
        return q_timestamps.contiguous(), k_timestamps.contiguous(), thresholds.contiguous()
    q_times, k_times = (
        (times - first[segment_ids(offsets, times.numel())]).to(torch.int32)
        for times, offsets in ((q_timestamps, q_offsets), (k_timestamps, k_offsets))
    )
    return q_times, k_times, thresholds.clamp(-limit, limit).to(torch.int32)


def _bias_arguments(
    times: tuple[Tensor, Tensor, Tensor] | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    absent: Tensor,
) -> list[Tensor]:
    """The eight tensors of the biases in the kernels' order; `absent` stands for what is never read."""
    if position_thresholds is not None:  # positions fit int32, so thresholds beyond it can be cut to it
        position_thresholds = position_thresholds.clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)
    found = (*(times or (None, None, None)), time_table, position_thresholds, position_table, q_cyclic, k_cyclic)
    return [absent if x is None else x.contiguous() for x in found]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _window(causal: bool, left: int, right: int) -> tuple[int, int]:
    """Both limits within int32; causal is a right window of 0. A limit of −1 is not read."""
    longest = 2**30
    return min(left, longest), 0 if causal else min(right, longest)


def _constants(
    q: Tensor,
    time_table: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
) -> dict[str, object]:
    time_buckets = 0 if time_table is None else time_table.shape[1]
    position_buckets = 0 if position_table is None else position_table.shape[1]
    channels = 0 if q_cyclic is None else q_cyclic.shape[2]
    dtypes = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {
        "HEADS": q.shape[1],
        "HEAD_DIM": q.shape[2],
        "TIME_BUCKETS": time_buckets,
        "POSITION_BUCKETS": position_buckets,
        "CHANNELS": channels,
        "LEFT": window_left >= 0,
        "RIGHT": causal or window_right >= 0,
        "DOT": tl.float32 if triton_interprets() else dtypes[q.dtype],  # the interpreter's bfloat16 dot is wrong
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "BLOCK_D": _block(q.shape[2], 16),
        "BLOCK_T": _block(time_buckets, 16),
        "BLOCK_P": _block(position_buckets, 16),
        "BLOCK_C": _block(channels, 16),
    }


def _block(size: int, smallest: int) -> int:
    return max(smallest, triton.next_power_of_2(size))


def _configs(q: Tensor) -> tuple[Config, Config, Config]:
    configs = FLOAT_CONFIGS if q.dtype == torch.float32 else HALF_CONFIGS
    return configs[_block(q.shape[2], 16)]


def _launch(config: Config) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _case(kernel, config: Config, dtype: str, head_dim: int):
    """(kernel, signature, constexprs, options) with every bias, a window and times that fit int32."""
    integers = {"p_q_offsets": "*i64:16", "p_k_offsets": "*i64:16", "scale": "fp32"}
    integers |= dict.fromkeys(("p_tile_sequence", "p_tile_start", "p_q_time", "p_k_time"), "*i32:16")
    integers |= dict.fromkeys(("p_time_thresholds", "p_position_thresholds"), "*i32:16")
    values = {"p_q", "p_k", "p_v", "p_out", "p_grad_out", "p_dq", "p_dk", "p_dv"}
    constexprs = {
        "HEADS": 4,
        "HEAD_DIM": head_dim,
        "TIME_BUCKETS": 107,
        "POSITION_BUCKETS": 55,
        "CHANNELS": 4,
        "LEFT": True,
        "RIGHT": True,
        "DOT": {"bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "BLOCK_D": head_dim,
        "BLOCK_T": 128,
        "BLOCK_P": 64,
        "BLOCK_C": 16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    signature = {}
    for name in kernel.arg_names:
        if name in integers:
            signature[name] = integers[name]
        elif name.startswith("p_"):
            signature[name] = f"*{dtype if name in values else 'fp32'}:16"
        elif name not in constexprs:
            signature[name] = "i32:16" if name.startswith("stride") else "i32"
    return kernel, signature, constexprs, {"num_warps": config.num_warps, "num_stages": config.num_stages}


_KERNELS = (forward_kernel, backward_q_kernel, backward_kv_kernel)
_COMMON = (("bf16", 64, _KERNELS), ("fp32", 64, _KERNELS[:1]))
_ALL = [(dtype, head_dim, _KERNELS) for dtype in ("bf16", "fp32") for head_dim in HALF_CONFIGS]


def _cases(shipped):
    return [
        _case(kernel, config, dtype, head_dim)
        for dtype, head_dim, kernels in shipped
        for kernel, config in zip(kernels, (HALF_CONFIGS if dtype == "bf16" else FLOAT_CONFIGS)[head_dim])
    ]


AHEAD_OF_TIME = _cases(_COMMON)
AHEAD_OF_TIME_SLOW = _cases(_ALL)


def forward(*arguments):  # type: ignore[no-untyped-def]
    return flat.forward(sys.modules[__name__], *arguments)


def backward(*arguments):  # type: ignore[no-untyped-def]
    return flat.backward(sys.modules[__name__], *arguments)
