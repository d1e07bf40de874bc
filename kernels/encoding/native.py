"""`encode_events` on the CPU, float32 or bfloat16 with float32 sums: hands tensors to the C++ of kernels/native.

Values are checked in the same pass that uses them. A token's embedding depends on its own sequence alone, and no result
depends on the number of threads. Extra memory: the packed weights and a block of rows a thread; in the backward
also the gradients of some thousand gathered rows at a time, never of all. In bfloat16 also the weights in float32; in
the backward the gradients too, which are rounded in the end.
"""

from typing import Any

import torch
from torch import Tensor

from alure.kernels import _native
from alure.kernels.encoding.arguments import EventColumns, EventEncoder, Gradients

INSTRUCTION_SET: str = _native.instruction_set()


def encode_events(table: Tensor, events: EventColumns, encoder: EventEncoder) -> Tensor | None:
    """[total, D] in the table's dtype, or None where a value of the events is out of range."""
    encoding = _encoding(table, events, encoder)
    out = torch.empty(events.ids.shape[0], encoder.bias.numel(), dtype=table.dtype)
    sound = _native.encode_events(encoding, _values(out), INSTRUCTION_SET, torch.get_num_threads())
    return out if sound else None


def encode_events_backward(
    grad: Tensor, table: Tensor, events: EventColumns, encoder: EventEncoder, wants_dense: bool
) -> Gradients | None:
    """Gradients for `grad` [total, D], like their arguments; None where a value of the events is out of range."""
    encoding = _encoding(table, events, encoder)
    dense, dense_weight = events.dense if wants_dense else None, encoder.dense_weight
    gradients = Gradients(
        table=torch.zeros(table.shape),
        dense=torch.empty(0 if dense is None else dense.shape),
        id_weight=torch.empty(encoder.id_weight.shape),
        dense_weight=torch.empty((0, encoder.bias.numel()) if dense_weight is None else dense_weight.shape),
        time_weight=torch.empty(encoder.time_weight.shape),
        bias=torch.empty(encoder.bias.shape),
        position_table=torch.zeros(encoder.position_table.shape),
        frequency_table=torch.zeros(encoder.frequency_table.shape),
        phases=torch.empty(encoder.phases.shape),
    )
    arrays: list[Any] = [gradient.numpy() for gradient in gradients]
    arrays[1] = None if dense is None else arrays[1]
    arrays[3] = None if dense_weight is None else arrays[3]
    arguments = [_floats(grad), *arrays, INSTRUCTION_SET, torch.get_num_threads()]
    if not _native.encode_events_backward(encoding, *arguments):
        return None
    rounded = Gradients(*(gradient.to(table.dtype) for gradient in gradients))
    of_dense = gradients.dense if dense is None else gradients.dense.to(dense.dtype)
    return rounded._replace(dense=of_dense, phases=gradients.phases.to(encoder.phases.dtype))


def _encoding(table: Tensor, e: EventColumns, w: EventEncoder) -> _native.Encoding:
    """NumPy views of the arguments; the module refuses shapes that do not fit together."""
    columns = (e.offsets.to(torch.int64), e.timestamps, e.reference_times, e.counts)
    arguments = [_array(e.ids), _values(table), *map(_array, columns), _floats(e.dense), _array(e.utc_offsets)]
    weights, tables = (w.id_weight, w.time_weight, w.bias), (w.position_table, w.frequency_table)
    arguments += [*map(_floats, weights), *map(_values, tables)]
    arguments += [_array(w.periods), _floats(w.phases), w.tau, _floats(w.dense_weight)]
    return _native.Encoding(*arguments)


def _values(x: Tensor) -> Any:
    """float32, or bfloat16 as uint16, a type that NumPy has."""
    return _array(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x)


def _floats(x: Tensor | None) -> Any:
    return None if x is None else _array(x.to(torch.float32))


def _array(x: Tensor | None) -> Any:
    return None if x is None else x.detach().contiguous().numpy()
