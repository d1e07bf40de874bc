"""What a device can do at most, measured: the limits that shares are taken of."""

import time
from collections.abc import Callable

import torch

LAPS = 5
SHORT_S = 0.2  # of a measurement that a job makes on the way


def wall_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What gives the seconds of a call, its work on `device` included."""

    def lap(run: Callable[[], object]) -> float:
        _finish(device)
        started = time.perf_counter()
        run()
        _finish(device)
        return time.perf_counter() - started

    return lap


def matrix_rate(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    lap: Callable[[Callable[[], object]], float] | None = None,
    seconds: float = 10.0,
) -> float:
    """FLOP/s of the fastest product of two square matrices of `dtype`: two to five of a size, of which 256 is the first
    and each is twice the one before, in about `seconds` at most.
    """
    lap, size, largest = lap or wall_clock(device), 256, 8192 if device.type == "cuda" else 2048
    best = spent = 0.0
    while True:
        a, laps = torch.randn(size, size, device=device).to(dtype), list[float]()
        while len(laps) < 2 or (len(laps) < LAPS and sum(laps) < seconds / LAPS):
            laps.append(lap(lambda a=a: a @ a))  # type: ignore[misc]
        best, spent = max(best, 2 * size**3 / min(laps)), spent + sum(laps)
        if size == largest or spent + 2 * 8 * min(laps) > seconds:  # the two that twice the size needs
            return best
        size *= 2


def matrix_limit(
    device: torch.device,
    dtype: torch.dtype,
    lap: Callable[[Callable[[], object]], float] | None = None,
    seconds: float = 10.0,
) -> float:
    """`matrix_rate`, and at least float32's: a CPU may multiply bfloat16 far slower, and is not limited by that."""
    dtypes = {dtype, torch.float32}
    return max(matrix_rate(device, each, lap, seconds / len(dtypes)) for each in dtypes)


def copy_rate(device: torch.device, lap: Callable[[Callable[[], object]], float] | None = None) -> float:
    """Bytes/s read and written by a copy of a tensor beyond the caches, best of five."""
    lap = lap or wall_clock(device)
    source = torch.ones((1 << 30) if device.type == "cuda" else (128 << 20), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(lap(lambda: target.copy_(source)) for _ in range(LAPS))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
