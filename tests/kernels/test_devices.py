"""What a launch means to a real GPU, which the interpreter does not care about: where it runs, and what it compiles."""

import importlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.attention import DAY, random_problem
from support.encoding import random_problem as random_encoding
from support.tolerance import require
from torch import Tensor

from alure.kernels import DotLinearCompression, compress, compress_int8, grouped_topk, residual_quantize
from alure.kernels.backend import on_device

MODULES = [
    *(f"alure.kernels.{name}.kernel" for name in ("attention", "compression", "encoding", "neighbors", "quantization")),
    "alure.kernels.encoding.kernel_backward",
    "alure.kernels.neighbors.kernel_nominate",
]
KERNELS = {
    "cell_values_kernel", "forward_kernel", "crossings_kernel", "backward_q_kernel", "backward_kv_kernel",
    "encode_events_kernel",
    "time_features_kernel", "weight_gradient_kernel", "sum_runs_kernel", "join_runs_kernel", "dot_linear_kernel",
    "activate_kernel", "normalize_kernel", "grouped_topk_kernel", "nominate_kernel", "quantize_level_kernel",
}  # fmt: skip
Launches = dict[str, set[tuple[str, ...]]]  # of every kernel, the kinds of its arguments


def kinds_of(kernel: Any, given: dict[str, Any]) -> tuple[str, ...]:
    """For each other one Triton compiles the kernel anew; not of constants, which are the model's."""
    any_integer = kernel.kwargs["do_not_specialize"] or []
    any_multiple = kernel.kwargs["do_not_specialize_on_alignment"] or []

    def kind(name: str, x: Any) -> str:
        if isinstance(x, Tensor):
            return f"{x.dtype} aligned {x.data_ptr() % 16 == 0}"
        if not isinstance(x, int) or name in any_integer:
            return type(x).__name__
        return "1" if x == 1 else "16 n" if x % 16 == 0 and name not in any_multiple else "int"

    return tuple(f"{name}: {kind(name, x)}" for name, x in given.items())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The kernels that run, each of which must do so inside `on_device`."""
    require("triton", "cpu")
    from triton.runtime.interpreter import InterpretedFunction

    opened: list[torch.device] = []
    found: Launches = defaultdict(set)

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

        def launch(*args: Any, **kwargs: Any) -> None:
            found[kernel.fn.__name__].add(kinds_of(kernel, dict(zip(kernel.arg_names, args))))
            run(kernel, grid)(*args, **kwargs)

        return launch

    monkeypatch.setattr(InterpretedFunction, "__getitem__", watched)
    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(name), "on_device", record)
    return found


def run_all(size: int) -> None:
    """Every kernel, of a batch of so many rows."""
    problem = random_problem([size], head_dim=8, span=100 * DAY).to(torch.float32)
    torch.autograd.grad(problem.run("triton").sum(), problem.leaves())
    encoding = random_encoding([size], d_e=8, width=16, d_dense=16).to(torch.float32)
    torch.autograd.grad(encoding.run("triton").sum(), list(encoding.leaves().values()))
    x, books = torch.randn(size, 6, 16), torch.randn(3, 4, 16)
    compression = DotLinearCompression.initialize(6, 16, 2, 4, hidden=32)
    compress(x, compression, backend="triton")
    compress_int8(x, compression, backend="triton")
    rows = x[:, 0].contiguous()
    offsets, probes = torch.tensor([0, size - 1, size, size]), torch.tensor([[0, 2, 1]]).expand(size, 3)
    grouped_topk(rows, rows, offsets, probes, 1, backend="triton")
    residual_quantize(rows, books, backend="triton")


def test_every_kernel_is_launched_on_the_device_of_its_tensors(launched: Launches) -> None:
    run_all(5)
    assert launched.keys() == KERNELS


def test_a_batch_of_another_size_compiles_nothing(launched: Launches) -> None:
    """Seconds each, in the middle of a job. Nor does another level of a quantizer."""
    before: dict[str, int] = {}
    for size in (21, 32, 2):
        run_all(size)
        compiled = {name: len(kinds) for name, kinds in launched.items()}
        assert not before or compiled == before
        before = compiled
    assert compiled["quantize_level_kernel"] == 1


def test_the_current_gpu_is_that_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 3)

    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: chosen.append(device))
    on_device(OnGpu())  # type: ignore[arg-type]
    with on_device(torch.zeros(1)):
        pass
    assert chosen == [torch.device("cuda", 3)]


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_products_of_float32_are_as_exact_as_torch_is_told(
    precision: str, launched: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the setting that torch has had since 2.9, beside which `allow_tf32` raises; that sets this one, too."""
    attention = importlib.import_module("alure.kernels.attention.kernel")
    given: list[str] = []
    constants = attention._constants
    monkeypatch.setattr(
        attention, "_constants", lambda *args: (found := constants(*args), given.append(found["PRECISION"]))[0]
    )
    problem, before = random_problem([5], head_dim=8).to(torch.float32), torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        problem.run("triton")
        problem.to(torch.bfloat16).run("triton")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert given == ["tf32" if precision == "tf32" else "ieee", "tf32"]
