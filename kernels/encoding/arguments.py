"""What `encode_events` reads, and the checks that stand before its kernels."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from alure.kernels.jagged import check_offsets, check_timestamps

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FARTHEST = 1 << 61  # seconds; differences of times within it cannot overflow int64


@dataclass(frozen=True)
class EventEncoder:
    """The parameters of the complex feature enrichment encoder (CFEE): A attributes of width d_e, P periods, width D.

    All tensors share the embedding table's dtype, except `phases`, which may also be float32.
    """

    id_weight: Tensor  # [A, d_e, D]
    time_weight: Tensor  # [2 + 2P, D], rows: age, gap, P sines, P cosines
    bias: Tensor  # [D]
    position_table: Tensor  # [Pmax, D]; events older than the Pmax - 1 newest share the last row
    frequency_table: Tensor  # [Fmax, D]; row floor(log2(1 + count)), the last row for all counts beyond
    periods: Tensor  # int64 [P], seconds
    phases: Tensor  # [P], radians
    tau: float  # seconds, unit of age and gap inside the logarithm
    dense_weight: Tensor | None = None  # [d_dense, D]


@dataclass(frozen=True)
class EventColumns:
    """The events of a jagged batch, one row an event. Nothing is checked before they are encoded."""

    ids: Tensor  # int64 [total, A], rows of the embedding table; -1 = missing
    offsets: Tensor  # [batch + 1]
    timestamps: Tensor  # int64 [total], seconds, sorted within a sequence
    reference_times: Tensor  # int64 [batch], the snapshot time T of each sequence
    counts: Tensor | None = None  # int64 [total], occurrences so far
    dense: Tensor | None = None  # [total, d_dense]
    utc_offsets: Tensor | None = None  # int64 [total], seconds to add for local time

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The columns elsewhere: `move` gives a tensor's copy there, for the same tensor the same copy."""
        found = copy.copy(self)
        for name in (f.name for f in fields(self)):
            if isinstance(x := getattr(self, name), Tensor):
                object.__setattr__(found, name, move(x))
        return found


@dataclass(frozen=True, kw_only=True)
class CheckedColumns(EventColumns):
    """Columns whose values were read and checked once; `encode_columns` trusts them, and so never waits for the device.

    num_rows: of the table, and periods: the very tensor of the encoder, that they will be encoded with. What does not
    fit raises as in `encode_events`. The tensors must not be changed afterwards.
    """

    num_rows: int
    periods: Tensor

    def __post_init__(self) -> None:
        check_columns(self, self.ids.device)
        check_values(self.num_rows, self, self.periods)


class Gradients(NamedTuple):
    """Gradients of `encode_events`, each like its argument."""

    table: Tensor
    dense: Tensor  # empty where not wanted or not given
    id_weight: Tensor
    dense_weight: Tensor  # empty where not given
    time_weight: Tensor
    bias: Tensor
    position_table: Tensor
    frequency_table: Tensor
    phases: Tensor


def check_arguments(table: Tensor, events: EventColumns, encoder: EventEncoder) -> None:
    """Raise unless dtypes, shapes and devices agree. Reads no values, so it also holds under tracing."""
    if table.dtype not in FLOATS:
        raise TypeError(f"table: expected float16, bfloat16, float32 or float64, got {table.dtype}")
    if table.dim() != 2:
        raise ValueError(f"table: expected shape [rows, d_e], got {list(table.shape)}")
    check_columns(events, table.device)
    if encoder.bias.dim() != 1:
        raise ValueError(f"bias: expected shape [D], got {list(encoder.bias.shape)}")
    if encoder.periods.dim() != 1:
        raise ValueError(f"periods: expected shape [P], got {list(encoder.periods.shape)}")
    if not (math.isfinite(encoder.tau) and encoder.tau > 0):
        raise ValueError(f"tau: expected a finite number of seconds > 0, got {encoder.tau}")
    total, attributes = events.ids.shape
    width, num_periods, device = encoder.bias.numel(), encoder.periods.numel(), table.device

    def check(name: str, x: Tensor, shape: _Shape, dtypes: tuple[torch.dtype, ...]) -> None:
        _check(name, x, shape, dtypes, device)

    same, int64 = (table.dtype,), (torch.int64,)
    check("id_weight", encoder.id_weight, (attributes, table.shape[1], width), same)
    check("time_weight", encoder.time_weight, (2 + 2 * num_periods, width), same)
    check("bias", encoder.bias, (width,), same)
    check("position_table", encoder.position_table, (None, width), same)
    check("frequency_table", encoder.frequency_table, (None, width), same)
    check("periods", encoder.periods, (num_periods,), int64)
    check("phases", encoder.phases, (num_periods,), (table.dtype, torch.float32))
    for name, rows in (("position_table", encoder.position_table), ("frequency_table", encoder.frequency_table)):
        if rows.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one row, got shape {list(rows.shape)}")
    if (events.dense is None) != (encoder.dense_weight is None):
        given, missing = ("dense", "dense_weight") if encoder.dense_weight is None else ("dense_weight", "dense")
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None; give both or neither")
    if events.dense is not None and encoder.dense_weight is not None:
        check("dense", events.dense, (total, None), FLOATS)
        check("dense_weight", encoder.dense_weight, (events.dense.shape[1], width), same)


def check_columns(events: EventColumns, device: torch.device) -> None:
    """Raise unless dtypes and shapes of the integers agree and they are on `device`, the table's. Reads no values."""
    if events.ids.dim() != 2:
        raise ValueError(f"ids: expected shape [total, attributes], got {list(events.ids.shape)}")
    if events.offsets.dim() != 1 or events.offsets.numel() < 1:
        raise ValueError(f"offsets: expected shape [batch + 1], got {list(events.offsets.shape)}")
    total, attributes = events.ids.shape
    batch, int64 = events.offsets.numel() - 1, (torch.int64,)
    _check("ids", events.ids, (total, attributes), int64, device)
    _check("timestamps", events.timestamps, (total,), int64, device)
    _check("reference_times", events.reference_times, (batch,), int64, device)
    _check("offsets", events.offsets, (batch + 1,), (torch.int64, torch.int32), device)
    if events.counts is not None:
        _check("counts", events.counts, (total,), int64, device)
    if events.utc_offsets is not None:
        _check("utc_offsets", events.utc_offsets, (total,), int64, device)


_Shape = tuple[int | None, ...]


def _check(name: str, x: Tensor, shape: _Shape, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if x.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}; call .to({dtypes[0]})")
    if x.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} (where the table is), got one on {x.device}")


def check_values(num_rows: int, events: EventColumns, periods: Tensor) -> None:
    """Raise unless every value that becomes an address or a difference of times is in range. Waits for the device."""
    total = events.ids.shape[0]
    check_offsets(events.offsets, total)
    check_timestamps(events.timestamps, events.offsets, total)
    ranges: dict[str, tuple[Tensor | None, int, int, str]] = {
        "ids": (events.ids, -1, num_rows - 1, "hash or map ids into the table's rows; -1 stands for a missing one"),
        "timestamps": (events.timestamps, -FARTHEST, FARTHEST, "use unix seconds"),
        "reference_times": (events.reference_times, -FARTHEST, FARTHEST, "use unix seconds"),
        "counts": (events.counts, 0, (1 << 62) - 1, "count occurrences from 0"),
        "utc_offsets": (events.utc_offsets, -FARTHEST, FARTHEST, "use seconds east of UTC"),
        "periods": (periods, 1, FARTHEST, "use whole seconds > 0"),
    }
    given = {name: torch.aminmax(x) for name, (x, _, _, _) in ranges.items() if x is not None and x.numel()}
    if not given:
        return
    bounds = torch.stack([bound for pair in given.values() for bound in pair]).tolist()  # one transfer for all
    for name, least, most in zip(given, bounds[::2], bounds[1::2]):
        _, lowest, highest, remedy = ranges[name]
        if least < lowest or most > highest:
            raise ValueError(f"{name}: expected values from {lowest} to {highest}, got {least} to {most}; {remedy}")
