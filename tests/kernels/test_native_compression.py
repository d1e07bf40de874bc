"""The C++ compression: every instruction set this machine runs, blocks, threads, shapes, hostile arguments."""

from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.memory import measured_memory
from support.tolerance import poisoned_memory
from torch import Tensor

from alure.kernels import DotLinearCompression, _native, compress, compress_int8
from alure.kernels.compression import native, reference

INSTRUCTION_SETS = _native.instruction_sets()
# users, n, d, k, r, hidden: around the edges of blocks (48 users) and groups (16), of rows of X (64), D, dX (24)
# and the hidden weights (64), and of vectors; 39 columns in pairs are 5 vectors of 16 lanes
SHAPES = {
    "whole vectors": (50, 64, 32, 2, 24, 16),
    "one more": (97, 65, 33, 2, 9, 17),
    "many products": (3, 700, 16, 1, 64, 5),
    "odd pairs": (18, 37, 31, 3, 39, 7),
    "wide": (2, 9, 300, 4, 3, 140),
    "k beyond n": (5, 2, 17, 7, 3, 4),
    "ones": (1, 1, 1, 1, 1, 1),
}
TWO_ROUNDS = (37, 1024, 8, 1, 120, 9)  # of backward: 8 MiB of products are 16 users


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def problem(
    users: int, n: int, d: int, k: int, r: int, hidden: int, seed: int = 0
) -> tuple[Tensor, DotLinearCompression]:
    generator = torch.Generator().manual_seed(seed)
    start = DotLinearCompression.initialize(n, d, k, r, hidden, generator)
    drawn = [torch.randn(w.shape, generator=generator) / max(w.shape[0], 1) ** 0.5 for w in start.tensors()]
    return torch.randn(users, n, d, generator=generator), DotLinearCompression(*drawn)


def to(c: DotLinearCompression, dtype: torch.dtype) -> DotLinearCompression:
    return DotLinearCompression(*(w.to(dtype) for w in c.tensors()))


def direction(x: Tensor, c: DotLinearCompression) -> Tensor:
    shape = (len(x), *c.gate.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def assert_exact(x: Tensor, c: DotLinearCompression) -> None:
    """Forward, and backward from the same hidden layer.

    The error is at most 3 times that of plain eager float32, plus rounding, and 16 float32 units in the last place for
    the odd case where plain is lucky in its few values.
    """
    names = ("embeddings", "hidden", "d_x", *(f"d_{f.name}" for f in fields(c)))
    steep = (
        x.shape[2] >= 8 and c.hidden_weight.shape[0] >= 8
    )  # else a gradient is next to nothing, which rounding hides
    hidden = reference.dot_linear(x.double(), to(c, torch.float64))[1]

    def results(module: ModuleType, dtype: torch.dtype, wide: torch.dtype) -> list[Tensor]:
        given = x.to(dtype), to(c, dtype)
        backward = module.dot_linear_backward(direction(x, c).to(dtype), *given, hidden.to(wide)) if steep else ()
        return [result.double() for result in (*module.dot_linear(*given), *backward)]

    found = results(native, x.dtype, torch.float32)
    exact, plain = (results(reference, dtype, dtype) for dtype in (torch.float64, torch.float32))
    rounding = 2 * torch.finfo(x.dtype).eps + 16 * torch.finfo(torch.float32).eps
    for name, got, want, usual in zip(names, found, exact, plain, strict=False):
        assert got.shape == want.shape, name
        assert got.isfinite().all(), name
        if want.numel():
            error, usual_error, size = (t.abs().max() for t in (got - want, usual - want, want))
            assert error <= 3 * usual_error + rounding * size, f"{name}: {error:.1e}, plain {usual_error:.1e}"


def with_gradients(x: Tensor, c: DotLinearCompression) -> list[Tensor]:
    """Embeddings, the gradient of x, those of the parameters."""
    leaves = [t.detach().requires_grad_() for t in (x, *c.tensors())]
    out = compress(leaves[0], DotLinearCompression(*leaves[1:]), backend="native")
    return [out.detach(), *torch.autograd.grad(out, leaves, direction(x, c))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_and_vectors(shape: str, dtype: torch.dtype, instruction_set: str) -> None:
    x, c = problem(*SHAPES[shape])
    assert_exact(x.to(dtype), to(c, dtype))


@settings(max_examples=30)
@given(
    users=st.integers(0, 60),
    n=st.integers(1, 80),
    d=st.integers(1, 40),
    k=st.integers(1, 5),
    r=st.integers(1, 30),
    hidden=st.integers(1, 40),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    seed=st.integers(0, 99),
)
@example(49, 64, 8, 1, 8, 8, INSTRUCTION_SETS[0], 0)
def test_any_shape(users: int, n: int, d: int, k: int, r: int, hidden: int, instruction_set: str, seed: int) -> None:
    before = native.INSTRUCTION_SET
    native.INSTRUCTION_SET = instruction_set
    try:
        assert_exact(*problem(users, n, d, k, r, hidden, seed))
    finally:
        native.INSTRUCTION_SET = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["whole vectors", "one more"])
def test_neither_the_batch_nor_threads_change_a_bit(shape: str, dtype: torch.dtype, instruction_set: str) -> None:
    x, c = problem(*SHAPES[shape])
    x, c = x.to(dtype), to(c, dtype)
    first, codes = with_gradients(x, c), compress_int8(x, c, backend="native")
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            assert all(torch.equal(a, b) for a, b in zip(with_gradients(x, c), first))
            assert all(torch.equal(a, b) for a, b in zip(compress_int8(x, c, backend="native"), codes))
    finally:
        torch.set_num_threads(before)
    out = first[0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(compress(x[order], c, backend="native"), out[order])
    assert torch.equal(compress(x[7:10], c, backend="native"), out[7:10])
    changed = x.clone()
    changed[3] = float("nan")
    others = torch.arange(len(x)) != 3
    found = compress(changed, c, backend="native")
    assert found[3].isnan().all()
    assert torch.equal(found[others], out[others])


@pytest.mark.parametrize("shape", [SHAPES["whole vectors"], SHAPES["one more"], TWO_ROUNDS])
def test_gradients_of_users_do_not_touch(shape: tuple[int, ...], instruction_set: str) -> None:
    x, c = problem(*shape)
    grad, hidden = direction(x, c), native.dot_linear(x, c)[1]
    d_x = native.dot_linear_backward(grad, x, c, hidden)[0]

    def of_users(users: Tensor, x: Tensor) -> Tensor:
        return native.dot_linear_backward(grad[users], x[users], c, native.dot_linear(x, c)[1][users])[0]

    for users in (torch.randperm(len(x), generator=torch.Generator().manual_seed(1)), torch.arange(7, 25)):
        assert torch.equal(of_users(users, x), d_x[users])
    changed = x.clone()
    changed[3] = float("nan")
    others = torch.arange(len(x)) != 3
    found = of_users(torch.arange(len(x)), changed)
    assert found[3].isnan().all()
    assert torch.equal(found[others], d_x[others])


def test_rounds_of_backward() -> None:
    assert_exact(*problem(*TWO_ROUNDS))


def test_memory_is_a_block_of_users() -> None:
    """4000 users of 64 · 24 products would be 24 MiB; 48 of them are 0.3 MiB."""
    x, c = problem(4000, 64, 8, 1, 24, 8)
    compress(x[:48], c, backend="native")
    with measured_memory() as memory:
        out = compress(x, c, backend="native")
    assert out.isfinite().all()
    assert memory.extra < 8 << 20


def test_memory_of_backward_is_a_round_of_users() -> None:
    """The products of 4000 users and their gradients would be 47 MiB, each; those of 512 are 3 MiB."""
    x, c = problem(4000, 128, 4, 1, 24, 8)
    grad, hidden = direction(x, c), native.dot_linear(x, c)[1]
    native.dot_linear_backward(grad[:48], x[:48], c, hidden[:48])
    with measured_memory() as memory:
        gradients = native.dot_linear_backward(grad, x, c, hidden)
    assert all(g.isfinite().all() for g in gradients)
    assert memory.extra < (16 << 20) + x.nbytes  # the gradient of x is a result


def arguments() -> dict[str, Any]:
    """Good arguments of _native.DotLinear by name, in order: 2 users, n 3, d 4, k 2, r 5, hidden 6."""
    shapes = {
        "linear": (2, 3), "mix": (3, 5), "hidden_weight": (15, 6), "hidden_bias": (6,), "output_weight": (6, 8),
        "output_bias": (8,), "gate": (2, 4),
    }  # fmt: skip
    rows = {"x": np.zeros((2, 3, 4), np.float32), "x_bfloat16": None}
    return rows | {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def call(given: dict[str, Any], users: int = 2) -> np.ndarray:
    out, hidden = np.full((users, 2, 4), np.nan, np.float32), np.full((users, 6), np.nan, np.float32)
    _native.compress_dot_linear(_native.DotLinear(*given.values()), out, hidden, native.INSTRUCTION_SET, 2)
    return out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", None),
        ("x", np.zeros((3, 3, 4), np.float32)),
        ("x", np.zeros((2, 2, 4), np.float32)),
        ("x_bfloat16", np.zeros((2, 3, 4), np.uint16)),
        ("linear", np.zeros((2, 2), np.float32)),
        ("mix", np.zeros((2, 5), np.float32)),
        ("hidden_weight", np.zeros((14, 6), np.float32)),
        ("hidden_bias", np.zeros(5, np.float32)),
        ("output_weight", np.zeros((6, 7), np.float32)),
        ("output_bias", np.zeros(7, np.float32)),
        ("gate", np.zeros((2, 3), np.float32)),
    ],
)
def test_the_module_itself_refuses_what_it_would_read_beyond(name: str, value: Any) -> None:
    assert not call(arguments()).any()
    with pytest.raises(ValueError, match="expected"):
        call(arguments() | {name: value})


@pytest.mark.parametrize("value", [np.zeros((2, 3, 4)), np.zeros((2, 4, 3), np.float32).swapaxes(1, 2)])
def test_the_module_itself_refuses_other_types_and_layouts(value: np.ndarray) -> None:
    with pytest.raises(TypeError):
        call(arguments() | {"x": value})


@pytest.mark.parametrize("wrong", range(10))
def test_the_module_itself_refuses_gradients_of_other_shapes(wrong: int) -> None:
    given = arguments()
    d_weights = [np.zeros_like(given[f.name]) for f in fields(DotLinearCompression)]
    arrays = [np.zeros((2, 2, 4), np.float32), np.zeros((2, 6), np.float32), np.zeros((2, 3, 4), np.float32)]

    def backward(grad: np.ndarray, hidden: np.ndarray, d_x: np.ndarray, *d_weights: np.ndarray) -> None:
        weights = _native.DotLinear(*given.values())
        _native.compress_dot_linear_backward(weights, grad, hidden, d_x, d_weights, native.INSTRUCTION_SET, 2)

    good = [*arrays, *d_weights]
    backward(*good)
    with pytest.raises(ValueError, match="expected shape"):
        backward(*good[:wrong], good[wrong][:-1].copy(), *good[wrong + 1 :])


def test_the_module_itself_refuses_outputs_of_other_shapes() -> None:
    given = _native.DotLinear(*arguments().values())
    codes, scales = np.zeros((2, 2, 4), np.int8), np.zeros((2, 2), np.float32)
    _native.compress_dot_linear_int8(given, codes, scales, native.INSTRUCTION_SET, 1)
    with pytest.raises(ValueError, match="codes: expected shape"):
        _native.compress_dot_linear_int8(given, codes[:1], scales, native.INSTRUCTION_SET, 1)
    with pytest.raises(ValueError, match="scales: expected shape"):
        _native.compress_dot_linear_int8(given, codes, scales[:, :1].copy(), native.INSTRUCTION_SET, 1)
    with pytest.raises(ValueError, match="does not run 'avx1024'"):
        _native.compress_dot_linear_int8(given, codes, scales, "avx1024", 1)
