"""rms_norm and swiglu against PyTorch in float64: values, gradients, extremes, isolation, shapes and hostile input."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerance import assert_as_exact_as_plain, poisoned_memory
from torch import Tensor
from torch.nn import functional as F

from alure.kernels import _native, rms_norm, swiglu
from alure.kernels.rowwise import native

INSTRUCTION_SETS = _native.instruction_sets()
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(run: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradient of every input, all in `dtype`, for one fixed random direction."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    out = run(*leaves)
    gradients = torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out))
    return {"out": out.detach()} | {f"d_{i}": gradient for i, gradient in enumerate(gradients)}


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As it is written, each step in x's dtype."""
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (300, 64), (7, 192), (65, 33), (9, 512), (2000, 3), (3, 20_000)])
def test_as_exact_as_plain(shape: tuple[int, int], dtype: torch.dtype, instruction_set: str) -> None:
    rows, columns = shape
    x, weight, gate_up = (x.to(dtype) for x in (normal(*shape), normal(columns, seed=1), normal(rows, 2 * columns)))
    for ours, plain, inputs in ((rms_norm, plain_norm, (x, weight)), (swiglu, plain_swiglu, (gate_up,))):
        found = with_gradients(ours, *inputs, dtype=dtype)
        assert all(x.dtype == dtype for x in found.values())
        exact, usual = (with_gradients(plain, *inputs, dtype=d) for d in (torch.float64, dtype))
        assert_as_exact_as_plain(found, exact, usual, dtype)


@dtypes
@settings(max_examples=30)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 70),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_any_shape(dtype: torch.dtype, rows: int, columns: int, scale: float, seed: int) -> None:
    """Within 8 roundings of the largest term: gradients of a norm are sums that cancel, of one channel to next to 0."""
    x, weight = (scale * normal(rows, columns, seed=seed)).to(dtype), normal(columns, seed=1).to(dtype)
    gate_up = (scale * normal(rows, 2 * columns, seed=seed)).to(dtype)
    least = (x.double().square().mean(1) + 1e-6).sqrt().min().item()
    terms = {"d_0": weight.abs().max().item() * 4 / least, "d_1": rows * 4 * columns**0.5}  # the direction is within 4
    for ours, plain, inputs in ((rms_norm, plain_norm, (x, weight)), (swiglu, plain_swiglu, (gate_up,))):
        wanted = with_gradients(plain, *inputs, dtype=torch.float64)
        for name, got in with_gradients(ours, *inputs, dtype=dtype).items():
            largest = max(wanted[name].abs().max().item(), terms.get(name, 0.0) if ours is rms_norm else 0.0)
            error = (got.double() - wanted[name]).abs().max().item()
            assert error <= 16 * torch.finfo(dtype).eps * largest, f"{name}: {error:.2e}, largest {largest:.2e}"


@dtypes
def test_auto_is_native_on_a_cpu_and_the_reference_is_pytorch(dtype: torch.dtype) -> None:
    x, weight, gate_up = normal(5, 24).to(dtype), normal(24).to(dtype), normal(5, 48).to(dtype)
    assert torch.equal(rms_norm(x, weight), rms_norm(x, weight, backend="native"))
    assert torch.equal(swiglu(gate_up), swiglu(gate_up, backend="native"))
    assert torch.equal(rms_norm(x, weight, 0.1, backend="reference"), F.rms_norm(x, (24,), weight, 0.1))
    assert torch.equal(swiglu(gate_up, backend="reference"), F.silu(gate_up[:, :24]) * gate_up[:, 24:])
    torch.testing.assert_close(rms_norm(x, weight, 0.1), F.rms_norm(x, (24,), weight, 0.1))
    wide = x.double()
    assert torch.equal(rms_norm(wide, weight.double()), F.rms_norm(wide, (24,), weight.double(), 1e-6))


@dtypes
def test_extremes_are_those_of_pytorch(dtype: torch.dtype, instruction_set: str) -> None:
    """Where sigmoid is 0 or 1, at infinity and NaN; rows of zeros, and rows whose squares overflow."""
    values = [0, -0.0, 1e-38, 20, -20, 87, -87, 89, -89, 100, -100, 1e30, -1e30, 3e38, -3e38, math.inf, -math.inf]
    gate = torch.tensor([*values, math.nan], dtype=dtype)
    for width in (1, len(gate)):  # in what is left over, and in whole vectors
        pairs = torch.stack([gate.view(-1, width), torch.ones_like(gate).view(-1, width)], 1).flatten(1)
        found, wanted = swiglu(pairs).flatten(), F.silu(gate.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-30, equal_nan=True)
    x = torch.zeros(5, 9, dtype=dtype)
    x[1], x[2, 3], x[3, 4], x[4] = 1e30, math.nan, math.inf, 1e-30
    weight = torch.full((9,), 2.0, dtype=dtype)
    expected = F.rms_norm(x, (9,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight), expected, rtol=1e-2, atol=0, equal_nan=True)


@dtypes
def test_a_row_is_the_same_wherever_it_is(dtype: torch.dtype, instruction_set: str) -> None:
    """Bit for bit, whatever the other rows hold, and its gradient too."""
    for columns in (3, 33, 64):
        x, weight, gate_up = normal(70, columns).to(dtype), normal(columns).to(dtype), normal(70, 2 * columns).to(dtype)
        whole = [with_gradients(rms_norm, x, weight, dtype=dtype), with_gradients(swiglu, gate_up, dtype=dtype)]
        direction = normal(70, columns, seed=9).to(dtype)
        for begin, end in ((0, 1), (1, 12), (69, 70), (5, 38)):
            part = x[begin:end].clone().requires_grad_(), gate_up[begin:end].clone().requires_grad_()
            for of_all, leaf, out in zip(whole, part, (rms_norm(part[0], weight), swiglu(part[1]))):
                assert torch.equal(out, of_all["out"][begin:end])
                (gradient,) = torch.autograd.grad(out, [leaf], direction[begin:end])
                assert torch.equal(gradient, of_all["d_0"][begin:end])
        x[40], gate_up[40] = math.nan, math.nan
        others = torch.arange(70) != 40
        assert torch.equal(rms_norm(x, weight)[others], whole[0]["out"][others])
        assert torch.equal(swiglu(gate_up)[others], whole[1]["out"][others])


@dtypes
def test_threads_do_not_change_a_bit(dtype: torch.dtype, instruction_set: str) -> None:
    x, weight, gate_up = normal(5000, 40), normal(40), normal(3000, 80)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 3):
            torch.set_num_threads(num_threads)
            norm, gate = with_gradients(rms_norm, x, weight, dtype=dtype), with_gradients(swiglu, gate_up, dtype=dtype)
            results.append([*norm.values(), *gate.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@dtypes
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (0, 4), (2, 0, 3)])
def test_leading_axes_and_strides(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, 12).to(dtype), normal(6).to(dtype)
    for found, wanted in (
        (rms_norm(x[..., ::2], weight), rms_norm(x[..., ::2].contiguous(), weight)),
        (rms_norm(x[..., :6], weight), F.rms_norm(x[..., :6], (6,), weight, 1e-6)),
        (swiglu(x), F.silu(x[..., :6]) * x[..., 6:]),
        (swiglu(x.mT.contiguous().mT if x.dim() > 1 else x), swiglu(x)),
    ):
        assert found.shape == wanted.shape
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted)


def test_without_channels() -> None:
    assert rms_norm(torch.zeros(3, 0), torch.zeros(0)).shape == (3, 0)
    assert swiglu(torch.zeros(3, 0)).shape == (3, 0)


@dtypes
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = normal(3, 6).to(dtype).requires_grad_(), normal(6).to(dtype).requires_grad_()
    grad = normal(3, 6).to(dtype)
    torch.library.opcheck(torch.ops.alure.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.alure.swiglu.default, (x,))
    torch.library.opcheck(torch.ops.alure.rms_norm_backward.default, (grad, x.detach(), weight.detach(), 1e-6))
    torch.library.opcheck(torch.ops.alure.swiglu_backward.default, (grad[:, :3], x.detach()))


def test_compiles_without_graph_breaks() -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu(rms_norm(x, weight))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = normal(5, 8), normal(8)
    found, wanted = (with_gradients(f, *inputs, dtype=torch.float32) for f in (compiled, run))
    assert all(torch.equal(found[name], x) for name, x in wanted.items())


def test_under_autocast_they_compute_in_the_dtypes_they_are_given() -> None:
    x, weight = normal(5, 8).float(), normal(8).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rms_norm(x, weight), rms_norm(x, weight))
        assert rms_norm(x, weight).dtype == swiglu(x).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    x, weight = normal(3, 6).float(), normal(6).float()
    for wrong in (weight[:5], weight[None], torch.ones(())):
        with pytest.raises(ValueError, match=r"weight: expected one value a channel of x \[3, 6\], got shape"):
            rms_norm(x, wrong)
    with pytest.raises(ValueError, match="weight: expected one value a channel"):
        rms_norm(torch.tensor(1.0), torch.ones(()))
    for odd in (x[:, :5], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="gate_up: expected an even number of channels"):
            swiglu(odd)
    with pytest.raises(ValueError, match=r"'native' takes float32 or bfloat16, .* got torch\.float64"):
        swiglu(x.double(), backend="native")
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 and torch\.float32; use 'reference'"):
        rms_norm(x.bfloat16(), weight, backend="native")
    with pytest.raises(ValueError, match="this operator offers native, reference; got 'triton'"):
        swiglu(x, backend="triton")
    assert rms_norm(x.half(), weight.half()).dtype == torch.float16, "auto takes what can"


def test_the_module_checks_shapes_and_types() -> None:
    x, weight, half = np.ones((3, 6), np.float32), np.ones(6, np.float32), np.ones((3, 3), np.float32)
    name = INSTRUCTION_SETS[0]
    with pytest.raises(ValueError, match=r"weight: expected \[columns\]"):
        _native.rms_norm(x, weight[:5], 1e-6, x.copy(), name, 1)
    for out in (x[:2].copy(), x.astype(np.uint16)):
        with pytest.raises(ValueError, match="out: expected the shape and type of x"):
            _native.rms_norm(x, weight, 1e-6, out, name, 1)
    with pytest.raises(TypeError, match="x: expected float32, or bfloat16 as uint16"):
        _native.rms_norm(x.astype(np.int32), weight, 1e-6, x.copy(), name, 1)
    with pytest.raises(ValueError, match="d_weight: expected"):
        _native.rms_norm_backward(x, x, weight, 1e-6, x.copy(), np.ones(5, np.float32), name, 1)
    with pytest.raises(ValueError, match="gate_up: expected an even number of columns"):
        _native.swiglu(x[:, :5].copy(), half, name, 1)
    with pytest.raises(ValueError, match="out: expected half the columns of gate_up"):
        _native.swiglu(x, x.copy(), name, 1)
    with pytest.raises(ValueError, match="grad: expected half the columns"):
        _native.swiglu_backward(x, x, x.copy(), name, 1)
    with pytest.raises(ValueError, match="does not run 'sse9'"):
        _native.swiglu(x, half, "sse9", 1)
