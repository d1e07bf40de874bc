"""The memory of one batch serves the next."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, as malloc.h of glibc numbers them
KEPT = 1 << 30  # bytes: freed at the heap's end, or in one block
SYSTEMS_OWN = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}  # the largest that glibc sets by itself


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with this process; afterwards it goes back to the system. Without glibc, nothing.

    By itself glibc gives back what is large, and the system zeroes every page that it hands out anew: 5 to 15 % of a
    refresh on a CPU. At its most the process holds up to a tenth more.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    if not libc.mallopt(MMAP_THRESHOLD, KEPT):  # glibc before 2.35
        libc.mallopt(MMAP_THRESHOLD, SYSTEMS_OWN[MMAP_THRESHOLD])
    libc.mallopt(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        for threshold, size in SYSTEMS_OWN.items():
            libc.mallopt(threshold, size)
        libc.malloc_trim(0)
