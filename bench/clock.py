"""Time and memory of one call on a device."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # beyond any GPU's L2 cache


class Clock:
    """Laps in seconds: on a CPU of the wall clock, or, on one thread, of CPU time, which waiting behind other programs
    does not lengthen; on CUDA between two events with a cold L2 cache, host gaps between launches included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.kind = "CUDA events" if device.type == "cuda" else "CPU time" if alone else "wall clock"
        self.seconds = time.process_time if alone else time.perf_counter
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def lap(self, run: Callable[[], Any]) -> float:
        if self._flush is None:
            started = self.seconds()
            run()
            return self.seconds() - started
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self._flush.zero_()  # the device is busy with it while the host launches the work
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak(self, run: Callable[[], Any]) -> tuple[int | None, float]:
        """(bytes, seconds) of one call: the most memory held beyond what was held before, its result included.

        CUDA: of PyTorch's allocator. Linux: growth of the resident set, after freed pages went back to the system.
        None elsewhere.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            seconds = self.lap(run)
            return torch.cuda.max_memory_allocated(self.device) - before, seconds
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None, self.lap(run)
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # resets VmHWM, the peak of the resident set, to what is resident now
        before = _status("VmRSS")
        seconds = self.lap(run)
        return max(0, _status("VmHWM") - before), seconds


def _status(key: str) -> int:
    """A memory line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
