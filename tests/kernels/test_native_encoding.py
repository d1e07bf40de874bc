"""The C++ event encoding: every instruction set this machine runs, blocks, threads, exact times, hostile input."""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.encoding import DAY, NOW, Problem, random_problem, with_gradients
from support.memory import measured_memory
from support.tolerance import assert_as_exact_as_plain, poisoned_memory
from torch import Tensor

from alure.kernels import EventEncoder, _native, encode_events
from alure.kernels.encoding import native

INSTRUCTION_SETS = _native.instruction_sets()
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FAR = 1 << 61
# around the edges of blocks (96 rows), units (192 and 384) and vectors; an absent column switches its term off
SHAPES: dict[str, dict[str, Any]] = {
    "everything": {"attributes": 5, "d_e": 32, "width": 64, "d_dense": 32},
    "odd": {"attributes": 3, "d_e": 13, "width": 37, "d_dense": 11},
    "content only": {"periods": (), "d_dense": None, "optional": False},
    "no attributes": {"attributes": 0, "d_dense": None},
    "deep": {"attributes": 3, "d_e": 100, "width": 20, "d_dense": 600},
}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def assert_exact(problem: Problem, dtype: torch.dtype) -> None:
    """In bfloat16 plain is the definition, which rounds every step; the reference keeps its sums in float32 too."""
    exact, plain, actual = problem.to(torch.float64), problem.to(dtype), problem.to(dtype)
    assert_as_exact_as_plain(
        with_gradients(actual, actual.run("native")),
        with_gradients(exact, exact.run("reference")),
        with_gradients(plain, plain.run("reference") if dtype == torch.float32 else plain.definition()),
        dtype,
    )


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_and_units(shape: str, dtype: torch.dtype, instruction_set: str) -> None:
    assert_exact(random_problem([1, 95, 0, 97, 192, 1, 200], rows=300, **SHAPES[shape]).to(dtype), dtype)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 120), max_size=4),
    attributes=st.integers(0, 4),
    d_e=st.integers(1, 40),
    width=st.integers(1, 70),
    d_dense=st.one_of(st.none(), st.integers(1, 40)),
    periods=st.lists(st.sampled_from([1, 2, 7, 60, DAY, 365 * DAY]), max_size=3),
    optional=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(lengths: list[int], seed: int, **shape: Any) -> None:
    """Sums of at most 480 terms of size 10: 480 · 10 · 2^-24 is 3e-4 if every rounding went the same way."""
    problem = random_problem(lengths, rows=9, seed=seed, **shape).to(torch.float32)
    exact = problem.to(torch.float64)
    wanted = with_gradients(exact, exact.run("reference"))
    for name, got in with_gradients(problem, problem.run("native")).items():
        torch.testing.assert_close(got.double(), wanted[name], rtol=1e-5, atol=3e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert_bfloat16_is_float32_rounded(problem.to(torch.bfloat16))


def assert_bfloat16_is_float32_rounded(problem: Problem) -> None:
    """Bit for bit: the same sums of the same values, rounded once, to the nearest even, as PyTorch rounds."""
    wide = problem.to(torch.float32)
    wanted = with_gradients(wide, wide.run("native").bfloat16())
    for name, got in with_gradients(problem, problem.run("native")).items():
        assert got.dtype == torch.bfloat16, name
        assert torch.equal(got, wanted[name].bfloat16()), name


@dtypes
def test_threads_do_not_change_a_bit(dtype: torch.dtype, instruction_set: str) -> None:
    problem = random_problem([3000, 0, 4000, *[7] * 300], rows=50).to(dtype)  # two rounds of 32 units
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 3):
            torch.set_num_threads(num_threads)
            results.append(with_gradients(problem, problem.run("native")))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@dtypes
def test_a_user_is_the_same_in_any_batch(dtype: torch.dtype, instruction_set: str) -> None:
    """Bit for bit: whatever comes before it, and however far from now the others' times are."""
    mine = random_problem([150], seed=1).to(dtype)
    alone = mine.run("native")
    names = ("ids", "timestamps", "counts", "dense", "utc_offsets")
    for length in (1, 5, 96, 131):
        other = random_problem([length], seed=2).to(dtype)
        for shift in (0, FAR - 2 * NOW):
            moved = replace(other, timestamps=other.timestamps + shift)
            both = replace(
                mine,
                offsets=torch.tensor([0, length, length + 150, 2 * length + 150]),
                reference_times=torch.cat([moved.reference_times, mine.reference_times, moved.reference_times]),
                **{n: torch.cat([getattr(p, n) for p in (moved, mine, moved)]) for n in names},
            )
            assert torch.equal(both.run("native")[length : length + 150], alone)


def test_bfloat16_of_every_kind(instruction_set: str) -> None:
    """Ties to the even, denormals, overflow, infinity and NaN, in whole vectors and in what is left over."""
    below = 2.0**-133  # the smallest denormal
    table = torch.tensor([1.0, 1 + 2.0**-7, -1 - 2.0**-7, -0.0, below, 3e38, math.inf, math.nan]).bfloat16()
    half = 2.0**-8  # half of the last place of 1
    for width in (1, 7, 16, 33):
        for factor, bias, expected in (
            (1.0, half, [1, 1 + 2.0**-6, -1, half, half, table[5].item(), math.inf, math.nan]),
            (1.0, 0.0, table.tolist()),
            (2.0, 0.0, [2, 2 + 2.0**-6, -2 - 2.0**-6, 0, 2 * below, math.inf, math.inf, math.nan]),
        ):
            encoder = EventEncoder(
                id_weight=torch.full((1, 1, width), factor, dtype=torch.bfloat16),
                time_weight=torch.zeros(2, width, dtype=torch.bfloat16),
                bias=torch.full((width,), bias, dtype=torch.bfloat16),
                position_table=torch.zeros(1, width, dtype=torch.bfloat16),
                frequency_table=torch.zeros(1, width, dtype=torch.bfloat16),
                periods=torch.zeros(0, dtype=torch.int64),
                phases=torch.zeros(0),
                tau=1.0,
            )
            columns = torch.tensor([0, 8]), torch.zeros(8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            got = encode_events(torch.arange(8)[:, None], table[:, None], *columns, encoder, backend="native")
            wanted = torch.tensor(expected).bfloat16()[:, None].expand(8, width)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def one_term(time_weight: list[float], periods: list[int], tau: float = 60.0) -> EventEncoder:
    return EventEncoder(
        id_weight=torch.zeros(0, 1, 1),
        time_weight=torch.tensor(time_weight)[:, None],
        bias=torch.zeros(1),
        position_table=torch.zeros(1, 1),
        frequency_table=torch.zeros(1, 1),
        periods=torch.tensor(periods, dtype=torch.int64),
        phases=torch.zeros(len(periods)),
        tau=tau,
    )


def encode(encoder: EventEncoder, times: list[int], snapshots: list[int]) -> list[float]:
    """Sequences of one event each."""
    ids, table = torch.zeros(len(times), 0, dtype=torch.int64), torch.zeros(1, 1)
    columns = (torch.arange(len(times) + 1), torch.tensor(times), torch.tensor(snapshots))
    return encode_events(ids, table, *columns, encoder, backend="native")[:, 0].tolist()


@settings(max_examples=60)
@given(
    times=st.lists(st.one_of(st.integers(-FAR, FAR), st.integers(-(1 << 51), 1 << 51)), min_size=1, max_size=9),
    period=st.one_of(st.integers(1, 1_000_000), st.integers(1, FAR)),
)
@example(times=[-(1 << 51), 1 << 51, (1 << 51) - 1, -1, 0], period=7)
@example(times=[-(1 << 51) - 1, (1 << 51) + 1], period=7)
@example(times=[(1 << 50) - 1, -(1 << 50), 1 << 51], period=(1 << 50) - 1)
@example(times=[3 * DAY, -3 * DAY, DAY - 1, 1 - DAY], period=DAY)
def test_times_modulo_a_period_are_exact(times: list[int], period: int) -> None:
    """As Python's integers have it, before 1970 and for times far beyond what a double holds."""
    turns = [2 * math.pi * (t % period) / period for t in times]
    for weights, function in (([0.0, 0, 1, 0], math.sin), ([0.0, 0, 0, 1], math.cos)):
        for name in INSTRUCTION_SETS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "INSTRUCTION_SET", name)
                got = encode(one_term(weights, [period]), times, times)
            assert got == pytest.approx([function(turn) for turn in turns], abs=3e-7)


def test_log1p_of_any_age(instruction_set: str) -> None:
    """A few ulp of itself from 2^-60 to 2^60 times tau."""
    ages = [0, *(1 << s for s in range(61)), *(3**s for s in range(38))]
    for tau in (1.0, 60.0, 2.0**40, 1e-20, 1e30):
        got = encode(one_term([1.0, 0.0], [], tau), [0] * len(ages), ages)
        assert got == pytest.approx([math.log1p(age / tau) for age in ages], rel=4e-7)


def test_semantic_ids_are_attributes(instruction_set: str) -> None:
    """One column a level; level l's codes are rows l · codes … of the table; −1 where an item has none."""
    levels, codes = 3, 8
    problem = random_problem([40, 3], attributes=levels, rows=levels * codes).to(torch.float32)
    semantic_ids = torch.randint(-1, codes, (43, levels), generator=torch.Generator().manual_seed(0))
    starts = torch.arange(levels) * codes
    rows = torch.where(semantic_ids < 0, -1, semantic_ids + starts)
    weight, table = problem.encoder.id_weight, problem.table.view(levels, codes, -1)
    content = torch.zeros(43, weight.shape[2])
    for level in range(levels):
        found = semantic_ids[:, level] >= 0
        content[found] += table[level, semantic_ids[found, level]] @ weight[level]
    without = replace(problem, ids=torch.full_like(rows, -1)).run("native")
    torch.testing.assert_close(replace(problem, ids=rows).run("native"), without + content, rtol=1e-5, atol=1e-5)


def test_memory_follows_the_events() -> None:
    """The backward keeps gradients of some thousand gathered rows, not of all: those would be 320 MB."""
    problem = random_problem([200_000], attributes=8, d_e=50, width=4, rows=100, d_dense=None).to(torch.float32)
    problem.run("native").sum().backward()
    with measured_memory() as peak:
        problem.run("native").sum().backward()
    assert peak.extra < 48 * 2**20, f"{peak.extra / 2**20:.0f} MiB"


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"ids": torch.tensor([[0, 1, 20]] * 4)}, r"ids: expected values from -1 to 19, got 0 to 20"),
    "offsets": ({"offsets": torch.tensor([0, 5, 4])}, r"offsets: expected offsets that never decrease"),
    "unsorted": ({"timestamps": torch.tensor([1, 2, 9, 8])}, r"timestamps: expected times that never decrease"),
    "times": ({"timestamps": torch.tensor([-(1 << 63), 0, 1, 2])}, r"timestamps: expected values from"),
    "snapshot": ({"reference_times": torch.tensor([0, 1 << 62])}, r"reference_times: expected values from"),
    "count": ({"counts": torch.tensor([0, 0, 1 << 62, 0])}, r"counts: expected values from 0"),
    "zone": ({"utc_offsets": torch.tensor([0, 0, 0, (1 << 63) - 1])}, r"utc_offsets: expected values from"),
}  # fmt: skip


@dtypes
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_reach_no_address(case: str, dtype: torch.dtype, instruction_set: str) -> None:
    changes, message = HOSTILE[case]
    problem = replace(random_problem([2, 2]).to(dtype), **changes)
    with pytest.raises(ValueError, match=message):
        problem.run("native")
    columns = (problem.ids, problem.offsets, problem.timestamps, problem.reference_times)
    columns += (problem.counts, problem.dense.detach(), problem.utc_offsets)
    weights = {f.name: x for f in fields(EventEncoder) if isinstance(x := getattr(problem.encoder, f.name), Tensor)}
    dense_weight = weights.pop("dense_weight").detach()
    arguments = (*columns, *(x.detach() for x in weights.values()), problem.encoder.tau, dense_weight)
    with pytest.raises(ValueError, match=message):
        torch.ops.alure.encode_events_backward(
            torch.ones(4, 7, dtype=dtype), problem.table.detach(), *arguments, True, "native"
        )


def test_the_module_checks_shapes() -> None:
    problem = random_problem([2, 2]).to(torch.float32)
    encoding = native._encoding(problem.table, events_of(problem), problem.encoder)
    with pytest.raises(ValueError, match=r"out: expected \[total, width\]"):
        _native.encode_events(encoding, np.empty((4, 6), np.float32), INSTRUCTION_SETS[0], 1)
    with pytest.raises(ValueError, match=r"out: expected .* in the table's type"):
        _native.encode_events(encoding, np.empty((4, 7), np.uint16), INSTRUCTION_SETS[0], 1)
    with pytest.raises(ValueError, match="does not run 'sse9'"):
        _native.encode_events(encoding, np.empty((4, 7), np.float32), "sse9", 1)
    short = replace(problem.encoder, phases=problem.encoder.phases[1:])
    with pytest.raises(ValueError, match="phases: expected"):
        _native.encode_events(
            native._encoding(problem.table, events_of(problem), short), np.empty((4, 7), np.float32), "portable", 1
        )


def events_of(problem: Problem) -> native.EventColumns:
    return native.EventColumns(*(getattr(problem, f.name) for f in fields(native.EventColumns)))
