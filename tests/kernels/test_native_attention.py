"""The C++ attention: every instruction set this machine runs, tiles, threads, leaks, memory, hostile input."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.attention import NOW, Problem, assert_as_exact_as_plain, random_problem, with_gradients
from support.memory import measured_memory
from torch import Tensor

from alure.kernels import TimeBias, _native, jagged_attention, time_thresholds
from alure.kernels.attention import native, reference
from alure.kernels.attention.arguments import Batch, Bias

INSTRUCTION_SETS = _native.instruction_sets()
EMULATED = "emulated amx"  # the kernel of the tiles on any machine; its vectors are the portable ones
OPTIONS = {
    "bidirectional": {},
    "causal": {"causal": True},
    "window": {"window_size": (70, 30)},
    "causal window": {"causal": True, "window_size": (9, 9)},
}
TARGETS = {"num_targets": torch.tensor([2, 0, 40, 1, 20, 1]), "num_contexts": torch.tensor([3, 0, 5, 17, 0, 0])}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return request.param


@pytest.fixture(params=[*INSTRUCTION_SETS, EMULATED])
def bfloat16_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def run(problem: Problem, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[out, gradients] of the native backend."""
    problem = problem.to(dtype)
    grad_out = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = problem.run("native")
    return [out.detach(), *torch.autograd.grad(out, problem.leaves(), grad_out)]


def assert_exact(problem: Problem) -> None:
    grad_out = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1))
    start = problem.to(torch.float32)
    actual, exact, plain = (start.to(dtype) for dtype in (torch.float32, torch.float64, torch.float32))
    assert_as_exact_as_plain(
        with_gradients(actual.run("native"), actual.leaves(), grad_out),
        with_gradients(exact.run("reference"), exact.leaves(), grad_out),
        with_gradients(plain.run("reference"), plain.leaves(), grad_out),
        torch.float32,
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_many_tiles_and_blocks(option: str, instruction_set: str, poisoned: None) -> None:
    """Around the edges of tiles, blocks, parts and vectors."""
    lengths = [1, 47, 0, 49, 130, 193, 400]
    assert_exact(replace(random_problem(lengths, num_heads=2, head_dim=20), **OPTIONS[option]))


@pytest.mark.parametrize("option", [*OPTIONS, "targets"])
def test_cross_attention(option: str, instruction_set: str, poisoned: None) -> None:
    problem = random_problem([0, 3, 200, 1, 50, 7], [9, 0, 130, 700, 300, 2], head_dim=16)
    assert_exact(replace(problem, **(TARGETS if option == "targets" else OPTIONS[option])))


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 300)), min_size=1, max_size=4),
    head_dim=st.integers(1, 40),
    num_heads=st.integers(1, 3),
    window=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 200)),
    causal=st.booleans(),
    seed=st.integers(0, 99),
    span=st.sampled_from([1, 1000, 10**8, 2**40]),
)
@example([(3, 1)], 1, 1, (0, 1), False, 0, 1)  # queries before the first key, a window wider than the keys
@example([(31, 270), (124, 300), (130, 70), (140, 71)], 25, 1, (183, 79), False, 3, 1)  # all in one bucket
def test_any_batch(lengths, head_dim, num_heads, window, causal, seed, span) -> None:
    q_lengths, k_lengths = zip(*lengths)
    problem = random_problem(q_lengths, k_lengths, num_heads=num_heads, head_dim=head_dim, seed=seed, span=span)
    assert_exact(replace(problem, causal=causal, window_size=window))


def assert_exact_in_bfloat16(problem: Problem) -> None:
    """The products are exact and summed in float32; weights and the output are rounded to bfloat16, each by 2^-9."""
    problem = problem.to(torch.bfloat16)
    exact, got = problem.to(torch.float64).run("reference"), problem.run("native")
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() <= 2**-7 * problem.v.abs().max()


@pytest.mark.parametrize("head_dim", [1, 3, 16, 48, 64, 80, 128, 256])
def test_bfloat16(head_dim: int, bfloat16_set: str, poisoned: None) -> None:
    lengths = [0, 1, 15, 16, 17, 33, 130]
    problem = random_problem(lengths, num_heads=2, num_kv_heads=1, head_dim=head_dim, num_groups=2).to(torch.bfloat16)
    assert_exact_in_bfloat16(problem)
    exact, plain = problem.to(torch.float64).run("reference"), problem.dense(torch.bfloat16).double()
    error, usual_error = ((x.double() - exact).abs().max() for x in (problem.run("native"), plain))
    assert error <= 3 * usual_error


@pytest.mark.parametrize("option", [*OPTIONS, "targets"])
def test_bfloat16_masks_and_cross_attention(option: str, bfloat16_set: str, poisoned: None) -> None:
    problem = random_problem([0, 3, 200, 1, 50, 7], [9, 0, 130, 300, 64, 2], head_dim=24)
    assert_exact_in_bfloat16(replace(problem, **(TARGETS if option == "targets" else OPTIONS[option])))


def test_a_query_that_sees_one_key_gets_its_value(bfloat16_set: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(131, 2, 33, generator=g).to(torch.bfloat16) for _ in range(3))
    out = jagged_attention(q, k, v, torch.tensor([0, 40, 131]), window_size=(0, 0), backend="native")
    assert torch.equal(out, v)


def test_a_part_of_many_tiles_of_bfloat16(bfloat16_set: str) -> None:
    """More queries than a part has, and more keys than a block."""
    assert_exact_in_bfloat16(random_problem([700, 40], num_heads=1, head_dim=40))


def assert_gradients_exact_in_bfloat16(problem: Problem) -> None:
    """Weights and gradients of logits are rounded to bfloat16, as a computation of whole matrices in bfloat16 does."""
    start = problem.to(torch.bfloat16)
    grad_out = torch.randn(start.q.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    actual, exact, plain = (start.to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.bfloat16))
    assert_as_exact_as_plain(
        with_gradients(actual.run("native"), actual.leaves(), grad_out),
        with_gradients(exact.run("reference"), exact.leaves(), grad_out),
        with_gradients(plain.dense(torch.bfloat16), plain.leaves(), grad_out),
        torch.bfloat16,
        factor=2.0,
    )


@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 180)), min_size=1, max_size=3),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 70)),
    window=st.none() | st.tuples(st.integers(0, 120), st.integers(0, 120)),
    few=st.tuples(st.integers(0, 40), st.integers(0, 20)),
    seed=st.integers(0, 99),
    span=st.sampled_from([1, 1000, 10**8, 2**40]),
    chosen=st.sampled_from([*INSTRUCTION_SETS, EMULATED]),
)
def test_any_batch_in_bfloat16(lengths, shape, window, few, seed, span, chosen) -> None:
    q_lengths, k_lengths = zip(*lengths)
    share, kv_heads, head_dim = shape
    problem = random_problem(
        q_lengths,
        k_lengths,
        num_heads=share * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        seed=seed,
        span=span,
    )
    room = torch.tensor(k_lengths)
    contexts = room.clamp(max=few[0])
    masks = {"num_contexts": contexts, "num_targets": (room - contexts).clamp(max=few[1]), "window_size": window}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "INSTRUCTION_SET", chosen)
        assert_gradients_exact_in_bfloat16(replace(problem, **masks))


@pytest.mark.parametrize("head_dim", [1, 16, 33, 64, 128])
def test_gradients_in_bfloat16(head_dim: int, bfloat16_set: str, poisoned: None) -> None:
    """Around the edges of tiles, slices and blocks, with query heads that share keys and groups of tables."""
    lengths = [0, 1, 31, 33, 130]
    assert_gradients_exact_in_bfloat16(
        random_problem(lengths, num_heads=2, num_kv_heads=1, head_dim=head_dim, num_groups=2)
    )


@pytest.mark.parametrize("option", [*OPTIONS, "targets"])
def test_gradients_in_bfloat16_with_masks_and_cross_attention(option: str, bfloat16_set: str, poisoned: None) -> None:
    problem = random_problem([0, 3, 200, 1, 50, 7], [9, 0, 130, 300, 64, 2], head_dim=24)
    assert_gradients_exact_in_bfloat16(replace(problem, **(TARGETS if option == "targets" else OPTIONS[option])))


def test_gradients_of_many_parts_in_bfloat16(bfloat16_set: str, poisoned: None) -> None:
    """More queries than a part has, whose gradients of keys are added up in turns."""
    assert_gradients_exact_in_bfloat16(replace(random_problem([560], num_heads=1, head_dim=8), window_size=(150, 90)))


@pytest.mark.parametrize("option", [*OPTIONS, "targets"])
def test_bfloat16_around_the_edges_of_long_blocks(option: str, bfloat16_set: str, poisoned: None) -> None:
    """Streams of tiles: blocks of 1,024 keys, several key heads in one, ends within a tile and within its half."""
    lengths = [1025, 300, 9, 2061] if bfloat16_set != EMULATED else [1041, 9, 300]
    masks = OPTIONS.get(option, {"num_targets": torch.tensor([20, 0, 2, 40])[: len(lengths)]})
    problem = random_problem(lengths, num_heads=2, num_kv_heads=1, head_dim=20, seed=5)
    assert_exact_in_bfloat16(replace(problem, **masks))
    many = random_problem([40, 70, 90], num_heads=6, num_kv_heads=3, head_dim=64, num_groups=2)
    assert_exact_in_bfloat16(many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-1e4, -150.0, -60.0, -33.0, 33.0, 60.0, 88.0, 150.0, 1e4])
def test_a_bias_that_all_share_changes_nothing(shift: float, dtype: torch.dtype, bfloat16_set: str) -> None:
    """However far it takes weights from what a float can hold, in one head or in all."""
    problem = random_problem([150, 0, 33, 1], head_dim=16, num_heads=2).to(dtype)
    rounded = 2 * abs(shift) * torch.finfo(torch.float32).eps  # of a logit
    for options in OPTIONS.values():
        masked = replace(problem, **options)
        exact = masked.to(torch.float64).run("reference").detach()
        for heads in ([1], [0, 1]):
            table = problem.time_table.detach().clone()
            table[..., heads, :] += shift
            error = (forward_only(replace(masked, time_table=table), dtype).double() - exact).abs().max()
            assert error <= 4 * (rounded + (1e-6 if dtype == torch.float32 else 2**-7))


def forward_only(problem: Problem, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return problem.to(dtype).run("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_no_bound_holds(dtype: torch.dtype, bfloat16_set: str) -> None:
    """Logits of ±1e4 in some rows, beside rows of small ones, masked and not; a scale of 0, and one below."""
    problem = random_problem([150, 90, 33], head_dim=16).to(dtype)
    q = problem.q.detach().clone()
    q[::3] *= 2000
    for options in OPTIONS.values():
        large = replace(problem, q=q, **options)
        exact = large.to(torch.float64).run("reference").detach()
        error = (forward_only(large, dtype).double() - exact).abs().max()
        # a logit of 1e4 in float32 is wrong by 1e-3
        assert error <= (2e-2 if dtype == torch.float32 else 2**-7 * 4)
    values, offsets = problem.v.detach(), problem.q_offsets
    for scale in (0.0, -0.3, 1e-35):
        arguments = {"q_offsets": offsets, "softmax_scale": scale}
        want = jagged_attention(*(3 * [values.double()]), **arguments, backend="reference")
        got = jagged_attention(*(3 * [values]), **arguments, backend="native")
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_bits(dtype: torch.dtype, bfloat16_set: str) -> None:
    problem = random_problem([70, 5, 33], num_heads=3, head_dim=20).to(dtype)
    packed = torch.stack([problem.q, problem.k, problem.v], 1).detach()  # [T, 3, H, D]
    heads_first = problem.k.detach().transpose(0, 1).contiguous().transpose(0, 1)
    backwards = problem.v.detach().flip(-1).contiguous().flip(-1)
    spread = torch.stack([problem.v.detach()] * 2, -1)[..., 0]  # channels that are not neighbours
    grad_out = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = of_values(problem, grad_out)
    for q, k, v, g in (
        (packed[:, 0], packed[:, 1], packed[:, 2], grad_out.transpose(0, 1).contiguous().transpose(0, 1)),
        (problem.q, heads_first, backwards, torch.stack([grad_out] * 2, 1)[:, 0]),
        (problem.q, problem.k, spread, torch.stack([grad_out] * 2, -1)[..., 0]),
    ):
        got = of_values(replace(problem, q=q, k=k, v=v), g)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bfloat16_is_the_same_in_any_batch_and_with_any_threads(bfloat16_set: str) -> None:
    problem = random_problem([5, 200, 1, 17, 530, 0, 64], head_dim=16, num_heads=2).to(torch.bfloat16)
    assert_same_with_any_threads(problem, torch.bfloat16)
    assert_same_in_any_batch(problem, ([6, 5, 4, 3, 2, 1, 0], [4], [1, 3, 1]))


def bias_of_bursts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    sessions = torch.randint(0, 20, (400,), generator=generator)
    return [
        torch.full((400,), NOW),  # all at once
        torch.cat([torch.zeros(200, dtype=torch.int64), torch.full((200,), 2**61)]),  # ages apart
        torch.tensor([-(2**61)] * 3 + [0] * 394 + [2**61] * 3),
        (NOW + sessions * 10**6 + torch.randint(0, 30, (400,), generator=generator)).sort().values,
        NOW + torch.arange(400),  # in 2026, one second apart: float32 could not tell
        NOW - (2 ** torch.linspace(30.9, 0, 400, dtype=torch.float64)).long(),  # every difference there is, to 2^31
        *(NOW + steps_of(torch.full((400,), same), generator) for same in (4, 7)),  # a strip has few rows
        NOW + steps_of(torch.randint(1, 20, (400,), generator=generator), generator),
    ]


def steps_of(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """400 times of which so many in turn are equal, with steps of 1 to 2^22 between them."""
    steps = (2 ** (22 * torch.rand(len(lengths), generator=generator))).long()
    return steps.cumsum(0).repeat_interleave(lengths)[:400]


THRESHOLDS = {
    "half octaves": time_thresholds(),
    "eighths of octaves": time_thresholds(8, 2**31 - 1),
    "none": torch.zeros(0, dtype=torch.int64),
    "one": torch.tensor([0]),
    "64": time_thresholds(1, 2**30)[-64:],
    "300 in line": torch.arange(-150, 150) * 86_400,
    "beyond int32": torch.tensor([-(2**62), -(2**33), -(2**31), -5, 2**24 + 1, 2**31 - 1, 2**31, 2**62]),
}


@pytest.mark.parametrize("case", range(9))
@pytest.mark.parametrize("thresholds", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_buckets_are_exact_for_any_times(case: int, thresholds: Tensor, instruction_set: str) -> None:
    """v picks single keys and the table is the only logit, so a wrong bucket anywhere changes an output visibly."""
    times = bias_of_bursts()[case]
    table = torch.linspace(-6, 6, thresholds.numel() + 1).roll(1)[None]  # neighbours differ
    n = times.numel()
    values = torch.eye(n)[:, None]
    nothing = torch.zeros(n, 1, n)
    offsets = torch.tensor([0, n])
    batch = Batch(offsets, offsets, times, times, None, None)
    out, lse = native.forward(nothing, nothing, values, batch, Bias(thresholds, table[None], *[None] * 4), 1.0)
    elapsed = times[:, None] - times[None]
    expected = table[0][(elapsed[..., None] >= thresholds).sum(-1)]
    logits = out[:, 0].log() + lse[0][:, None]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(9))
def test_buckets_of_both_passes(case: int, dtype: torch.dtype, bfloat16_set: str) -> None:
    """The table is the only logit: a key in a wrong bucket changes its query's output, its term a gradient."""
    if bfloat16_set == EMULATED and dtype == torch.float32:
        pytest.skip("has no float32 of its own")
    times, thresholds, causal = bias_of_bursts()[case], THRESHOLDS["half octaves"], case % 2 == 1
    generator = torch.Generator().manual_seed(5)
    v, grad_out = torch.randn(2, 400, 1, 64, generator=generator).to(dtype)
    table = torch.linspace(-3, 3, thresholds.numel() + 1).roll(1)[None].requires_grad_()
    nothing, offsets, bias = torch.zeros(400, 1, 64, dtype=dtype), torch.tensor([0, 400]), TimeBias(thresholds, table)
    out = jagged_attention(
        nothing, nothing, v, offsets, q_timestamps=times, time_bias=bias, causal=causal, backend="native"
    )
    (found,) = torch.autograd.grad(out, table, grad_out)

    buckets = torch.bucketize(times[:, None] - times, thresholds, right=True)
    logits = table.detach().double()[0][buckets]
    if causal:
        logits = logits.masked_fill(torch.ones(400, 400).triu(1).bool(), -torch.inf)
    logits.requires_grad_()
    expected = logits.softmax(-1) @ v[:, 0].double()
    (terms,) = torch.autograd.grad(expected, logits, grad_out[:, 0].double())
    by_bucket = torch.zeros(2, table.numel(), dtype=torch.float64)
    by_bucket.index_add_(1, buckets.flatten(), torch.stack([terms, terms.abs()]).flatten(1))
    error = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[:, 0].double(), expected, rtol=error, atol=error)
    assert bool(((found[0] - by_bucket[0]).abs() <= error * by_bucket[1]).all())


def assert_same_with_any_threads(problem: Problem, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 3):
            torch.set_num_threads(num_threads)
            results.append(run(problem, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("option", OPTIONS)
def test_threads_do_not_change_a_bit(option: str, instruction_set: str) -> None:
    problem = random_problem([700, 3, 0, 300, 20, 1], head_dim=12)
    assert_same_with_any_threads(replace(problem, **OPTIONS[option]), torch.float32)


def test_threads_do_not_change_the_gradients_of_the_cycles_of_groups() -> None:
    """They are looked up a query; the gradient of an index is added in any order."""
    problem = random_problem([5] * 4000, num_heads=4, head_dim=4, num_groups=2)
    assert problem.periods is not None
    assert_same_with_any_threads(problem, torch.float32)


def pick(problem: Problem, sequences: list[int]) -> Problem:
    """The batch of these sequences, in this order."""
    spans = list(zip(problem.q_offsets.tolist(), problem.q_offsets[1:].tolist()))
    rows = torch.cat([torch.arange(*spans[s]) for s in sequences])
    offsets = torch.tensor([0, *(spans[s][1] - spans[s][0] for s in sequences)]).cumsum(0)
    per_row = {name: getattr(problem, name)[rows] for name in ("q", "k", "v", "q_timestamps", "k_timestamps")}
    return replace(problem, **per_row, q_offsets=offsets, k_offsets=offsets)


def of_values(problem: Problem, grad_out: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv], whose rows are those of the sequences."""
    values = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = replace(problem, q=values[0], k=values[1], v=values[2]).run("native")
    return [out.detach(), *torch.autograd.grad(out, values, grad_out)]


def assert_same_in_any_batch(problem: Problem, orders: Sequence[list[int]]) -> None:
    grad_out = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(2)).to(problem.q.dtype)
    whole, rows = of_values(problem, grad_out), problem.q_offsets.tolist()
    for order in orders:
        parts = [slice(rows[s], rows[s + 1]) for s in order]
        expected = [torch.cat([x[part] for part in parts]) for x in whole]
        got = of_values(pick(problem, order), torch.cat([grad_out[part] for part in parts]))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_user_is_the_same_in_any_batch(instruction_set: str) -> None:
    problem = random_problem([5, 300, 1, 17, 520, 0, 64], head_dim=16).to(torch.float32)
    assert_same_in_any_batch(problem, ([6, 5, 4, 3, 2, 1, 0], [4], [1, 4, 1], [2, 3]))


def assert_nothing_leaks(poison: float, dtype: torch.dtype) -> None:
    """The poisoned user, the longest, comes first, and leaves its traces in the thread's memory."""
    problem = random_problem([40, 300, 7, 130], head_dim=12).to(dtype)
    changed = replace(problem, **{name: getattr(problem, name).detach().clone() for name in ("q", "k", "v")})
    begin, end = problem.q_offsets[1:3].tolist()
    for x in (changed.q, changed.k, changed.v):
        x[begin:end] = poison
    before, after = run(problem, dtype), run(changed, dtype)
    for a, b in zip(before[:4], after[:4], strict=True):  # out, dq, dk, dv
        assert torch.equal(a[:begin], b[:begin])
        assert torch.equal(a[end:], b[end:])
        assert not torch.equal(a[begin:end], b[begin:end])
        assert b[begin:end].isfinite().all() == (poison == 3.0)


@pytest.mark.parametrize("poison", [3.0, float("nan"), float("inf")])
def test_nothing_leaks_in_bfloat16(poison: float, bfloat16_set: str) -> None:
    assert_nothing_leaks(poison, torch.bfloat16)


@pytest.mark.parametrize("poison", [3.0, float("nan"), float("inf")])
def test_nothing_leaks_from_one_user_to_another(poison: float, instruction_set: str) -> None:
    assert_nothing_leaks(poison, torch.float32)


def test_large_and_hidden_logits(instruction_set: str) -> None:
    """Logits in the hundreds, and a table of −inf that hides whole rows: zeros, not NaN."""
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(90, 2, 16, generator=generator) for _ in range(3))
    offsets = torch.tensor([0, 60, 90])
    want = jagged_attention(q.double(), k.double(), v.double(), offsets, softmax_scale=30.0, backend="reference")
    got = jagged_attention(q, k, v, offsets, softmax_scale=30.0, backend="native")
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    table = torch.full((2, 2), -torch.inf)
    batch = Batch(offsets, offsets, torch.arange(90), torch.arange(90), None, None)
    bias = Bias(torch.tensor([0]), table[None], *[None] * 4)
    for module in (native, reference):
        out, lse = module.forward(q, k, v, batch, bias, 1.0)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
        gradients = module.backward(torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse, batch, bias, 1.0)
        assert all(not x.any() for x in gradients if x is not None)


def test_one_user_of_20_000_events_beside_many_of_5() -> None:
    """Time and memory follow the long user's keys, not users × the longest: no matrix of pairs, no padding."""
    lengths = [5] * 5000 + [20_000] + [5] * 5000
    problem = random_problem(lengths, num_heads=1, head_dim=8, dtype=torch.float32)
    with measured_memory() as peak, torch.no_grad():
        out = problem.run("native")
    assert out.isfinite().all()
    tensors = 6 * out.numel() * out.element_size()  # out, and the copies of arguments in other layouts
    assert peak.extra < tensors + 16 * 2**20, f"{peak.extra / 2**20:.0f} MiB"
    alone = random_problem([5], num_heads=1, head_dim=8, dtype=torch.float32)
    assert torch.equal(pick(problem, [0]).run("native"), out[:5].detach())
    assert alone.run("native").isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_passes_of_a_user_of_50_000_events(dtype: torch.dtype) -> None:
    """A matrix of pairs would take 5 to 10 GB."""
    problem = random_problem([50_000], num_heads=1, head_dim=64, dtype=dtype)
    with measured_memory() as peak:
        gradients = with_gradients(problem.run("native"), problem.leaves(), torch.ones_like(problem.q))
    assert all(x.isfinite().all() for x in gradients)
    assert peak.extra < 256 * 2**20, f"{peak.extra / 2**20:.0f} MiB"


def test_no_rows_at_all(poisoned: None) -> None:
    for lengths, key_lengths in (([], []), ([0, 0], [0, 0]), ([2], [0]), ([0], [3])):
        problem = random_problem(lengths, key_lengths, num_heads=2, head_dim=4)
        assert all(x.shape[0] == 0 or not x.any() for x in run(problem))


def arrays(n: int = 6) -> dict[str, object]:
    """Good arguments of _native.Attention by name, in order."""
    rows = np.zeros((n, 2, 4), np.float32)
    return {
        "q": rows, "k": rows, "v": rows,
        "q_offsets": np.array([0, 2, n]), "k_offsets": np.array([0, 2, n]),
        "q_timestamps": np.arange(n), "k_timestamps": np.arange(n),
        "rules": np.array([[3, 2, 1, 1], [2**30, 0, 0, 2]]), "groups": np.array([1, 0]),
        "time_thresholds": np.array([-5, 0, 7]), "time_table": np.zeros((2, 2, 4), np.float32),
        "position_thresholds": np.array([1]), "position_table": np.zeros((2, 2, 2), np.float32),
        "q_cyclic": np.zeros((n, 2, 3), np.float32), "k_cyclic": np.zeros((n, 3), np.float32),
        "scale": 1.0,
    }  # fmt: skip


def call(arguments: dict[str, object]) -> np.ndarray:
    out, lse = np.full((6, 2, 4), np.nan, np.float32), np.full((2, 6), np.nan, np.float32)
    _native.attention_forward(_native.Attention(*arguments.values()), out, lse, native.INSTRUCTION_SET, 2)
    return out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q_offsets", np.array([0, 2, 7])),
        ("q_offsets", np.array([0, -2, 6])),
        ("q_offsets", np.array([0, 2**62, 6])),
        ("q_offsets", np.array([1, 2, 6])),
        ("q_offsets", np.array([0, 6])),
        ("q_offsets", np.array([], np.int64)),
        ("k_offsets", np.array([0, 9, 6])),
        ("k_offsets", np.array([0, 2, 5])),
        ("q", np.zeros((6, 1, 4), np.float32)),
        ("q", np.zeros((6, 4, 2), np.float32).swapaxes(1, 2)),
        ("k", np.zeros((6, 2, 4), np.uint16)),
        ("v", np.zeros((5, 2, 4), np.float32)),
        ("q_timestamps", np.arange(5)),
        ("k_timestamps", None),
        ("rules", np.zeros((1, 4), np.int64)),
        ("rules", np.zeros((2, 3), np.int64)),
        ("groups", np.array([0, 2])),
        ("groups", np.array([-1, 0])),
        ("groups", np.array([0])),
        ("time_table", np.zeros((2, 2, 3), np.float32)),
        ("position_table", np.zeros((2, 1, 2), np.float32)),
        ("position_table", np.zeros((1, 2, 2), np.float32)),
        ("q_cyclic", None),
        ("k_cyclic", np.zeros((6, 2), np.float32)),
    ],
)
def test_the_module_itself_refuses_what_it_would_read_beyond(name: str, value: object) -> None:
    assert not call(arrays()).any()
    with pytest.raises(ValueError, match="expected"):
        call(arrays() | {name: value})


def gradients_of(arguments: dict[str, object]) -> dict[str, object]:
    """Good arguments of _native.attention_backward by name, in order, for those of `arrays`."""
    values, lse = ("grad_out", "out", "dq", "dk", "dv", "dk_sums", "dv_sums"), ("grad_lse", "lse")
    found = {name: np.zeros((6, 2, 4), np.float32) for name in values}
    found |= {name: np.zeros((2, 6), np.float32) for name in lse}
    shaped = ("time_table", "position_table", "q_cyclic", "k_cyclic")
    found |= {f"d_{name}": np.zeros_like(arguments[name]) for name in shaped}
    order = ("grad_out", "out", "grad_lse", "lse", "dq", "dk", "dv", "dk_sums", "dv_sums")
    return {name: found[name] for name in (*order, *(f"d_{name}" for name in shaped))}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grad_out", np.zeros((5, 2, 4), np.float32)),
        ("grad_out", np.zeros((6, 2, 4), np.uint16)),
        ("out", np.zeros((6, 4, 2), np.float32).swapaxes(1, 2)),
        ("out", np.zeros((6, 2, 3), np.float32)),
        ("grad_lse", np.zeros((2, 5), np.float32)),
        ("lse", np.zeros((1, 6), np.float32)),
        ("dq", np.zeros((6, 2, 3), np.float32)),
        ("dk", np.zeros((6, 2, 4), np.uint16)),
        ("dv", np.zeros((5, 2, 4), np.float32)),
        ("dk_sums", np.zeros((6, 1, 4), np.float32)),
        ("d_time_table", None),
        ("d_position_table", np.zeros((2, 2, 3), np.float32)),
        ("d_q_cyclic", None),
        ("d_k_cyclic", np.zeros((6, 2), np.float32)),
    ],
)
def test_the_module_itself_refuses_gradients_that_it_would_write_beyond(name: str, value: object) -> None:
    attention, good = _native.Attention(*arrays().values()), gradients_of(arrays())
    _native.attention_backward(attention, *good.values(), native.INSTRUCTION_SET, 1)
    with pytest.raises(ValueError, match="expected"):
        _native.attention_backward(attention, *(good | {name: value}).values(), native.INSTRUCTION_SET, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", np.zeros((6, 2, 4))),
        ("k_offsets", np.array([0, 2, 6], np.int32)),
        ("time_thresholds", np.zeros(3, np.float32)),
    ],
)
def test_the_module_itself_refuses_other_types_and_layouts(name: str, value: object) -> None:
    with pytest.raises(TypeError):
        call(arrays() | {name: value})


def test_unsorted_times_read_no_memory_that_is_not_theirs(instruction_set: str) -> None:
    """jagged_attention refuses them; the module gives some buckets, in bounds (the sanitizer build watches)."""
    generator = np.random.default_rng(0)
    extremes = np.array([-(2**62) + 1, 2**62 - 1, 0, 5])
    for _ in range(50):
        times = generator.choice(extremes, 6)
        assert not call(arrays() | {"q_timestamps": times, "k_timestamps": generator.permutation(times)}).any()


def test_instruction_sets_are_named() -> None:
    assert _native.instruction_set() == INSTRUCTION_SETS[0]
    assert INSTRUCTION_SETS[-1] == "portable"
    with pytest.raises(ValueError, match="does not run 'avx1024'"):
        _native.attention_forward(
            _native.Attention(*arrays().values()), np.zeros((6, 2, 4), np.float32), np.zeros((2, 6), np.float32),
            "avx1024", 1,
        )  # fmt: skip
