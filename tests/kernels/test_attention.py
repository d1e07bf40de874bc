"""jagged_attention against the dense masked softmax in float64: values and every gradient, on every backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.attention import TARGETS, Problem, assert_as_exact_as_plain, random_problem, require, with_gradients

LENGTHS = [0, 5, 37, 0, 3]
KEY_LENGTHS = [3, 5, 70, 0, 0]
OPTIONS = {
    "bidirectional": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 3)},
    "causal window": {"causal": True, "window_size": (9, 2)},
    "targets": {"num_targets": torch.tensor([0, 2, 30, 0, 0])},
    "contexts": {"causal": True, "num_contexts": torch.tensor([3, 2, 9, 0, 0])},
    "all": {
        "window_size": (6, 2),
        "num_targets": torch.tensor([0, 3, 4, 0, 0]),
        "num_contexts": torch.tensor([0, 1, 3, 0, 0]),
    },
}
SELF_LENGTHS = [3, 5, 40, 0, 0]


def compare(problem: Problem, backend: str, device: str, dtype: torch.dtype) -> None:
    """Backend against float64, both starting from the same values in `dtype`."""
    given = problem.to(dtype)
    grad_out = torch.randn(given.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact, plain, actual = given.to(torch.float64), given.to(dtype), given.to(dtype, device)
    assert_as_exact_as_plain(
        with_gradients(actual.run(backend), actual.leaves(), grad_out),
        with_gradients(exact.dense(torch.float64), exact.leaves(), grad_out),
        with_gradients(plain.dense(dtype), plain.leaves(), grad_out),
        dtype,
    )


def with_options(option: str, cross: bool, **shape: Any) -> Problem:
    lengths = (LENGTHS, KEY_LENGTHS) if cross else (SELF_LENGTHS,)
    return replace(random_problem(*lengths, **shape), **OPTIONS[option])


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("option", OPTIONS)
def test_reference_is_the_definition(option: str, cross: bool) -> None:
    problem = with_options(option, cross, num_heads=6, num_kv_heads=3, num_groups=2, head_dim=7)
    grad_out = torch.randn(problem.q.shape, dtype=torch.float64)
    actual = with_gradients(problem.run("reference"), problem.leaves(), grad_out)
    exact = with_gradients(problem.dense(torch.float64), problem.leaves(), grad_out)
    for got, want in zip(actual, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("option", OPTIONS)
def test_float32(option: str, cross: bool, backend: str, device: str) -> None:
    require(backend, device)
    if (backend, device) == ("triton", "cpu") and not cross:
        pytest.skip("interpreted: the cross case takes the same path")
    compare(with_options(option, cross, head_dim=12), backend, device, torch.float32)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_groups_and_grouped_query_heads(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([5, 9, 0, 17], num_heads=4, num_kv_heads=2, num_groups=3, head_dim=8)
    compare(replace(problem, causal=True), backend, device, torch.float32)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision(dtype: torch.dtype, backend: str, device: str) -> None:
    require(backend, device)
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native takes bfloat16 and float32")
    compare(replace(random_problem([40, 0, 1], num_heads=1), causal=True), backend, device, dtype)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("head_dim", [1, 20, 96, 256])
def test_head_dims(head_dim: int, backend: str, device: str) -> None:
    require(backend, device)
    compare(random_problem([17, 2], num_heads=1, head_dim=head_dim), backend, device, torch.float32)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_long_sequences_in_many_tiles(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([150], num_heads=1)
    compare(replace(problem, **OPTIONS["causal window"]), backend, device, torch.float32)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shift", [-1e4, -60.0, 60.0, 150.0, 1e4])
def test_a_bias_that_all_share_changes_nothing(shift: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """However far it takes weights, 2^logit, from what a float can hold, in one head of two."""
    require(backend, device)
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native takes bfloat16 and float32")
    problem = with_options("all", cross=False, head_dim=8, num_groups=2).to(dtype)
    exact = problem.to(torch.float64).run("reference").detach()
    table = problem.time_table.detach().clone()
    table[:, 1] += shift
    shifted = replace(problem, time_table=table).to(dtype, device)
    error = (shifted.run(backend).detach().double().cpu() - exact).abs().max()
    rounded = 2 * abs(shift) * torch.finfo(torch.float32).eps  # of a logit
    assert error <= 4 * (rounded + torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_of_any_size_side_by_side(dtype: torch.dtype, backend: str, device: str) -> None:
    """In one tile queries whose logits are of a thousand, of one, and the same for all."""
    require(backend, device)
    size = torch.ones(75, 1, 1)
    size[::3], size[1::3] = 1000.0, 0.0
    problem = random_problem([70, 5], num_heads=2, head_dim=8)
    problem = replace(problem, q=problem.q.detach() * size).to(dtype)
    exact = problem.to(torch.float64).run("reference").detach()
    error = (problem.to(dtype, device).run(backend).detach().double().cpu() - exact).abs().max()
    assert error <= (2e-2 if dtype == torch.float32 else 2**-5)  # a logit of 1e3 in float32 is wrong by 1e-4


def test_reference_in_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alure.kernels.attention.reference._PAIRS", 300)
    for option in OPTIONS:
        compare(with_options(option, cross=True), "reference", "cpu", torch.float32)


@st.composite
def problems(draw: st.DrawFn, longest_batch: int = 5, least_head_dim: int = 1) -> Problem:
    batch = draw(st.integers(0, longest_batch))
    lengths = st.lists(st.integers(0, 24), min_size=batch, max_size=batch)
    q_lengths = draw(lengths)
    k_lengths = q_lengths if draw(st.booleans()) else draw(lengths)
    problem = random_problem(
        q_lengths,
        k_lengths,
        num_heads=2,
        num_kv_heads=draw(st.integers(1, 2)),
        num_groups=draw(st.sampled_from([None, 1, 3])),
        head_dim=draw(st.integers(least_head_dim, 12)),
        seed=draw(st.integers(0, 1000)),
        span=draw(st.sampled_from([1, 100, 86_400, 10**8, 2**33])),  # 2**33 s leave int32
    )
    limit = st.one_of(st.none(), st.tuples(st.integers(0, 12), st.integers(0, 12)))
    few = st.lists(st.integers(0, 4), min_size=batch, max_size=batch)
    room = torch.tensor(k_lengths, dtype=torch.int64)
    contexts, targets = (torch.tensor(draw(few), dtype=torch.int64) for _ in range(2))
    contexts = torch.minimum(contexts, room)
    masked = draw(st.booleans())
    index_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    changes = {
        "causal": draw(st.booleans()),
        "window_size": draw(limit),
        "num_contexts": contexts if masked else None,
        "num_targets": torch.minimum(targets, room - contexts) if masked else None,
        "q_offsets": problem.q_offsets.to(index_dtype),
        "k_offsets": problem.k_offsets.to(index_dtype),
    }
    return replace(problem, **changes)


@settings(max_examples=60)
@given(problem=problems())
def test_any_batch_reference(problem: Problem) -> None:
    compare(problem, "reference", "cpu", torch.float32)


@settings(max_examples=60)
@given(problem=problems())
def test_any_batch_native(problem: Problem) -> None:
    require("native", "cpu")
    compare(problem, "native", "cpu", torch.float32)


@settings(max_examples=5, database=None, phases=[Phase.generate])  # interpreted: no time to shrink
@given(problem=problems(longest_batch=2))
def test_any_batch_triton(problem: Problem) -> None:
    require("triton", "cpu")
    compare(problem, "triton", "cpu", torch.float32)


@pytest.mark.gpu
@settings(max_examples=60)
@given(problem=problems(least_head_dim=12))  # each head_dim would be compiled, three kernels of 2 s
def test_any_batch_gpu(problem: Problem) -> None:
    require("triton", "cuda")
    compare(problem, "triton", "cuda", torch.float32)
