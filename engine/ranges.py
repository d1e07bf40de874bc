"""Named ranges of a stage's work, `alure.<stage>/<op>`, for whoever profiles it.

    with stage("refresh", marker_of(device)):
        with op("attention"):  # alure.refresh/attention

NVTX (Nsight Systems) where a CUDA device works, the profiler's own under `alure profile`; elsewhere `op` does nothing,
in 0.7 µs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

Marker = Callable[[str], AbstractContextManager[Any]]

_stage: ContextVar[tuple[str, Marker] | None] = ContextVar("alure_stage", default=None)  # of this thread
_NOTHING = nullcontext()


def marker_of(device: torch.device) -> Marker | None:
    """NVTX for a CUDA device; None elsewhere."""
    return torch.cuda.nvtx.range if device.type == "cuda" else None


@contextmanager
def stage(name: str, marker: Marker | None) -> Iterator[None]:
    """A range alure.<name>; what this thread opens by `op` inside belongs to it. None: nothing is marked."""
    if marker is None:
        yield
        return
    before = _stage.set((f"alure.{name}", marker))
    try:
        with marker(f"alure.{name}"):
            yield
    finally:
        _stage.reset(before)


def op(name: str) -> AbstractContextManager[Any]:
    """A range of the open stage."""
    opened = _stage.get()
    if opened is None:
        return _NOTHING
    prefix, marker = opened
    return marker(f"{prefix}/{name}")
