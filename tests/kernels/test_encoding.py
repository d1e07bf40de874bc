"""encode_events against its definition in float64: values, gradients, closed forms, isolation and hostile input."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.encoding import DAY, NOW, Problem, random_problem, with_gradients
from support.tolerance import TARGETS as PORTABLE_TARGETS
from support.tolerance import assert_as_exact_as_plain, poisoned_memory, require
from torch import Tensor

from alure.kernels import EventEncoder, encode_events
from alure.kernels.encoding import CheckedColumns, encode_columns, ops
from alure.kernels.encoding.arguments import EventColumns

TARGETS = [*PORTABLE_TARGETS, pytest.param("native", "cpu", id="native")]
BACKENDS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [0, 5, 1, 37, 0, 3]
SHAPES: dict[str, dict[str, Any]] = {
    "everything": {},
    "content only": {"periods": (), "d_dense": None, "optional": False},
    "no attributes": {"attributes": 0},
    "wide": {"attributes": 2, "d_e": 70, "width": 150, "d_dense": 100},
    "one of each": {"attributes": 1, "d_e": 1, "width": 1, "d_dense": 1, "rows": 1, "periods": (7,)},
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_definition(shape: str) -> None:
    problem = random_problem(LENGTHS, **SHAPES[shape]).to(torch.float64)
    actual = with_gradients(problem, problem.run("reference"))
    exact = with_gradients(problem, problem.definition())
    for name, want in exact.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_plain(shape: str, dtype: torch.dtype, backend: str, device: str) -> None:
    require(backend, device)
    if backend == "native" and dtype == torch.float16:
        pytest.skip("native takes float32 and bfloat16")
    given_ = random_problem(LENGTHS, **SHAPES[shape]).to(dtype)
    exact, plain, actual = given_.to(torch.float64), given_.to(dtype), given_.to(dtype, device)
    assert_as_exact_as_plain(
        with_gradients(actual, actual.run(backend)),
        with_gradients(exact, exact.definition()),
        with_gradients(plain, plain.definition()),
        dtype,
    )


def test_columns_that_were_checked_for_another_table_or_encoder_are_checked_again() -> None:
    problem = random_problem(LENGTHS).to(torch.float32)
    given_ = {name: getattr(problem, name) for name in ("ids", "offsets", "timestamps", "reference_times", "counts")}
    periods = problem.encoder.periods
    columns = CheckedColumns(**given_, utc_offsets=problem.utc_offsets, num_rows=len(problem.table), periods=periods)
    encode = partial(encode_columns, columns, dense=problem.dense, backend="reference")
    assert torch.equal(encode(problem.table, problem.encoder), problem.run("reference"))
    with pytest.raises(ValueError, match="ids: expected values from -1 to 18, got -1 to 19"):
        encode(problem.table[:19], problem.encoder)
    with pytest.raises(ValueError, match="ids: expected values from -1 to 18"):
        replace(columns, num_rows=19)
    with pytest.raises(ValueError, match=r"counts: expected shape \[46\], got \[45\]"):
        replace(columns, counts=columns.counts[1:])
    with pytest.raises(ValueError, match="periods: expected values from 1"):
        encode(problem.table, replace(problem.encoder, periods=torch.zeros_like(periods)))


def test_blocks_of_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem([700, 0, 300]).to(torch.float64)
    whole = with_gradients(problem, problem.run("reference"))
    monkeypatch.setitem(ops.reference.BLOCK_ELEMENTS, "cpu", 1)  # the smallest block, 256 rows
    for name, x in with_gradients(problem, problem.run("reference")).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-10, atol=1e-9)


def test_gradcheck() -> None:
    problem = random_problem([2, 0, 3], rows=4, d_e=2, width=3, d_dense=2, periods=(DAY,)).to(torch.float64)
    leaves = problem.leaves()

    def run(*values: Tensor) -> Tensor:
        return problem.with_leaves(dict(zip(leaves, values))).run("reference")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def flat_arguments(p: Problem) -> tuple[Any, ...]:
    columns = EventColumns(p.ids, p.offsets, p.timestamps, p.reference_times, p.counts, p.dense, p.utc_offsets)
    return p.table, *ops._flatten(columns, p.encoder)


@pytest.mark.parametrize(
    ("shape", "backend"),
    [("everything", "triton"), ("everything", "native"), ("content only", "native"), ("content only", "reference")],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_opcheck(shape: str, backend: str, dtype: torch.dtype) -> None:
    require(backend, "cpu")
    problem = random_problem([2, 0, 3], **SHAPES[shape]).to(dtype)
    arguments = flat_arguments(problem)
    torch.library.opcheck(torch.ops.alure.encode_events.default, (*arguments, backend, False))
    for wants_dense in (False, True):
        detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        grad = torch.randn(5, problem.encoder.bias.numel(), dtype=dtype)
        wanted = wants_dense and problem.dense is not None
        torch.library.opcheck(torch.ops.alure.encode_events_backward.default, (grad, *detached, wanted, backend))


def test_compiles_without_graph_breaks() -> None:
    problem = random_problem([3, 0, 4]).to(torch.float32)
    run = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    compiled, eager = with_gradients(problem, run()), with_gradients(problem, problem.run())
    for name, x in eager.items():
        assert torch.equal(compiled[name], x), name


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0]])
@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_few_events(lengths: list[int], backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem(lengths).to(torch.float32, device)
    found = with_gradients(problem, problem.run(backend))
    torch.testing.assert_close(found["out"].cpu(), problem.to(torch.float32).definition(), rtol=1e-4, atol=1e-4)
    for name, x in found.items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_no_user_sees_another(dtype: torch.dtype, backend: str, device: str) -> None:
    """Everything of user A is changed; every other user's rows keep their bits."""
    require(backend, device)
    before = random_problem([4, 9, 6]).to(dtype, device)
    other = random_problem([4, 9, 6], seed=1).to(dtype, device)
    row = torch.arange(19, device=device)
    of_a, is_a = (row >= 4) & (row < 13), torch.tensor([False, True, False], device=device)

    def mixed(name: str) -> Tensor:
        mine, theirs = getattr(before, name).detach(), getattr(other, name).detach()
        chosen = is_a if name == "reference_times" else of_a
        return torch.where(chosen.view(-1, *[1] * (mine.dim() - 1)), theirs, mine)

    names = ("ids", "timestamps", "reference_times", "counts", "dense", "utc_offsets")
    after = replace(before, **{name: mixed(name) for name in names})
    x, y = before.run(backend).detach(), after.run(backend).detach()
    assert torch.equal(x[~of_a], y[~of_a])
    assert not torch.isclose(x[of_a], y[of_a]).all(1).any()


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), seed=st.integers(0, 5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_user_alone_is_the_user_in_a_batch(backend: str, lengths: list[int], seed: int) -> None:
    require(backend, "cpu")
    problem = random_problem(lengths, seed=seed).to(torch.float32)
    together = problem.run(backend).detach()
    for s, (start, stop) in enumerate(zip(problem.offsets[:-1].tolist(), problem.offsets[1:].tolist())):
        names = ("ids", "timestamps", "counts", "dense", "utc_offsets")
        alone = replace(
            problem,
            offsets=torch.tensor([0, stop - start]),
            reference_times=problem.reference_times[s : s + 1],
            **{name: getattr(problem, name)[start:stop] for name in names},
        )
        torch.testing.assert_close(alone.run(backend).detach(), together[start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_the_backward_is_deterministic(dtype: torch.dtype, backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([60, 40], rows=3).to(dtype, device)  # every row of the table is hit often
    first, second = (with_gradients(problem, problem.run(backend)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@settings(max_examples=30)
@given(
    index=st.lists(st.integers(-1, 4), min_size=1, max_size=40),
    chunk=st.integers(1, 4),
    joined=st.sampled_from([2, 4]),
)
@example(index=[3] * 40, chunk=1, joined=2)
@example(index=[-1] * 9, chunk=2, joined=2)
@example(index=[0, 1, 1, 2, 2, 2, 2, 2, 3], chunk=2, joined=2)
def test_triton_sums_rows_by_index(index: list[int], chunk: int, joined: int) -> None:
    """Runs that fill chunks, cross one or many, end with them, and the missing; small integers sum exactly."""
    require("triton", "cpu")
    from alure.kernels.encoding import kernel_backward

    x = torch.arange(3.0 * len(index)).view(-1, 3)
    expected = torch.zeros(6, 3)
    for row, i in zip(x, index):
        if i >= 0:
            expected[i] += row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_backward, "CHUNK", chunk)
        patch.setattr(kernel_backward, "JOINED", joined)
        assert torch.equal(kernel_backward.sum_rows(x, torch.tensor(index), 6), expected)


def test_triton_splits_add_up() -> None:
    """More splits of the events than one, the last of them short."""
    require("triton", "cpu")
    problem = random_problem([70, 0, 31]).to(torch.float32)
    for name, x in with_gradients(problem, problem.run("triton")).items():
        expected = with_gradients(problem, problem.run("reference"))[name]
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_strided_inputs_and_int32_offsets(dtype: torch.dtype, backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem(LENGTHS).to(dtype, device)

    def strided(x: Tensor) -> Tensor:
        spread = x.detach().new_full((*x.shape[:-1], 2 * x.shape[-1]), 77)
        spread[..., ::2] = x.detach()
        return spread[..., ::2]

    names = ("ids", "timestamps", "reference_times", "counts", "dense", "utc_offsets")
    apart = replace(problem, offsets=problem.offsets.int(), **{name: strided(getattr(problem, name)) for name in names})
    apart = apart.with_leaves({name: strided(x) for name, x in apart.leaves().items()})
    assert not apart.table.is_contiguous()
    assert torch.equal(apart.run(backend), problem.run(backend))


# closed forms: an encoder in which one term is alive


def silent(**alive: Any) -> EventEncoder:
    """Width 1, no attributes, every weight zero but those given."""
    periods = alive.get("periods", torch.zeros(0, dtype=torch.int64))
    zeros: dict[str, Any] = {
        "id_weight": torch.zeros(0, 1, 1),
        "time_weight": torch.zeros(2 + 2 * len(periods), 1),
        "bias": torch.zeros(1),
        "position_table": torch.zeros(1, 1),
        "frequency_table": torch.zeros(1, 1),
        "periods": periods,
        "phases": torch.zeros(len(periods)),
        "tau": 60.0,
    }
    return EventEncoder(**{**zeros, **alive})


def encode(encoder: EventEncoder, backend: str, times: list[int], snapshot: int, **columns: Tensor) -> list[float]:
    out = encode_events(
        torch.zeros(len(times), 0, dtype=torch.int64),
        torch.zeros(1, 1),
        torch.tensor([0, len(times)]),
        torch.tensor(times),
        torch.tensor([snapshot]),
        encoder,
        backend=backend,
        **columns,
    )
    return out[:, 0].tolist()


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    require(request.param, "cpu")
    return str(request.param)


def test_position_counts_from_the_newest(backend: str) -> None:
    encoder = silent(position_table=column(0, 10, 20, 30))
    assert encode(encoder, backend, [1, 2, 3, 4, 5, 6], 9) == [30, 30, 30, 20, 10, 0]


def test_truncating_old_history_moves_nothing(backend: str) -> None:
    problem = random_problem([40]).to(torch.float32)
    kept = replace(problem, offsets=torch.tensor([0, 25]))
    names = ("ids", "timestamps", "counts", "dense", "utc_offsets")
    kept = replace(kept, **{name: getattr(problem, name)[15:] for name in names})
    whole, truncated = problem.run(backend)[15:], kept.run(backend)
    # only the gap of what is now the oldest event is gone
    torch.testing.assert_close(truncated[1:], whole[1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(truncated[0], whole[0])


def test_frequency_in_octaves(backend: str) -> None:
    encoder = silent(frequency_table=column(0, 1, 2, 3, 4))
    counts = [0, 1, 2, 3, 6, 7, 14, 15, 31, 1 << 40, (1 << 62) - 1]
    expected = [0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert encode(encoder, backend, [1] * 11, 9, counts=torch.tensor(counts)) == expected
    assert encode(encoder, backend, [1] * 3, 9) == [0, 0, 0]


def test_a_long_frequency_table(backend: str) -> None:
    encoder = silent(frequency_table=torch.arange(80.0)[:, None])
    assert encode(encoder, backend, [1, 1], 9, counts=torch.tensor([(1 << 61), (1 << 62) - 1])) == [61, 62]


def test_age_and_gap(backend: str) -> None:
    times = [NOW - 3600, NOW - 60, NOW - 60, NOW, NOW + 500]  # equal times, and one event after the snapshot
    age, gap = (silent(time_weight=weight) for weight in (column(1, 0), column(0, 1)))
    ages, gaps = [3600, 60, 60, 0, 0], [0, 3540, 0, 60, 500]
    assert encode(age, backend, times, NOW) == pytest.approx([math.log1p(x / 60) for x in ages], rel=1e-6)
    assert encode(gap, backend, times, NOW) == pytest.approx([math.log1p(x / 60) for x in gaps], rel=1e-6)


def test_seconds_of_2026_are_told_apart(backend: str) -> None:
    """float32 would round both times to the same multiple of 128 s."""
    assert torch.tensor([NOW, NOW + 1]).float().unique().numel() == 1
    age, gap = silent(time_weight=column(1, 0)), silent(time_weight=column(0, 1))
    assert encode(age, backend, [NOW, NOW + 1], NOW + 1) == pytest.approx([math.log1p(1 / 60), 0], rel=1e-6)
    assert encode(gap, backend, [NOW, NOW + 1], NOW + 1) == pytest.approx([0, math.log1p(1 / 60)], rel=1e-6)
    minute = silent(time_weight=column(0, 0, 1, 0), periods=torch.tensor([60]))
    expected = [math.sin(2 * math.pi * (t % 60) / 60) for t in (NOW, NOW + 1)]
    assert encode(minute, backend, [NOW, NOW + 1], NOW + 1) == pytest.approx(expected, abs=1e-6)


def test_tiny_age_keeps_its_digits(backend: str) -> None:
    """1 + 1 s / 365 d rounds to a multiple of 1.2e-7 in float32: an error of 4 % of the feature."""
    encoder = silent(time_weight=column(1, 0), tau=365.0 * DAY)
    assert encode(encoder, backend, [NOW - 1], NOW) == pytest.approx([math.log1p(1 / (365 * DAY))], rel=1e-5)


def test_cycles(backend: str) -> None:
    day = torch.tensor([DAY])
    sine, cosine = (
        silent(time_weight=column(0, 0, 1, 0), periods=day),
        silent(time_weight=column(0, 0, 0, 1), periods=day),
    )
    midnight = NOW // DAY * DAY
    times = [midnight + hour * 3600 for hour in (0, 3, 6, 9, 12, 15, 18, 21)]
    half = math.sqrt(0.5)
    assert encode(sine, backend, times, NOW) == pytest.approx([0, half, 1, half, 0, -half, -1, -half], abs=1e-6)
    assert encode(cosine, backend, times, NOW) == pytest.approx([1, half, 0, -half, -1, -half, 0, half], abs=1e-6)
    # a learned phase turns the clock, an offset from UTC sets it, and times before 1970 run on backwards
    turned = replace(sine, phases=torch.tensor([math.pi / 2 + 20 * math.pi]))
    assert encode(turned, backend, times[:1], NOW) == pytest.approx([1], abs=2e-5)
    zone = {"utc_offsets": torch.tensor([6 * 3600, -6 * 3600])}
    assert encode(sine, backend, [midnight] * 2, NOW, **zone) == pytest.approx([1, -1], abs=1e-6)
    assert encode(sine, backend, [-6 * 3600], NOW) == pytest.approx([-1], abs=1e-6)


def test_a_missing_id_reads_nothing(backend: str) -> None:
    problem = random_problem([3], rows=2).to(torch.float32)
    poisoned = problem.with_leaves({**problem.leaves(), "table": torch.full_like(problem.table, math.nan)})
    missing = replace(poisoned, ids=torch.full_like(problem.ids, -1))
    assert missing.run(backend).isfinite().all()
    no_rows = missing.with_leaves({**missing.leaves(), "table": missing.table[:0]})
    assert torch.equal(no_rows.run(backend), missing.run(backend))


def test_one_long_user_beside_many_short_ones() -> None:
    problem = random_problem([20_000, *[5] * 2_000]).to(torch.float32)
    assert problem.run("reference").isfinite().all()


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "id beyond the table": ({"ids": torch.tensor([[0, 1, 20]] * 4)}, {}, r"ids: expected .* -1 to 19, got 0 to 20"),
    "id below -1": ({"ids": torch.tensor([[0, 1, -2]] * 4)}, {}, r"ids: expected values from -1"),
    "huge id": ({"ids": torch.full((4, 3), 1 << 62)}, {}, r"ids: expected values"),
    "flat ids": ({"ids": torch.zeros(4, dtype=torch.int64)}, {}, r"ids: expected shape \[total, attributes\]"),
    "int32 ids": ({"ids": torch.zeros(4, 3, dtype=torch.int32)}, {}, r"ids: expected torch.int64, got torch.int32"),
    "too few ids": ({"ids": torch.zeros(3, 3, dtype=torch.int64)}, {}, r"timestamps: expected shape \[3\]"),
    "falling offsets": ({"offsets": torch.tensor([0, 5, 4])}, {}, r"offsets: expected offsets that never decrease"),
    "offsets from 1": ({"offsets": torch.tensor([1, 2, 4])}, {}, r"offsets: expected the first offset to be 0"),
    "offsets beyond": ({"offsets": torch.tensor([0, 2, 1 << 40])}, {}, r"offsets: expected the last offset"),
    "float offsets": ({"offsets": torch.tensor([0.0, 2, 4])}, {}, r"offsets: expected torch.int64 or torch.int32"),
    "no offsets": ({"offsets": torch.zeros(0, dtype=torch.int64)}, {}, r"offsets: expected shape \[batch \+ 1\]"),
    "unsorted": ({"timestamps": torch.tensor([9, 8, 1, 2])}, {}, r"timestamps: expected times that never decrease"),
    "float32 times": ({"timestamps": torch.zeros(4)}, {}, r"timestamps: expected torch.int64, got torch.float32"),
    "overflowing times": ({"timestamps": torch.tensor([-(1 << 63), 0, 1, 2])}, {}, r"timestamps: expected values from"),
    "one snapshot too few": ({"reference_times": torch.tensor([NOW])}, {}, r"reference_times: expected shape \[2\]"),
    "negative count": ({"counts": torch.tensor([0, -1, 0, 0])}, {}, r"counts: expected values from 0"),
    "too few counts": ({"counts": torch.zeros(3, dtype=torch.int64)}, {}, r"counts: expected shape \[4\], got \[3\]"),
    "int32 counts": ({"counts": torch.zeros(4, dtype=torch.int32)}, {}, r"counts: expected torch.int64"),
    "short utc_offsets": ({"utc_offsets": torch.zeros(3, dtype=torch.int64)}, {}, r"utc_offsets: expected shape \[4\]"),
    "too few rows of dense": ({"dense": torch.zeros(3, 6)}, {}, r"dense: expected shape \[4, any\], got \[3, 6\]"),
    "flat table": ({"table": torch.zeros(20)}, {}, r"table: expected shape \[rows, d_e\], got \[20\]"),
    "bias": ({}, {"bias": torch.zeros(7, 1)}, r"bias: expected shape \[D\], got \[7, 1\]"),
    "id weight": ({}, {"id_weight": torch.zeros(3, 4, 7)}, r"id_weight: expected shape \[3, 5, 7\], got \[3, 4, 7\]"),
    "integer table": ({"table": torch.zeros(20, 5, dtype=torch.int64)}, {}, r"table: expected float16, bfloat16"),
    "2-d periods": ({}, {"periods": torch.tensor([[DAY], [7], [9]])}, r"periods: expected shape \[P\], got \[3, 1\]"),
    "float periods": ({}, {"periods": torch.tensor([1.5, 2, 7])}, r"periods: expected torch.int64, got torch.float32"),
    "position width": ({}, {"position_table": torch.zeros(4, 6)}, r"position_table: expected shape \[any, 7\]"),
    "frequency width": ({}, {"frequency_table": torch.zeros(5, 6)}, r"frequency_table: expected shape"),
    "phases": ({}, {"phases": torch.zeros(2)}, r"phases: expected shape \[3\], got \[2\]"),
    "wrong length of dense": ({"dense": torch.zeros(4, 5)}, {}, r"dense_weight: expected shape \[5, 7\], got \[6, 7\]"),
    "no dense": ({"dense": None}, {}, r"dense: expected a tensor because dense_weight is given"),
    "tau 0": ({}, {"tau": 0.0}, r"tau: expected a finite number of seconds > 0, got 0.0"),
    "tau NaN": ({}, {"tau": math.nan}, r"tau: expected a finite"),
    "period 0": ({}, {"periods": torch.tensor([DAY, 0, 7])}, r"periods: expected values from 1"),
    "time weight": ({}, {"time_weight": torch.zeros(7, 7)}, r"time_weight: expected shape \[8, 7\], got \[7, 7\]"),
    "mixed dtypes": ({}, {"bias": torch.zeros(7, dtype=torch.float16)}, r"bias: expected torch.float32, got"),
    "empty position table": ({}, {"position_table": torch.zeros(0, 7)}, r"position_table: expected at least one row"),
}  # fmt: skip


def test_an_encoder_of_another_kind_is_refused(backend: str) -> None:
    with pytest.raises(TypeError, match="encoder: expected EventEncoder, got dict"):
        replace(random_problem([2, 2]).to(torch.float32), encoder={}).run(backend)


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("direct", [False, True], ids=["function", "operator"])
def test_hostile_input(case: str, direct: bool, backend: str) -> None:
    """Refused with a message that names it, before a kernel reads: also where the operator is called directly."""
    changes, encoder_changes, message = HOSTILE[case]
    problem = random_problem([2, 2]).to(torch.float32)
    problem = replace(problem, **changes, encoder=replace(problem.encoder, **encoder_changes))
    operator = partial(torch.ops.alure.encode_events, *flat_arguments(problem))
    run = partial(operator, checked=False) if direct else problem.run
    with pytest.raises((ValueError, TypeError), match=message):
        run(backend)


def test_dtypes_of_the_backends() -> None:
    for backend in ("triton", "native"):
        with pytest.raises(ValueError, match=f"'{backend}' takes a table of .*torch.float32.*, got torch.float64"):
            random_problem([2]).run(backend)
    with pytest.raises(ValueError, match=r"'native' takes a table of torch\.float32, torch\.bfloat16, got .*float16"):
        random_problem([2]).to(torch.float16).run("native")
    for dtype in DTYPES:
        problem = random_problem([9]).to(dtype)
        assert torch.equal(problem.run("auto"), problem.run("native")), "auto takes native on a CPU"
    assert random_problem([2]).run("auto").dtype == torch.float64
