"""`jagged_attention`: validation, registration with torch.library, choice of the backend."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from alure.kernels.attention.arguments import Batch, Bias
from alure.kernels.attention.backends import backend_module, choose_backend
from alure.kernels.attention.bias import (
    PositionBias,
    TimeBias,
    check_periods,
    check_position_bias,
    check_time_bias,
    cycles,
    cyclic_queries,
)
from alure.kernels.attention.plan import (
    AttentionPlan,
    Window,
    check_groups,
    check_rows,
    check_values,
    listed_windows,
    make_batch,
)
from alure.kernels.jagged import segment_ids
from alure.kernels.operators import operator

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionOptions(TypedDict, total=False):
    """The keywords of `jagged_attention` but return_lse, which decides what it returns, for type checkers."""

    q_timestamps: Tensor | None
    k_timestamps: Tensor | None
    time_bias: TimeBias | None
    position_bias: PositionBias | None
    causal: bool
    window_size: Window | Sequence[Window | None] | None
    num_targets: Tensor | None
    num_contexts: Tensor | None
    groups: Tensor | None
    plan: AttentionPlan | None
    softmax_scale: float | None
    backend: str


@overload
def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor | None = None,
    k_offsets: Tensor | None = None,
    *,
    q_timestamps: Tensor | None = None,
    k_timestamps: Tensor | None = None,
    time_bias: TimeBias | None = None,
    position_bias: PositionBias | None = None,
    causal: bool = False,
    window_size: Window | Sequence[Window | None] | None = None,
    num_targets: Tensor | None = None,
    num_contexts: Tensor | None = None,
    groups: Tensor | None = None,
    plan: AttentionPlan | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention within each sequence of a jagged batch; [total_q, heads, head_dim], like q.

    q [total_q, heads, head_dim], k and v [total_k, kv_heads, head_dim], heads a multiple of kv_heads: float16,
    bfloat16, float32 or float64. q_offsets, k_offsets [batch + 1] int32 or int64; without k_offsets, keys are the
    queries' own sequences. q_timestamps [total_q], k_timestamps [total_k]: int64 seconds, sorted within a sequence;
    needed by `time_bias`. Where q and k differ in length their last rows are aligned (masks, position bias).

    causal: a query sees the keys up to its own position. window_size: (left, right), or one int for both sides; −1: no
    limit.
    num_targets int64 [batch]: the last rows of each sequence are candidates, which see the history and themselves and
    are seen by nobody else; all of them stand at the position after the history. num_contexts int64 [batch]: the first
    rows of each sequence are seen by every query, and see all rows but the targets.
    groups int64 [batch]: which tables of the biases a sequence reads (then [groups, heads, …]), and which of
    `window_size`, then a list; sources with their own biases and windows share one launch so.
    plan: in place of the offsets, times, masks and groups, an `AttentionPlan` of them that was checked once.
    softmax_scale: 1/sqrt(head_dim) by default. A query that sees no key gives zeros.
    return_lse: also give the log-sum-exp of the logits [heads, total_q], float32 (−inf for a query that sees no key).

    Gradients flow to q, k, v and to the table, cosine and sine of the biases; the backward is deterministic, and has no
    derivative of its own: a second one raises.
    Raises ValueError or TypeError before any kernel runs where an argument does not fit.
    """
    _check_values(q, k, v)
    for name, given, kind in (
        ("time_bias", time_bias, TimeBias),
        ("position_bias", position_bias, PositionBias),
        ("plan", plan, AttentionPlan),
    ):
        if given is not None and not isinstance(given, kind):
            raise TypeError(f"{name}: expected {kind.__name__} or None, got {type(given).__name__}")
    if plan is None:
        if q_offsets is None:
            raise ValueError("q_offsets: expected offsets [batch + 1] or a plan, got neither")
        batch = make_batch(q_offsets, k_offsets, causal, window_size, num_targets, num_contexts, groups)
        batch = _with_times(batch, q, k, k_offsets, q_timestamps, k_timestamps)
        listed = listed_windows(window_size)
        num_windows = None if listed is None else len(listed)
    else:
        structure = (q_offsets, k_offsets, q_timestamps, k_timestamps, window_size, num_targets, num_contexts, groups)
        if causal or any(x is not None for x in structure):
            raise ValueError("plan: it holds the offsets, times, masks and groups; expected none of them beside it")
        batch = plan.batch  # tables may be of more groups than a batch has; without any, the batch says how many
        num_windows = plan.num_groups or None if time_bias is None and position_bias is None else None
        _check_plan(plan, q, k, time_bias, position_bias)
    bias, num_groups = _bias(q, batch, time_bias, position_bias, num_windows, plan)
    if plan is not None and plan.num_groups > num_groups:
        raise ValueError(f"plan: it has {plan.num_groups} groups, expected tables for each, got {num_groups}")
    if time_bias is None:
        batch = replace(batch, q_timestamps=None, k_timestamps=None)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    resolved = choose_backend(backend, q.dtype, q.shape[2], q.device)
    prepared = () if plan is None else plan.prepared(resolved, q.dtype, q.shape[2], q.device)
    out, lse = _attention(
        q, k, v, *_flat(batch), *_flat(bias), list(prepared), num_groups, plan is not None, scale, resolved
    )
    return (out, lse) if return_lse else out


def _check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            found = "a nested tensor" if x.is_nested else str(x.layout)
            raise TypeError(
                f"{name}: expected a dense tensor [total, heads, head_dim], got {found}; "
                "alure.kernels.to_jagged gives the values and offsets of a nested one"
            )
        if x.dim() != 3:
            raise ValueError(f"{name}: expected shape [total, heads, head_dim], got {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"q: expected at least one head and one channel, got shape {list(q.shape)}")
    if k.shape != v.shape or k.shape[2] != q.shape[2] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "k and v: expected one shape, [total_k, kv_heads, head_dim] with kv_heads a divisor of the heads of q and "
            f"its head_dim, {list(q.shape[1:])}; got {list(k.shape)} and {list(v.shape)}"
        )


def _with_times(
    batch: Batch,
    q: Tensor,
    k: Tensor,
    k_offsets: Tensor | None,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
) -> Batch:
    """The batch with its times, once it fits the values."""
    if batch.q_offsets.device != q.device:
        found = batch.q_offsets.device
        raise ValueError(f"q_offsets: expected a tensor on {q.device}, got one on {found}; move it there")
    if k_offsets is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"k_offsets: needed because q has {q.shape[0]} rows and k has {k.shape[0]}; "
                "without it keys are the queries' own sequences"
            )
        k_timestamps = q_timestamps if k_timestamps is None else k_timestamps
    for rows, total, name in ((q_timestamps, q.shape[0], "q_timestamps"), (k_timestamps, k.shape[0], "k_timestamps")):
        if rows is not None:
            check_rows(rows, total, name, q.device)
    return replace(batch, q_timestamps=q_timestamps, k_timestamps=k_timestamps)


def _check_plan(
    plan: AttentionPlan, q: Tensor, k: Tensor, time_bias: TimeBias | None, position_bias: PositionBias | None
) -> None:
    if (q.shape[0], k.shape[0]) != (plan.total_q, plan.total_k):
        raise ValueError(
            f"plan: expected q and k of {plan.total_q} and {plan.total_k} rows, got {q.shape[0]} and {k.shape[0]}"
        )
    if plan.batch.q_offsets.device != q.device:
        raise ValueError(f"plan: expected one on {q.device}, got one on {plan.batch.q_offsets.device}")
    if time_bias is not None:
        _check_same(plan.time_thresholds, time_bias.thresholds, "time_thresholds", "time_bias")
        _check_same(plan.periods, time_bias.periods, "periods", "time_bias")
    if position_bias is not None:
        _check_same(plan.position_thresholds, position_bias.thresholds, "position_thresholds", "position_bias")


def _check_same(known: Tensor | None, given: Tensor | None, name: str, owner: str) -> None:
    """Tensors that are not the same object are compared, which waits for the device."""
    if given is not None and given is not known and (known is None or not torch.equal(given, known)):
        raise ValueError(f"plan: expected {name} to be those of {owner}; make the plan with them")


def _bias(
    q: Tensor,
    batch: Batch,
    time_bias: TimeBias | None,
    position_bias: PositionBias | None,
    num_windows: int | None,
    plan: AttentionPlan | None,
) -> tuple[Bias, int]:
    """The biases as the backends take them, and the number of groups that the tables or the windows have."""
    num_heads, grouped = q.shape[1], batch.groups is not None
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    time_table = position_table = q_cyclic = k_cyclic = None
    if time_bias is not None:
        for rows, name in ((batch.q_timestamps, "q_timestamps"), (batch.k_timestamps, "k_timestamps")):
            if rows is None:
                raise ValueError(f"{name}: needed by time_bias; give int64 unix seconds, one a row")
        assert batch.q_timestamps is not None
        assert batch.k_timestamps is not None
        check_time_bias(time_bias, num_heads, grouped, q.device)
        time_table = _grouped(time_bias.table, grouped, accumulate)
        if time_bias.periods is not None and plan is not None:
            q_cyclic = cyclic_queries(time_bias, plan.cycles(accumulate), plan.q_groups())
            k_cyclic = plan.cycles(accumulate).k_cyclic
        elif time_bias.periods is not None:
            if not torch.compiler.is_compiling():
                check_periods(time_bias.periods)
            found = cycles(time_bias.periods, batch.q_timestamps, batch.k_timestamps, accumulate)
            q_groups = None if batch.groups is None else batch.groups[segment_ids(batch.q_offsets, q.shape[0])]
            q_cyclic, k_cyclic = cyclic_queries(time_bias, found, q_groups), found.k_cyclic
    if position_bias is not None:
        check_position_bias(position_bias, num_heads, grouped, q.device)
        position_table = _grouped(position_bias.table, grouped, accumulate)
    counts = {len(table) for table in (time_table, position_table) if table is not None} | (
        {num_windows} if num_windows is not None else set()
    )
    if len(counts) > 1:
        raise ValueError(f"groups: expected as many tables of each bias, and windows, as groups; got {sorted(counts)}")
    bias = Bias(
        time_thresholds=None if time_bias is None else time_bias.thresholds,
        time_table=time_table,
        position_thresholds=None if position_bias is None else position_bias.thresholds,
        position_table=position_table,
        q_cyclic=q_cyclic,
        k_cyclic=k_cyclic,
    )
    return bias, counts.pop() if counts else 1


def _grouped(table: Tensor, grouped: bool, dtype: torch.dtype) -> Tensor:
    return table.to(dtype) if grouped else table.to(dtype)[None]


def _flat(arguments: Batch | Bias) -> tuple[Any, ...]:
    """The tensors of a dataclass as an operator's flat arguments; a plan goes separately."""
    return tuple(getattr(arguments, name) for name in arguments.__dataclass_fields__ if name != "plan")


@operator("jagged_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    rules: Tensor | None,
    groups: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    plan: list[Tensor],
    num_groups: int,
    checked: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch = Batch(q_offsets, k_offsets, q_timestamps, k_timestamps, rules, groups, tuple(plan))
    bias = Bias(time_thresholds, time_table, position_thresholds, position_table, q_cyclic, k_cyclic)
    if not checked:
        check_values(batch, q.shape[0], k.shape[0], time_thresholds, position_thresholds)
        if groups is not None:
            check_groups(groups, num_groups)
    out, lse = backend_module(backend).forward(q, k, v, batch, bias, scale)
    return out, lse


@_attention.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (q.shape[1], q.shape[0]), dtype=accumulate
    )


@operator("jagged_attention_backward")
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_timestamps: Tensor | None,
    k_timestamps: Tensor | None,
    rules: Tensor | None,
    groups: Tensor | None,
    time_thresholds: Tensor | None,
    time_table: Tensor | None,
    position_thresholds: Tensor | None,
    position_table: Tensor | None,
    q_cyclic: Tensor | None,
    k_cyclic: Tensor | None,
    plan: list[Tensor],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = Batch(q_offsets, k_offsets, q_timestamps, k_timestamps, rules, groups, tuple(plan))
    bias = Bias(time_thresholds, time_table, position_thresholds, position_table, q_cyclic, k_cyclic)
    gradients = backend_module(backend).backward(grad_out, grad_lse, q, k, v, out, lse, batch, bias, scale)
    absent = [lse.new_empty(0) if gradient is None else gradient for gradient in gradients]
    return absent[0], absent[1], absent[2], absent[3], absent[4], absent[5], absent[6]


@_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, *rest):  # type: ignore[no-untyped-def]
    time_table, position_table, q_cyclic, k_cyclic = rest[7], rest[9], rest[10], rest[11]
    contiguous = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    optional = [
        lse.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (time_table, position_table, q_cyclic, k_cyclic)
    ]
    return (*contiguous, *optional)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:15], *inputs[15], *output)
    ctx.scale, ctx.backend = inputs[18:]


def _differentiate(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, *structure, out, lse = ctx.saved_tensors
    structure, plan = structure[:12], structure[12:]
    values = (grad_out, grad_lse, q, k, v, out, lse)
    found = _attention_backward(*values, *structure, plan, ctx.scale, ctx.backend)
    _, _, _, _, _, _, _, time_table, _, position_table, q_cyclic, k_cyclic = structure
    dq, dk, dv, d_time, d_position, d_q_cyclic, d_k_cyclic = found
    biases = ((d_time, time_table), (d_position, position_table), (d_q_cyclic, q_cyclic), (d_k_cyclic, k_cyclic))
    d_time, d_position, d_q_cyclic, d_k_cyclic = (None if x is None else gradient for gradient, x in biases)
    structure_gradients = (*[None] * 7, d_time, None, d_position, d_q_cyclic, d_k_cyclic)
    return (dq, dk, dv, *structure_gradients, [None] * len(plan), None, None, None, None)


_attention.register_autograd(_differentiate, setup_context=_save)
