"""The C++ compression: every instruction set this machine runs, blocks, threads, shapes, hostile arguments."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.memory import measured_memory
from support.tolerance import assert_as_exact_as_plain, poisoned_memory
from torch import Tensor

from alure.kernels import DotLinearCompression, _native, compress, compress_int8
from alure.kernels.compression import native, reference

INSTRUCTION_SETS = _native.instruction_sets()
# users, n, d, k, r, hidden: around the edges of blocks (48 users), of rows of X (64), of D (8) and of vectors
SHAPES = {
    "whole vectors": (50, 64, 32, 2, 24, 16),
    "one more": (97, 65, 33, 2, 9, 17),
    "many products": (3, 700, 16, 1, 64, 5),
    "wide": (2, 9, 300, 4, 3, 140),
    "k beyond n": (5, 2, 17, 7, 3, 4),
    "ones": (1, 1, 1, 1, 1, 1),
}


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


def assert_exact(x: Tensor, c: DotLinearCompression) -> None:
    names = ("embeddings", "hidden")
    wide = reference.dot_linear(x.double(), to(c, torch.float64))
    plain = reference.dot_linear(x.float(), to(c, torch.float32))
    found = native.dot_linear(x, c)
    assert_as_exact_as_plain(
        dict(zip(names, found)), dict(zip(names, wide)), dict(zip(names, plain)), x.dtype
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_and_vectors(shape: str, dtype: torch.dtype, instruction_set: str) -> None:
    x, c = problem(*SHAPES[shape])
    assert_exact(x.to(dtype), to(c, dtype))


@settings(max_examples=30, deadline=None)
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
    out, codes = compress(x, c, backend="native"), compress_int8(x, c, backend="native")
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            assert torch.equal(compress(x, c, backend="native"), out)
            assert all(torch.equal(a, b) for a, b in zip(compress_int8(x, c, backend="native"), codes))
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(compress(x[order], c, backend="native"), out[order])
    assert torch.equal(compress(x[7:10], c, backend="native"), out[7:10])
    changed = x.clone()
    changed[3] = float("nan")
    others = torch.arange(len(x)) != 3
    found = compress(changed, c, backend="native")
    assert found[3].isnan().all()
    assert torch.equal(found[others], out[others])


def test_memory_is_a_block_of_users() -> None:
    """4000 users of 64 · 24 products would be 24 MiB; 48 of them are 0.3 MiB."""
    x, c = problem(4000, 64, 8, 1, 24, 8)
    compress(x[:48], c, backend="native")
    with measured_memory() as memory:
        out = compress(x, c, backend="native")
    assert out.isfinite().all()
    assert memory.extra < 8 << 20


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
