"""The backends of `jagged_attention`, and which of them takes which values."""

import importlib
from types import ModuleType

import torch

from alure.kernels.backend import resolve_backend

BACKENDS = ("triton", "native", "reference")
_LARGEST_TRITON_HEAD = 256


def choose_backend(backend: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    """The backend for these values. What a backend cannot do is left out of "auto" and named where asked for."""
    supported = ["reference"]
    if dtype != torch.float64 and head_dim <= _LARGEST_TRITON_HEAD:
        supported.append("triton")
    elif backend == "triton":
        raise ValueError(
            f"backend: 'triton' takes float16, bfloat16 and float32 with head_dim <= {_LARGEST_TRITON_HEAD}, "
            f"got {dtype} with head_dim {head_dim}; use backend='reference'"
        )
    if dtype in (torch.float32, torch.bfloat16):
        supported.append("native")
    elif backend == "native":
        raise ValueError(f"backend: 'native' takes float32 and bfloat16, got {dtype}; use backend='reference'")
    return resolve_backend(backend, device, supported)


def backend_module(backend: str) -> ModuleType:
    name = {"triton": "kernel", "native": "native"}.get(backend, "reference")
    return importlib.import_module(f"alure.kernels.attention.{name}")
