"""How exact a kernel must be, on what it runs, and outputs poisoned with NaN before it writes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from alure.kernels.backend import has_triton, triton_interprets

# (backend, device) of operators in reference and Triton; on the CPU Triton runs in its interpreter
TARGETS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]


def require(backend: str, device: str) -> None:
    """Skip the test where the backend cannot run on the device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "triton" and not (has_triton() and (device == "cuda" or triton_interprets())):
        pytest.skip("needs triton, and on the CPU its interpreter")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is NaN (or the largest integer), so a value that nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def assert_as_exact_as_plain(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    dtype: torch.dtype,
    factor: float = 3.0,
) -> None:
    """The error against float64 is at most `factor` times that of plain eager code in `dtype`, plus rounding."""
    assert actual.keys() == exact.keys() == plain.keys()
    for name, got in actual.items():
        want, usual = exact[name].double(), plain[name].cpu().double()
        got = got.cpu().double()
        assert got.shape == want.shape, name
        assert got.isfinite().all(), name
        if want.numel() == 0:
            continue
        error, usual_error = (got - want).abs().max(), (usual - want).abs().max()
        rounding = 2 * torch.finfo(dtype).eps * want.abs().max()
        assert error <= factor * usual_error + rounding, f"{name}: error {error:.2e}, plain {usual_error:.2e}"
