"""How much memory a piece of code takes at its highest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    extra: int = 0  # bytes above what the process held before


@contextmanager
def measured_memory() -> Iterator[Peak]:
    """Resets the kernel's high-water mark of this process and reads it again afterwards. Skips where Linux is not."""
    if not _CLEAR.exists():
        pytest.skip("needs Linux's /proc")
    _CLEAR.write_text("5")
    before = resident("VmRSS")
    peak = Peak()
    yield peak
    peak.extra = resident("VmHWM") - before


def resident(field: str) -> int:
    """VmRSS, what this process holds in memory, or VmHWM, the most of it so far; bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
