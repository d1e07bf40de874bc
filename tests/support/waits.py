"""Where the host would wait for a device: values that are read on the host, and small copies that come from there.

Meta tensors stand for those on the device: they have no values, so whatever reads one fails, and Triton's kernels are
replaced by a count of their launches. So all of the host's code for a GPU runs here, but nothing of the GPU's.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from alure.kernels.operators import RegisteredOperator

DEVICE = torch.device("meta")
READS = {
    getattr(Tensor, name): f"Tensor.{name}"
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
}
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "equal", "is_nonzero", "item", "allclose",
    "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
SILENT = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "scalar_tensor",
    "_unsafe_view",
}  # fmt: skip  # launch nothing


class DeviceWaits(AssertionError):
    pass


class Watch(AbstractContextManager["Watch"]):
    """What the code inside waits for, and which operators launch kernels.

    refuse: raise DeviceWaits at the first wait; else `waits` counts them, of CPU tensors that stand for the device's.
    """

    def __init__(self, refuse: bool = True) -> None:
        self.refuse = refuse
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._functions, self._operators = _Functions(self), _Operators(self)

    def __enter__(self) -> "Watch":
        self._stack = ExitStack()
        self._stack.enter_context(self._functions)
        self._stack.enter_context(self._operators)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def wait(self, what: str) -> None:
        self.waits[what] += 1
        if self.refuse:
            raise DeviceWaits(f"{what} waits for the device")

    def inside(self, implementation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._functions, self._operators:
            return implementation(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Calls that do not show in operators: they read memory themselves, or begin with a list of the host's."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self.watch.wait(READS[func])
        elif func is Tensor.new_tensor or (func is torch.tensor and kwargs.get("device") is not None):
            self.watch.wait(func.__name__)
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "alure":
            return self.watch.inside(_implementations()[func], *args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        reason = _waits(name, args, kwargs)
        if reason:
            self.watch.wait(reason)
        found = func(*args, **kwargs)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in SILENT:
            self.watch.launches[name] += 1
        return found


def _waits(name: str, args: Any, kwargs: Any) -> str | None:
    if name in WAITING:
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        return f"{name} by a mask"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if name == "segment_reduce" and not kwargs.get("unsafe"):
        return "segment_reduce that checks"
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    places = {x.device for x in tensors if x.dim() or x.device == DEVICE}  # a number is an argument of a launch
    if name == "_to_copy" and kwargs.get("device") is not None:
        places.add(torch.device(kwargs["device"]))
    return f"{name} between host and device" if len(places) > 1 else None


def _implementations() -> dict[Any, Callable[..., Any]]:
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("alure.")]
    values = [value for module in modules for value in list(vars(module).values())]
    return {value.overload: value.implementation for value in values if isinstance(value, RegisteredOperator)}


class _Kernel:
    """In place of a Triton kernel: `kernel[grid](…)` counts a launch, and writes nothing."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and size > 0 for size in grid)

        def launch(*args: Any, **kwargs: Any) -> None:
            assert all(x is None or isinstance(x, Tensor | int | float) for x in args)
            self.launches[self.name] += 1

        return launch


KERNELS = {
    "attention.kernel": (
        "cell_values_kernel",
        "forward_kernel",
        "crossings_kernel",
        "backward_q_kernel",
        "backward_kv_kernel",
    ),
    "encoding.kernel": ("encode_events_kernel",),
    "compression.kernel": ("dot_linear_kernel", "activate_kernel", "normalize_kernel"),
}


def launch_only(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From here on "auto" is Triton for all tensors, and its kernels count their launches in what is returned."""
    launches: Counter[str] = Counter()
    for module, names in KERNELS.items():
        found = importlib.import_module(f"alure.kernels.{module}")
        for name in names:
            monkeypatch.setattr(found, name, _Kernel(name, launches))
    resolve = importlib.import_module("alure.kernels.backend").resolve_backend

    def triton(backend: str, device: torch.device, supported: Any) -> str:
        if backend == "auto":
            return "triton" if "triton" in supported else "reference"
        return resolve(backend, device, supported)

    for name, module in list(sys.modules.items()):
        if name.startswith("alure.kernels.") and hasattr(module, "resolve_backend"):
            monkeypatch.setattr(module, "resolve_backend", triton)
    return launches
