"""Which implementation of an operator runs: one rule for all of them."""

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HOPPER = 9
BACKENDS = ("auto", "triton", "native", "reference", "cupy")


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


def has_native() -> bool:
    return importlib.util.find_spec("alure.kernels._native") is not None


def native_instruction_set() -> str | None:
    """What the native kernels use on this machine, such as "avx2"; None where they are not built."""
    if not has_native():
        return None
    from alure.kernels import _native

    return str(_native.instruction_set())


def triton_interprets() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which works on CPU tensors."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The block's Triton kernels run on the GPU of `x`: they are launched on the current one, wherever tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def capability(device: torch.device) -> int:
    """The major number of a GPU's compute capability, by which tiles are chosen; Hopper's in the interpreter."""
    return HOPPER if triton_interprets() else torch.cuda.get_device_capability(device)[0]


def resolve_backend(backend: str, device: torch.device, supported: Sequence[str]) -> str:
    """The backend that runs on `device`, one of `supported`.

    "auto" takes Triton on CUDA, the native kernel on a CPU, and the reference where the operator has neither.
    Raises ValueError where `backend` is unknown, is not offered by the operator, or cannot run on `device`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    on_cuda = device.type == "cuda"
    if backend == "auto":
        fast = "triton" if on_cuda else "native"
        present = has_triton() if on_cuda else has_native()
        return fast if fast in supported and present else "reference"
    if backend not in supported:
        raise ValueError(f"backend: this operator offers {', '.join(supported)}; got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend: 'triton' needs the package triton; install it (pip install triton)")
        if not on_cuda and not triton_interprets():
            raise ValueError(
                f"backend: 'triton' needs CUDA tensors, got tensors on {device}; "
                "move them to the GPU, or set TRITON_INTERPRET=1 before the first import to run it in the interpreter"
            )
    if backend == "native":
        if on_cuda:
            raise ValueError(f"backend: 'native' needs CPU tensors, got tensors on {device}; use backend='triton'")
        if not has_native():
            raise ValueError("backend: 'native' needs the compiled module alure.kernels._native; reinstall alure")
    if backend == "cupy":
        if not has_cupy():
            raise ValueError("backend: 'cupy' needs the package CuPy; install it (pip install alure[gpu])")
        if not torch.cuda.is_available():
            raise ValueError("backend: 'cupy' needs a CUDA device, and there is none; use backend='native'")
    return backend
