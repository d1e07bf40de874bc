"""The tiles of the Triton kernels: every pair of tiles once and in the right class, look-ups, any order of a batch."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import Problem, assert_as_exact_as_plain, random_problem, require, with_gradients

from alure.kernels import position_thresholds, time_thresholds
from alure.kernels.attention.arguments import UNLIMITED, Batch
from alure.kernels.attention.kernel_plan import FEW, SEVERAL, Plan, Tiling, make_plan

BY_QUERIES, BY_KEYS = Tiling(4, 3), Tiling(3, 4, by_keys=True)
LIMITS = {0: (0, 0), 1: FEW, 2: SEVERAL}


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    size = draw(st.integers(0, 4))
    lengths = [draw(st.lists(st.integers(0, 14), min_size=size, max_size=size)) for _ in range(2)]
    offsets = [torch.tensor([0, *rows]).cumsum(0) for rows in lengths]
    span = draw(st.sampled_from([1, 40, 10**6, 2**33]))
    times = [
        torch.tensor(
            [t for n in rows for t in sorted(draw(st.integers(-span, span)) for _ in range(n))], dtype=torch.int64
        )
        for rows in lengths
    ]
    limit = st.one_of(st.integers(0, 9), st.just(UNLIMITED))
    rules = [[draw(limit), draw(limit), draw(st.integers(0, n)), draw(st.integers(0, n))] for n in lengths[1]]
    rules_tensor = torch.tensor(rules, dtype=torch.int64).reshape(size, 4) if draw(st.booleans()) else None
    groups = torch.tensor([draw(st.integers(0, 2)) for _ in range(size)], dtype=torch.int64)
    return Batch(offsets[0], offsets[1], times[0], times[1], rules_tensor, groups if draw(st.booleans()) else None)


def visible(i: int, j: int, n_k: int, rules: list[int]) -> bool:
    """Who sees whom, as the docstring of arguments.py says it."""
    left, right, contexts, targets = rules
    history = n_k - targets
    position = min(i, history)
    in_window = j < history and position - left <= j <= position + right
    return j < contexts or (j < history and 0 <= i < contexts) or in_window or (j == i >= history)


@settings(max_examples=25)
@given(
    batch=batches(),
    seconds=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=12, unique=True).map(sorted),
    by_keys=st.booleans(),
)
def test_every_pair_of_tiles_is_listed_once_in_its_class(batch: Batch, seconds: list[int], by_keys: bool) -> None:
    places = position_thresholds(longest=8)
    thresholds = torch.tensor(seconds)
    plan = make_plan(batch, thresholds, places, (BY_QUERIES, BY_QUERIES, BY_KEYS))
    assert plan.q_tiles is plan.tiles
    tiles, pairs = (plan.kv_tiles, plan.kv_pairs) if by_keys else (plan.tiles, plan.pairs)
    tiling = BY_KEYS if by_keys else BY_QUERIES
    listed = {}
    for q_begin, n_q, k_begin, n_k, start, left, right, contexts, history, group, *ends in tiles.tolist():
        (sequence,) = [  # empty sequences have no tiles
            s for s in range(len(batch.q_offsets) - 1)
            if (batch.q_offsets[s], batch.k_offsets[s]) == (q_begin, k_begin)
            and (batch.q_offsets[s + 1], batch.k_offsets[s + 1]) == (q_begin + n_q, k_begin + n_k)
            and (n_k if by_keys else n_q)
        ]  # fmt: skip
        rules = [UNLIMITED, UNLIMITED, 0, 0] if batch.rules is None else batch.rules[sequence].tolist()
        assert (left, right, contexts, n_k - history) == (*rules[:3], rules[3])
        assert group == (0 if batch.groups is None else batch.groups[sequence])
        for kind in range(5):
            for other, *buckets in pairs[ends[kind] : ends[kind + 1]].tolist():
                row, column = (other, start) if by_keys else (start, other)
                assert (sequence, row, column) not in listed
                listed[sequence, row, column] = (kind, buckets)
    for sequence in range(len(batch.q_offsets) - 1):
        check_sequence(batch, sequence, thresholds, places, tiling, listed)
    assert not listed


def check_sequence(
    batch: Batch, sequence: int, seconds: torch.Tensor, places: torch.Tensor, tiling: Tiling, listed: dict
) -> None:
    assert batch.q_timestamps is not None
    assert batch.k_timestamps is not None
    q_begin, q_end = batch.q_offsets[sequence : sequence + 2].tolist()
    k_begin, k_end = batch.k_offsets[sequence : sequence + 2].tolist()
    n_q, n_k = q_end - q_begin, k_end - k_begin
    rules = [UNLIMITED, UNLIMITED, 0, 0] if batch.rules is None else batch.rules[sequence].tolist()
    history = n_k - rules[3]
    seen = torch.tensor([[visible(i + n_k - n_q, j, n_k, rules) for j in range(n_k)] for i in range(n_q)])
    seen = seen.reshape(n_q, n_k)
    elapsed = batch.q_timestamps[q_begin:q_end, None] - batch.k_timestamps[k_begin:k_end]
    distance = (torch.arange(n_q) + n_k - n_q).clamp(max=history)[:, None] - torch.arange(n_k).clamp(max=history)
    time_bucket, place_bucket = (
        torch.bucketize(x, thresholds, right=True) for x, thresholds in ((elapsed, seconds), (distance, places))
    )
    for row in range(0, n_q, tiling.block_m):
        for column in range(0, n_k, tiling.block_n):
            part = (slice(row, row + tiling.block_m), slice(column, column + tiling.block_n))
            if not seen[part].any():
                assert (sequence, row, column) not in listed
                continue
            kind, (time_first, time_last, place_first, place_last) = listed.pop((sequence, row, column))
            assert ((time_bucket[part] >= time_first) & (time_bucket[part] <= time_last))[seen[part]].all()
            assert ((place_bucket[part] >= place_first) & (place_bucket[part] <= place_last))[seen[part]].all()
            whole = bool(seen[part].all()) and column + tiling.block_n <= n_k
            assert whole or kind == 4
            if kind < 3:
                assert time_last - time_first <= LIMITS[kind][0]
                assert place_last - place_first <= LIMITS[kind][1]
            elif kind == 3 or (whole and column + tiling.block_n <= history and row + tiling.block_m <= n_q):
                mixed = rules[2] > 0  # rows or keys of contexts beside others: the corners may not tell
                assert mixed or time_last - time_first > SEVERAL[0] or place_last - place_first > SEVERAL[1]


def looked_up(plan: Plan, delta: torch.Tensor) -> torch.Tensor:
    """What `look_up` of kernel_tiles.py does."""
    cell = (delta.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF) >> 20
    entry = plan.time_cells[cell]
    bucket, steps = entry >> 32, plan.sizes.shape[0]
    if steps and plan.q_time.dtype == torch.int32:
        bucket = bucket + (delta >= entry.to(torch.int32))
        steps -= 1
    for _ in range(steps):
        bucket = bucket + (delta >= plan.time_thresholds[bucket])
    return bucket


@settings(max_examples=25)
@given(
    thresholds=st.lists(st.integers(-(2**30), 2**30), min_size=1, max_size=40, unique=True).map(sorted),
    near=st.integers(-(2**29), 2**29),
    span=st.sampled_from([2**30 - 1, 2**30]),
)
def test_look_up_finds_every_bucket(thresholds: list[int], near: int, span: int) -> None:
    dense = torch.tensor(sorted({*thresholds, *range(near, near + 5)}))  # several within one cell
    for chosen in (dense, time_thresholds(4), time_thresholds(2, bidirectional=False)):
        offsets = torch.tensor([0, 2])
        plan = make_plan(
            Batch(offsets, offsets, torch.tensor([0, span]), torch.tensor([0, span]), None, None),
            chosen,
            None,
            (BY_QUERIES, BY_QUERIES, BY_KEYS),
        )
        assert (plan.q_time.dtype == torch.int32) == (span < 2**30)
        delta = torch.cat(
            [chosen - 1, chosen, chosen + 1, torch.randint(1 - 2**30, 2**30, (500,)), torch.zeros(1)]
        ).long()
        delta = delta[delta.abs() < 2**30]
        assert torch.equal(looked_up(plan, delta), torch.bucketize(delta, chosen, right=True))
        assert chosen is dense or plan.sizes.shape[0] == 0  # log-spaced thresholds split no cell


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences have pairs of every class."""
    from alure.kernels.attention import kernel_configs

    sizes = [
        kernel_configs.Config(16, 16, 4, 1),
        kernel_configs.Config(16, 32, 4, 1),
        kernel_configs.Config(32, 16, 4, 1),
    ]
    monkeypatch.setattr(kernel_configs, "HOPPER_CONFIGS", {16: sizes})


def bursty(problem: Problem) -> Problem:
    """Times in sessions far apart, and few thresholds: every class occurs."""
    n = len(problem.q)
    times = torch.arange(n) // 24 * 50_000 + torch.arange(n) % 24
    thresholds = torch.tensor([-100_000, -5, 0, 2, 5, 9, 14, 20, 60_000])
    table = problem.time_table[:, : len(thresholds) + 1].detach().clone().requires_grad_()
    places = torch.tensor([-40, -20, 0, 20, 40])
    place_table = problem.position_table[:, : len(places) + 1].detach().clone().requires_grad_()
    return replace(
        problem,
        q_timestamps=times,
        k_timestamps=times,
        time_thresholds=thresholds,
        time_table=table,
        position_thresholds=places,
        position_table=place_table,
    )


def test_every_class_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton", "cpu")
    small_tiles(monkeypatch)
    from alure.kernels.attention.kernel import prepare

    problem = bursty(random_problem([120], num_heads=1, dtype=torch.float32))
    batch, thresholds = problem.plan().batch, (problem.time_thresholds, problem.position_thresholds)
    plan = Plan(*prepare(torch.float32, problem.q.shape[2], problem.q.device, batch, *thresholds, gradients=True))
    for tiles in (plan.tiles, plan.q_tiles, plan.kv_tiles):
        assert (tiles[:, 11:] > tiles[:, 10:-1]).any(0).all()  # some tile has pairs of each class
    grad_out = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1))
    exact, plain = problem.to(torch.float64), problem.to(torch.float32)
    assert_as_exact_as_plain(
        with_gradients(problem.run("triton"), problem.leaves(), grad_out),
        with_gradients(exact.dense(torch.float64), exact.leaves(), grad_out),
        with_gradients(plain.dense(torch.float32), plain.leaves(), grad_out),
        torch.float32,
    )


def test_a_batch_in_another_order_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton", "cpu")
    small_tiles(monkeypatch)
    problem = random_problem([9, 40, 0, 17], num_heads=1, dtype=torch.float32)
    order = [3, 0, 2, 1]
    bounds = problem.q_offsets.tolist()
    rows = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in order])
    offsets = torch.tensor([0, *(bounds[s + 1] - bounds[s] for s in order)]).cumsum(0)
    moved = {name: getattr(problem, name)[rows] for name in ("q", "k", "v", "q_timestamps", "k_timestamps")}
    other = replace(problem, **moved, q_offsets=offsets, k_offsets=offsets)
    grad_out = torch.randn(problem.q.shape)
    first = with_gradients(problem.run("triton"), problem.leaves()[:3], grad_out)
    second = with_gradients(other.run("triton"), other.leaves()[:3], grad_out[rows])
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x[rows], y)


def test_a_plan_keeps_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels would take others: on another GPU than it was made for, or once these have been tuned."""
    require("triton", "cpu")
    problem = bursty(random_problem([120], num_heads=1, dtype=torch.float32))
    plan, grad_out = problem.plan(), torch.ones(problem.q.shape)
    with monkeypatch.context() as there:
        small_tiles(there)
        made = with_gradients(problem.run_planned(plan, "triton"), problem.leaves(), grad_out)
    used = with_gradients(problem.run_planned(plan, "triton"), problem.leaves(), grad_out)
    assert all(torch.equal(x, y) for x, y in zip(made, used, strict=True))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    """The kernels take maxima before they scale."""
    require("triton", "cpu")
    from alure.kernels import jagged_attention

    problem = random_problem([20], num_heads=1, dtype=torch.float32)
    grad_out = torch.randn(problem.q.shape)
    results = [
        with_gradients(
            jagged_attention(
                problem.q,
                problem.k,
                problem.v,
                problem.q_offsets,
                q_timestamps=problem.q_timestamps,
                time_bias=problem.time_bias(),
                softmax_scale=scale,
                backend=backend,
            ),
            problem.leaves()[:6],
            grad_out,
        )
        for backend in ("triton", "reference")
    ]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("span", [2**20, 2**24, 2**30, 2**40])
def test_crossings_are_the_keys_from_a_bucket_up(monkeypatch: pytest.MonkeyPatch, span: int) -> None:
    """Also where times are as int32 and int64, queries are not the keys, and sequences have none of one of them."""
    require("triton", "cpu")
    small_tiles(monkeypatch)
    from alure.kernels.attention.kernel import _crossings, prepare

    problem = random_problem([40, 3, 0, 17], [25, 0, 9, 64], num_heads=1, dtype=torch.float32, span=span + 7)
    thresholds = torch.tensor([-(2**34), -5, 0, *(3**step for step in range(20))])
    batch = replace(problem, time_thresholds=thresholds).plan().batch
    plan = Plan(*prepare(torch.float32, 16, problem.q.device, batch, thresholds, None, gradients=True))
    found = _crossings(plan, len(thresholds) + 1)
    for s in range(4):
        rows, columns = (slice(int(o[s]), int(o[s + 1])) for o in (problem.q_offsets, problem.k_offsets))
        elapsed = problem.q_timestamps[rows, None] - problem.k_timestamps[columns]
        buckets = torch.bucketize(elapsed, thresholds, right=True)
        for bucket in range(len(thresholds) + 1):
            assert torch.equal(found[rows, bucket].long(), (buckets >= bucket).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_without_pairs_have_no_gradient(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Not even what sums are rounded by, which Adam would make steps of; those of masked pairs neither."""
    require("triton", "cpu")
    small_tiles(monkeypatch)
    problem = replace(random_problem([70, 33], num_heads=1, dtype=dtype), causal=True)
    bounds, grad_out = problem.q_offsets.tolist(), torch.randn(problem.q.shape, dtype=dtype)
    _, _, _, _, d_time, _, _, d_position = with_gradients(problem.run("triton"), problem.leaves(), grad_out)
    for gradient, thresholds, values in (
        (d_time, problem.time_thresholds, problem.q_timestamps),
        (d_position, problem.position_thresholds, torch.cat([torch.arange(n) for n in (70, 33)])),
    ):
        distances = [
            (values[begin:end, None] - values[begin:end])[torch.ones(end - begin, end - begin).tril().bool()]
            for begin, end in pairwise(bounds)
        ]
        occurs = torch.bucketize(torch.cat(distances), thresholds, right=True).bincount(minlength=len(thresholds) + 1)
        assert (occurs == 0).sum() > 5
        assert not gradient[:, occurs == 0].any()
        assert gradient[:, occurs > 1].any(0).all()
