"""Biases on attention logits that depend on when, and on where in the sequence, query and key happened.

    b_h(i, j) = A_h[bucket(t_i − t_j)] + P_h[bucket(i − j)] + Σ_p c_hp·cos(2π(t_i − t_j)/p) + s_hp·sin(2π(t_i − t_j)/p)

A bucket is the number of integer thresholds <= the difference, so it needs no logarithm and every backend finds the
same one. The cyclic sum is separable and becomes 2·P extra channels of q and k (`cycles`, `cyclic_queries`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding


@dataclass(frozen=True)
class TimeBias:
    """Learned bias over t_query − t_key in seconds.

    thresholds: int64 [B − 1], increasing; table: [H, B]. Cyclic part (all three or none): periods int64 [P] in
    seconds, cosine and sine [H, P]. With `groups`, table, cosine and sine have a first dimension of groups.
    """

    thresholds: Tensor
    table: Tensor
    periods: Tensor | None = None
    cosine: Tensor | None = None
    sine: Tensor | None = None


@dataclass(frozen=True)
class PositionBias:
    """Learned bias over i − j, positions in the sequence. thresholds: int64 [B − 1], increasing; table: [H, B].

    With `groups`, table has a first dimension of groups.
    """

    thresholds: Tensor
    table: Tensor


def time_thresholds(per_octave: int = 2, longest: int = 4 * 365 * 86_400, bidirectional: bool = True) -> Tensor:
    """int64 thresholds in seconds, `per_octave` an octave from 1 s to `longest`; a table needs one column more.

    Bidirectional thresholds are mirrored, so that Δ and −Δ fall into opposite buckets and Δ = 0 into the middle one.
    """
    return _log_spaced(per_octave, longest, bidirectional)


def position_thresholds(per_octave: int = 2, longest: int = 16_384, bidirectional: bool = True) -> Tensor:
    """int64 thresholds in positions, as `time_thresholds`: near neighbours have a bucket each, far ones share."""
    return _log_spaced(per_octave, longest, bidirectional)


def _log_spaced(per_octave: int, longest: int, bidirectional: bool) -> Tensor:
    """Up to 8 an octave they begin cells of float32's sign, exponent and three bits, whose bucket is then known: Triton
    kernels look one value up instead of comparing as well (kernel_tiles.py).
    """
    if per_octave < 1 or longest < 1:
        raise ValueError(f"expected per_octave >= 1 and longest >= 1, got {per_octave} and {longest}")
    powers = [2 ** (step / per_octave) for step in range(per_octave)]
    if per_octave <= 8:
        powers = _in_eighths(powers)
    octaves = range(int(math.log2(longest)) + 1)
    forward = sorted({int(2**octave * power + 0.5) for octave in octaves for power in powers})
    forward = [_first_of_float(threshold) for threshold in forward if threshold <= longest]
    # The mirror image of "Δ >= t" is "Δ <= −t", which is "not Δ >= 1 − t".
    backward = [1 - threshold for threshold in reversed(forward)] if bidirectional else []
    return torch.tensor(backward + forward, dtype=torch.int64)


def _in_eighths(powers: list[float]) -> list[float]:
    """Rounded, and all different."""
    eighths = [7]
    for power in powers:
        eighths.append(max(eighths[-1] + 1, round(8 * power)))
    return [number / 8 for number in eighths[1:]]


def _first_of_float(number: int) -> int:
    """The first integer with the float32 of `number`: less than it by up to 4 in 2^27, the same below 2^24."""
    rounded = torch.tensor(number).to(torch.float32)
    while torch.tensor(number - 1).to(torch.float32) == rounded:
        number -= 1
    return number


class Cycles(NamedTuple):
    """Where in each period the times of a batch lie; heads and layers share it."""

    q_cyclic: Tensor  # [total_q, 2P]: cosines, then sines
    q_turned: Tensor  # [total_q, 2P], a quarter of each period before: sines, then −cosines
    k_cyclic: Tensor  # [total_k, 2P], the keys' channels: cosines, then sines


def cycles(periods: Tensor, q_timestamps: Tensor, k_timestamps: Tensor, dtype: torch.dtype) -> Cycles:
    """Times are reduced modulo the period as int64: seconds of this decade in float32 round by up to 64 s."""
    cos, sin = _cos_sin(periods, q_timestamps, dtype)
    q_cyclic, q_turned = torch.cat([cos, sin], dim=-1), torch.cat([sin, -cos], dim=-1)
    if q_timestamps is k_timestamps:
        return Cycles(q_cyclic, q_turned, q_cyclic)
    return Cycles(q_cyclic, q_turned, torch.cat(_cos_sin(periods, k_timestamps, dtype), dim=-1))


def _cos_sin(periods: Tensor, timestamps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    phase = torch.remainder(timestamps[:, None], periods)
    angle = phase.to(dtype) * (2 * math.pi / periods.to(dtype))
    return angle.cos(), angle.sin()


def cyclic_queries(bias: TimeBias, found: Cycles, q_groups: Tensor | None) -> Tensor:
    """q_cyclic [total_q, H, 2P], whose dot product with k_cyclic is the cyclic sum of `bias`.

    c·cos(a − b) + s·sin(a − b) = (c·cos a + s·sin a)·cos b + (c·sin a − s·cos a)·sin b: a rotation per head goes into
    q, k is shared by the heads. q_groups int64 [total_q] where cosine and sine are those of groups [G, H, P]; they are
    looked up as embeddings, whose gradient is summed in order: that of an index is not on a CPU with several threads.
    """
    assert bias.cosine is not None
    assert bias.sine is not None
    dtype = found.q_cyclic.dtype
    cosine, sine = (torch.cat([x, x], dim=-1).to(dtype) for x in (bias.cosine, bias.sine))
    if q_groups is not None:
        cosine, sine = (embedding(q_groups, x.flatten(1)).unflatten(1, x.shape[1:]) for x in (cosine, sine))
    return torch.addcmul(cosine * found.q_cyclic[:, None], sine, found.q_turned[:, None])


def check_periods(periods: Tensor) -> None:
    """Raise ValueError unless all are above 0. Waits for the device."""
    if bool((periods <= 0).any()):
        raise ValueError(f"time_bias.periods: expected seconds > 0, got {periods.tolist()}")


def check_time_bias(bias: TimeBias, num_heads: int, grouped: bool, device: torch.device) -> None:
    """Raise unless the shapes, dtypes and device of `bias` fit attention of `num_heads` heads on `device`.

    Reads no values; `check_periods` does.
    """
    _check_table(bias.thresholds, bias.table, num_heads, grouped, device, "time_bias")
    cyclic = (bias.periods, bias.cosine, bias.sine)
    if all(part is None for part in cyclic):
        return
    if bias.periods is None or bias.cosine is None or bias.sine is None:
        raise ValueError("time_bias: periods, cosine and sine come together; give all three or none")
    if bias.periods.dtype != torch.int64 or bias.periods.dim() != 1:
        raise TypeError(
            f"time_bias.periods: expected int64 [P] seconds, got {bias.periods.dtype} {list(bias.periods.shape)}"
        )
    expected = (*bias.table.shape[:-1], bias.periods.numel())
    for name, part in (("cosine", bias.cosine), ("sine", bias.sine)):
        if part.shape != expected or not part.is_floating_point():
            raise ValueError(
                f"time_bias.{name}: expected floats {'[groups, heads, periods]' if grouped else '[heads, periods]'} = "
                f"{list(expected)}, got {part.dtype} {list(part.shape)}"
            )
    for name, part in (("periods", bias.periods), ("cosine", bias.cosine), ("sine", bias.sine)):
        _check_device(part, device, f"time_bias.{name}")


def check_position_bias(bias: PositionBias, num_heads: int, grouped: bool, device: torch.device) -> None:
    """Raise unless the shapes, dtypes and device of `bias` fit attention of `num_heads` heads on `device`."""
    _check_table(bias.thresholds, bias.table, num_heads, grouped, device, "position_bias")


def _check_table(
    thresholds: Tensor, table: Tensor, num_heads: int, grouped: bool, device: torch.device, name: str
) -> None:
    if thresholds.dtype != torch.int64 or thresholds.dim() != 1:
        raise TypeError(
            f"{name}.thresholds: expected int64 [buckets − 1], got {thresholds.dtype} {list(thresholds.shape)}"
        )
    expected = [num_heads, thresholds.numel() + 1]
    fits = table.dim() == (3 if grouped else 2) and list(table.shape[-2:]) == expected
    if not fits or not table.is_floating_point():
        shape = "[groups, heads, thresholds + 1]" if grouped else "[heads, thresholds + 1]"
        raise ValueError(
            f"{name}.table: expected floats {shape} = {['any', *expected] if grouped else expected}, "
            f"got {table.dtype} {list(table.shape)}"
        )
    _check_device(thresholds, device, f"{name}.thresholds")
    _check_device(table, device, f"{name}.table")


def _check_device(x: Tensor, device: torch.device, name: str) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}; move it there")
