"""`encode_events`: embed the attributes of every event and add the CFEE features, in one pass."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from alure.kernels.backend import resolve_backend
from alure.kernels.encoding import reference
from alure.kernels.encoding.arguments import (
    FLOATS,
    CheckedColumns,
    EventColumns,
    EventEncoder,
    Gradients,
    check_arguments,
    check_values,
)
from alure.kernels.operators import operator

BACKENDS = ("triton", "native", "reference")


def encode_events(
    ids: Tensor,
    table: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    reference_times: Tensor,
    encoder: EventEncoder,
    *,
    counts: Tensor | None = None,
    dense: Tensor | None = None,
    utc_offsets: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Token embeddings of a jagged batch of events: content, absolute position, frequency, decay and cycles.

    out = Σ_a table[ids[:, a]] @ id_weight[a] + dense @ dense_weight + f @ time_weight + bias
          + position_table[min(order, Pmax − 1)] + frequency_table[min(⌊log2(1 + count)⌋, Fmax − 1)]
    f   = [log1p(age / τ), log1p(gap / τ), sin(2π(t mod p)/p + φ_p) …, cos(2π(t mod p)/p + φ_p) …]

    `order` counts from the newest event of a sequence (newest = 0), so dropping old events moves nothing; `age` is
    max(0, T − t); `gap` is the time since the event before, 0 for the first. Differences and t mod p are taken in
    int64. With utc_offsets the cycles run in local time. Without counts there is no frequency term, without periods
    no cycles, without dense and with A = 0 no content; what is switched off costs nothing.

    Args:
        ids: int64 [total, A], rows of `table`; −1 is a missing attribute and adds nothing. Semantic ids are
            attributes like any other, one column a level, where each level's codes have rows of their own.
        table: [R, d_e], float32 or bfloat16, or float16 (triton, reference) or float64 (reference).
        offsets: int32 or int64 [batch + 1].
        timestamps: int64 [total] seconds, never decreasing within a sequence.
        reference_times: int64 [batch] seconds, T of each sequence.
        encoder: the parameters, in the table's dtype.
        counts: int64 [total], occurrences so far of the event's account or category.
        dense: [total, d_dense], any float dtype.
        utc_offsets: int64 [total] seconds.
        backend: "auto", "triton", "native" or "reference".

    Returns:
        [total, D] in the table's dtype. Differentiable in table, dense, and every float tensor of the encoder;
        the backward is deterministic. Sums run in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was expected, and what came. Ids, offsets and times are
            checked before anything is read through them.
    """
    events = EventColumns(ids, offsets, timestamps, reference_times, counts, None, utc_offsets)
    return encode_columns(events, table, encoder, dense=dense, backend=backend)


def encode_columns(
    events: EventColumns, table: Tensor, encoder: EventEncoder, *, dense: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`encode_events` of columns; where they are `CheckedColumns` of such a table and encoder, it only launches.

    dense: in place of the columns' own.
    """
    if not isinstance(encoder, EventEncoder):
        raise TypeError(f"encoder: expected EventEncoder, got {type(encoder).__name__}")
    checked = isinstance(events, CheckedColumns) and (
        events.num_rows <= table.shape[0] and events.periods is encoder.periods
    )
    e = events
    columns = EventColumns(
        e.ids, e.offsets, e.timestamps, e.reference_times, e.counts, e.dense if dense is None else dense, e.utc_offsets
    )
    check_arguments(table, columns, encoder)
    return _encode(table, *_flatten(columns, encoder), _resolve(backend, table), checked)


def _resolve(backend: str, table: Tensor) -> str:
    """The backend for this table. What a backend cannot do is left out of "auto" and refused where asked for."""
    dtypes = {"triton": FLOATS[:3], "native": (torch.float32, torch.bfloat16), "reference": FLOATS}
    if table.dtype not in dtypes.get(backend, FLOATS):
        expected = ", ".join(str(dtype) for dtype in dtypes[backend])
        raise ValueError(f"backend: {backend!r} takes a table of {expected}, got {table.dtype}; use 'reference'")
    return resolve_backend(backend, table.device, [name for name in BACKENDS if table.dtype in dtypes[name]])


def _flatten(events: EventColumns, encoder: EventEncoder) -> tuple[Any, ...]:
    """The dataclasses as an operator's flat arguments; `_gather` is its inverse."""
    e, w = events, encoder
    columns = (e.ids, e.offsets, e.timestamps, e.reference_times, e.counts, e.dense, e.utc_offsets)
    tensors = (w.id_weight, w.time_weight, w.bias, w.position_table, w.frequency_table, w.periods, w.phases)
    return (*columns, *tensors, w.tau, w.dense_weight)


def _gather(flat: tuple[Any, ...]) -> tuple[EventColumns, EventEncoder]:
    return EventColumns(*flat[:7]), EventEncoder(*flat[7:])


@operator("encode_events")
def _encode(
    table: Tensor,
    ids: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    reference_times: Tensor,
    counts: Tensor | None,
    dense: Tensor | None,
    utc_offsets: Tensor | None,
    id_weight: Tensor,
    time_weight: Tensor,
    bias: Tensor,
    position_table: Tensor,
    frequency_table: Tensor,
    periods: Tensor,
    phases: Tensor,
    tau: float,
    dense_weight: Tensor | None,
    backend: str,
    checked: bool,
) -> Tensor:
    events = EventColumns(ids, offsets, timestamps, reference_times, counts, dense, utc_offsets)
    tables = (position_table, frequency_table)
    encoder = EventEncoder(id_weight, time_weight, bias, *tables, periods, phases, tau, dense_weight)
    check_arguments(table, events, encoder)
    if backend == "native":
        from alure.kernels.encoding import native

        return _sound(native.encode_events(table, events, encoder), table, events, encoder)
    if not checked:
        check_values(table.shape[0], events, periods)
    if backend == "triton":
        from alure.kernels.encoding import kernel

        return kernel.encode_events(table, events, encoder)
    return reference.encode_events(table, events, encoder)


_Result = TypeVar("_Result")


def _sound(result: _Result | None, table: Tensor, events: EventColumns, encoder: EventEncoder) -> _Result:
    """`result` of the native kernel, which checks values as it reads them; where it found a fault, its name raises."""
    if result is None:
        check_values(table.shape[0], events, encoder.periods)
        raise RuntimeError("native encode_events refused values that are in range; please report this")
    return result


@_encode.register_fake
def _(table: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    bias = rest[8]
    return table.new_empty(ids.shape[0], bias.shape[0])


@operator("encode_events_backward")
def _encode_backward(
    grad: Tensor,
    table: Tensor,
    ids: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    reference_times: Tensor,
    counts: Tensor | None,
    dense: Tensor | None,
    utc_offsets: Tensor | None,
    id_weight: Tensor,
    time_weight: Tensor,
    bias: Tensor,
    position_table: Tensor,
    frequency_table: Tensor,
    periods: Tensor,
    phases: Tensor,
    tau: float,
    dense_weight: Tensor | None,
    wants_dense: bool,
    backend: str,
) -> list[Tensor]:
    events = EventColumns(ids, offsets, timestamps, reference_times, counts, dense, utc_offsets)
    tables = (position_table, frequency_table)
    encoder = EventEncoder(id_weight, time_weight, bias, *tables, periods, phases, tau, dense_weight)
    if backend == "native":
        from alure.kernels.encoding import native

        result = native.encode_events_backward(grad, table, events, encoder, wants_dense)
        return list(_sound(result, table, events, encoder))
    if backend == "triton":
        from alure.kernels.encoding import kernel_backward

        return list(kernel_backward.encode_events_backward(grad, table, events, encoder, wants_dense))
    return list(reference.encode_events_backward(grad, table, events, encoder, wants_dense))


@_encode_backward.register_fake
def _(grad: Tensor, table: Tensor, *rest: Any) -> list[Tensor]:
    events, encoder = _gather(rest[:-2])
    nothing = grad.new_empty(0, dtype=torch.promote_types(table.dtype, torch.float32))
    wants_dense = rest[-2]
    return [
        torch.empty_like(table, memory_format=torch.contiguous_format),
        events.dense.new_empty(events.dense.shape) if wants_dense and events.dense is not None else nothing,
        encoder.id_weight.new_empty(encoder.id_weight.shape),
        table.new_empty(0, encoder.bias.shape[0])
        if encoder.dense_weight is None
        else encoder.dense_weight.new_empty(encoder.dense_weight.shape),
        encoder.time_weight.new_empty(encoder.time_weight.shape),
        encoder.bias.new_empty(encoder.bias.shape),
        encoder.position_table.new_empty(encoder.position_table.shape),
        encoder.frequency_table.new_empty(encoder.frequency_table.shape),
        encoder.phases.new_empty(encoder.phases.shape),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tau, dense_weight, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, dense_weight)
    ctx.wants_dense = inputs[6] is not None and ctx.needs_input_grad[6]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, dense_weight = ctx.saved_tensors
    g = Gradients(*_encode_backward(grad, *tensors, ctx.tau, dense_weight, ctx.wants_dense, ctx.backend))
    weights = (g.id_weight, g.time_weight, g.bias, g.position_table, g.frequency_table, None, g.phases)
    columns = (*[None] * 5, g.dense if ctx.wants_dense else None, None)
    return (g.table, *columns, *weights, None, None if dense_weight is None else g.dense_weight, None, None)


_encode.register_autograd(_backward, setup_context=_setup_context)
