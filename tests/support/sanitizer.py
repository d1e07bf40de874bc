"""What compute-sanitizer finds on a GPU, found in Triton's interpreter: accesses outside of tensors, and races.

The interpreter runs the programs of a launch one after another and each operation as a whole: a kernel that needs an
order passes there and fails on a GPU. With `sanitized()` every launch raises SanitizerError where

    a program reads or writes outside of the tensors that the kernel was given (memcheck);
    one program writes what another one reads or writes, unless both do it by atomics (racecheck);
    a program reads what it has written itself, writes what it has read, or writes what it has written by a tile of
        another shape, and no tl.debug_barrier() lies between: other threads do that, and neither wait for the other;
    one store has several values for one place.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

READ, WRITTEN, ATOMIC = 0, 1, 2
_NAMES = ("read", "written", "changed by atomics")


class SanitizerError(Exception):
    """A launch whose result hangs on what lies beside its tensors, or on which thread comes first."""


@dataclass(frozen=True)
class Access:
    """addresses: in ascending order, each once."""

    kind: int
    program: int
    shape: tuple[int, ...]  # of the tile
    addresses: NDArray[np.int64]


class Launch:
    """The accesses of one launch."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.kernel = kernel
        self.names, self.starts, self.ends = _spans(tensors)
        self.program = 0
        self.of_all: dict[int, list[Access]] = defaultdict(list)  # number of the span → every access
        self.recent: dict[int, list[Access]] = defaultdict(list)  # those of this program since its last barrier

    def begin(self, program: int) -> None:
        self.program = program
        self.barrier()

    def barrier(self) -> None:
        self.recent.clear()

    def access(self, kind: int, pointers: Any, mask: Any, values: Any = None) -> None:
        shape = pointers.data.shape
        chosen = np.broadcast_to(mask.data, shape)
        addresses = pointers.data[chosen].astype(np.int64)
        if not addresses.size:
            return
        if kind == WRITTEN:
            self._check_values(addresses, np.broadcast_to(values.data, shape)[chosen])
        addresses = np.unique(addresses)
        spans = self._find(kind, addresses, max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        for span in np.unique(spans).tolist():
            this = Access(kind, self.program, shape, addresses[spans == span])
            self._check_program(span, this)
            self.of_all[span].append(this)
            self.recent[span].append(this)

    def _find(self, kind: int, addresses: NDArray[np.int64], itemsize: int) -> NDArray[np.int64]:
        """For each address the number of the span around it."""
        spans = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (spans < 0) | (addresses + itemsize > self.ends[spans])
        if outside.any():
            behind = int(spans[outside][0])
            where = f"{addresses[outside][0] - self.ends[behind]} bytes behind {self.names[behind]}"
            raise self._error(f"{_NAMES[kind]} outside of all tensors, {where if behind >= 0 else 'before all'}")
        return spans

    def _check_values(self, addresses: NDArray[np.int64], values: NDArray[Any]) -> None:
        order = np.argsort(addresses, kind="stable")
        bits = np.ascontiguousarray(values[order]).view(f"u{values.itemsize}")
        if ((np.diff(addresses[order]) == 0) & (bits[1:] != bits[:-1])).any():
            raise self._error("one store has several values for one place")

    def _check_program(self, span: int, this: Access) -> None:
        for other in self.recent[span]:
            harmless = this.kind == other.kind and (this.kind != WRITTEN or this.shape == other.shape)
            if not harmless and np.isin(this.addresses, other.addresses, assume_unique=True).any():
                raise self._error(
                    f"{self.names[span]}: {_NAMES[other.kind]} by a tile of {other.shape}, then {_NAMES[this.kind]} by "
                    f"one of {this.shape}, and no tl.debug_barrier() between"
                )

    def end(self) -> None:
        for span, accesses in self.of_all.items():
            if all(access.kind == READ for access in accesses):
                continue
            sizes = [len(access.addresses) for access in accesses]
            addresses = np.concatenate([access.addresses for access in accesses])
            order = np.argsort(addresses, kind="stable")
            first = np.flatnonzero(np.diff(addresses[order], prepend=-1))  # of the accesses of one address
            programs = np.repeat([access.program for access in accesses], sizes)[order]
            kinds = np.repeat([access.kind for access in accesses], sizes)[order]
            several = np.minimum.reduceat(programs, first) != np.maximum.reduceat(programs, first)
            lowest, highest = np.minimum.reduceat(kinds, first), np.maximum.reduceat(kinds, first)
            races = several & (highest != READ) & (lowest != ATOMIC)
            if races.any():
                at = first[np.flatnonzero(races)[0]]
                address = addresses[order][at]
                who = sorted(set(zip(programs[addresses[order] == address], kinds[addresses[order] == address])))
                found = ", ".join(f"{_NAMES[kind]} by program {program}" for program, kind in who[:4])
                raise SanitizerError(f"{self.kernel}: {self.names[span]}, byte {address - self.starts[span]}: {found}")

    def _error(self, what: str) -> SanitizerError:
        return SanitizerError(f"{self.kernel}, program {self.program}: {what}")


def _spans(tensors: dict[str, torch.Tensor]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """(arguments, first bytes, ends) of the memory that the tensors lie in; views of one memory are one span."""
    names: list[str] = []
    spans: list[list[int]] = []
    for name, tensor in sorted(tensors.items(), key=lambda named: named[1].data_ptr()):
        if not tensor.numel():
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        start, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
        if spans and start < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
            names[-1] += f" or {name}"
        else:
            spans.append([start, end])
            names.append(name)
    bounds = np.array(spans, np.int64).reshape(-1, 2)
    return names, bounds[:, 0], bounds[:, 1]


@contextmanager
def sanitized() -> Iterator[None]:
    """Checks every launch in the block that is interpreted; on a GPU none is."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches: list[Launch] = []

    def call(self: Any, *args: Any, **options: Any) -> None:
        named = {**dict(zip(self.arg_names, args)), **options}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        launches.append(Launch(self.fn.__name__, tensors))
        try:
            plain["call"](self, *args, **options)
            launches[-1].end()
        except interpreter.InterpreterError as error:
            raise next((cause for cause in _causes(error) if isinstance(cause, SanitizerError)), error) from error
        finally:
            launches.pop()

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        plain["set_grid_idx"](self, x, y, z)
        launches[-1].begin((x * self.grid_dim[1] + y) * self.grid_dim[2] + z)

    def load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        launches[-1].access(READ, pointers, mask)
        return plain["load"](self, pointers, mask, *others)

    def store(self: Any, pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
        launches[-1].access(WRITTEN, pointers, mask, values)
        return plain["store"](self, pointers, values, mask, *others)

    def atomic_rmw(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, *others: Any) -> Any:
        launches[-1].access(ATOMIC, pointers, mask)
        return plain["atomic_rmw"](self, operation, pointers, values, mask, *others)

    def barrier(self: Any) -> None:
        launches[-1].barrier()
        plain["barrier"](self)

    plain: dict[str, Callable[..., Any]] = {
        "call": executor.__call__,
        "set_grid_idx": builder.set_grid_idx,
        "load": builder.create_masked_load,
        "store": builder.create_masked_store,
        "atomic_rmw": builder.create_atomic_rmw,
        "barrier": builder.create_barrier,
    }
    with (
        patch.object(executor, "__call__", call),
        patch.object(builder, "set_grid_idx", set_grid_idx),
        patch.object(builder, "create_masked_load", load),
        patch.object(builder, "create_masked_store", store),
        patch.object(builder, "create_atomic_rmw", atomic_rmw),
        patch.object(builder, "create_barrier", barrier),
    ):
        yield


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
