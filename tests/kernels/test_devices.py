"""On a machine with several GPUs a kernel must be launched on the one where its tensors are."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.attention import random_problem
from support.encoding import random_problem as random_encoding
from support.tolerance import require
from torch import Tensor

from alure.kernels import DotLinearCompression, compress, compress_int8, grouped_topk, residual_quantize
from alure.kernels.backend import on_device

MODULES = [
    *(f"alure.kernels.{name}.kernel" for name in ("attention", "compression", "encoding", "neighbors", "quantization")),
    "alure.kernels.encoding.kernel_backward",
]
KERNELS = {
    "forward_kernel", "backward_q_kernel", "backward_kv_kernel", "encode_events_kernel", "time_features_kernel",
    "weight_gradient_kernel", "sum_runs_kernel", "join_runs_kernel", "dot_linear_kernel", "activate_kernel",
    "normalize_kernel", "grouped_topk_kernel", "quantize_level_kernel",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that run, each of which must do so inside `on_device`."""
    require("triton", "cpu")
    from triton.runtime.interpreter import InterpretedFunction

    opened: list[torch.device] = []
    found: set[str] = set()

    @contextmanager
    def record(x: Tensor) -> Iterator[None]:
        opened.append(x.device)
        try:
            yield
        finally:
            opened.pop()

    run = InterpretedFunction.__getitem__

    def watched(kernel: Any, grid: Any) -> Any:
        assert opened, f"{kernel.fn.__name__} is launched on whichever GPU is the current one"
        found.add(kernel.fn.__name__)
        return run(kernel, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", watched)
    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(name), "on_device", record)
    return found


def test_every_kernel_is_launched_on_the_device_of_its_tensors(launched: set[str]) -> None:
    problem = random_problem([5, 9], head_dim=8).to(torch.float32)
    torch.autograd.grad(problem.run("triton").sum(), problem.leaves())
    encoding = random_encoding([3, 2]).to(torch.float32)
    torch.autograd.grad(encoding.run("triton").sum(), list(encoding.leaves().values()))
    x = torch.randn(2, 6, 16)
    compression = DotLinearCompression.initialize(6, 16, 2, 4, hidden=32)
    compress(x, compression, backend="triton")
    compress_int8(x, compression, backend="triton")
    grouped_topk(x[0], x[1], torch.tensor([0, 6]), torch.zeros(6, 1, dtype=torch.int64), 2, backend="triton")
    residual_quantize(x[0], torch.randn(2, 4, 16), backend="triton")
    assert launched == KERNELS


def test_the_current_gpu_is_that_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 3)

    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device))
    on_device(OnGpu())  # type: ignore[arg-type]
    with on_device(torch.zeros(1)):
        pass
    assert chosen == [torch.device("cuda", 3)]
