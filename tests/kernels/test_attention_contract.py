"""What jagged_attention promises beyond its values: refusals, isolation, registration, memory, determinism."""

import gc
import inspect
import re
from dataclasses import replace
from typing import Any, Literal, Unpack, get_overloads

import pytest
import torch
from support.attention import DAY, NOW, TARGETS, Problem, random_problem, require, with_gradients

from alure.kernels import AttentionPlan, PositionBias, TimeBias, jagged_attention, time_thresholds
from alure.kernels.attention.arguments import UNLIMITED
from alure.kernels.attention.ops import AttentionOptions

X = torch.zeros(4, 2, 8)
OFFSETS = torch.tensor([0, 1, 4])
TIMES = torch.tensor([5, 1, 2, 2])
BIAS = TimeBias(time_thresholds(), torch.zeros(2, 107))


def attend(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"q": X, "k": X, "v": X, "q_offsets": OFFSETS, **changes}
    return jagged_attention(**arguments)


ONLY_BY_QUERIES = torch.tensor([9, 1, 2, 3])  # sorted in each sequence of OFFSETS
NESTED = torch.nested.nested_tensor([torch.zeros(3, 2, 8)], layout=torch.jagged)
REFUSED = {
    "negative": ({"q_offsets": torch.tensor([-1, 1, 4])}, ValueError, "first offset to be 0, got -1"),
    "decreasing": ({"q_offsets": torch.tensor([0, 5, 4])}, ValueError, "q_offsets[1] = 5 > q_offsets[2] = 4"),
    "beyond total": ({"q_offsets": torch.tensor([0, 1, 9])}, ValueError, "number of rows, 4, got 9"),
    "short of total": ({"q_offsets": torch.tensor([0, 1, 3])}, ValueError, "number of rows, 4, got 3"),
    "huge": ({"q_offsets": torch.tensor([0, 2**62, 4])}, ValueError, "never decrease"),
    "float offsets": ({"q_offsets": OFFSETS.float()}, TypeError, "q_offsets: expected int32 or int64"),
    "int16 offsets": ({"q_offsets": OFFSETS.short()}, TypeError, "q_offsets: expected int32 or int64"),
    "list offsets": ({"q_offsets": [0, 1, 4]}, TypeError, "q_offsets: expected a torch.Tensor, got list"),
    "2-d offsets": ({"q_offsets": OFFSETS[None]}, ValueError, "q_offsets: expected shape [batch + 1]"),
    "no offsets": ({"q_offsets": OFFSETS[:0]}, ValueError, "q_offsets: expected shape [batch + 1]"),
    "other device": ({"q_offsets": OFFSETS.to("meta")}, ValueError, "q_offsets: expected a tensor on cpu"),
    "batch sizes": ({"k_offsets": torch.tensor([0, 4])}, ValueError, "as many sequences as q_offsets, 2, got 1"),
    "int16 k_offsets": ({"k_offsets": OFFSETS.short()}, TypeError, "k_offsets: expected int32 or int64"),
    "bad k_offsets": ({"k_offsets": torch.tensor([0, 5, 4])}, ValueError, "k_offsets[1] = 5"),
    "k without offsets": ({"k": X[:3], "v": X[:3]}, ValueError, "k_offsets: needed because q has 4 rows"),
    "k and v differ": ({"v": X[:, :1]}, ValueError, "k and v: expected one shape"),
    "heads differ": (
        {"q": X.repeat(1, 2, 1)[:, :3]},
        ValueError,
        "kv_heads a divisor of the heads of q and its head_dim, [3, 8]",
    ),
    "head_dims differ": ({"k": X[..., :4], "v": X[..., :4]}, ValueError, "its head_dim, [2, 8]"),
    "dtypes differ": ({"k": X.double()}, ValueError, "k: expected torch.float32"),
    "int values": ({"q": X.int(), "k": X.int(), "v": X.int()}, TypeError, "q: expected float16"),
    "no tensor": ({"q": [0.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    "no heads": ({"q": X[:, :0]}, ValueError, "q: expected at least one head and one channel"),
    "2-d values": ({"q": X[0]}, ValueError, "q: expected shape [total, heads, head_dim]"),
    "no times": ({"time_bias": BIAS}, ValueError, "q_timestamps: needed by time_bias"),
    "unsorted": ({"time_bias": BIAS, "q_timestamps": TIMES.flip(0)}, ValueError, "never decrease within a sequence"),
    "float times": ({"time_bias": BIAS, "q_timestamps": TIMES.float()}, TypeError, "int64 unix seconds"),
    "int32 times": ({"time_bias": BIAS, "q_timestamps": TIMES.int()}, TypeError, "int64 unix seconds"),
    "short times": ({"time_bias": BIAS, "q_timestamps": TIMES[:3]}, ValueError, "q_timestamps: expected shape [4]"),
    "times overflow": ({"time_bias": BIAS, "q_timestamps": TIMES << 60}, ValueError, "|t| < 2**62"),
    "times sorted by the queries alone": (
        {
            "time_bias": BIAS,
            "k_offsets": torch.tensor([0, 3, 4]),
            "q_timestamps": ONLY_BY_QUERIES,
            "k_timestamps": ONLY_BY_QUERIES,
        },
        ValueError,
        "k_timestamps: expected times that never decrease",
    ),
    "times of keys overflow": (
        {"time_bias": BIAS, "k_offsets": OFFSETS.clone(), "q_timestamps": TIMES, "k_timestamps": TIMES << 60},
        ValueError,
        "k_timestamps: expected unix seconds, |t| < 2**62",
    ),
    "table": (
        {"time_bias": replace(BIAS, table=torch.zeros(2, 106)), "q_timestamps": TIMES},
        ValueError,
        "time_bias.table: expected floats [heads, thresholds + 1] = [2, 107]",
    ),
    "thresholds": (
        {"time_bias": replace(BIAS, thresholds=BIAS.thresholds.flip(0)), "q_timestamps": TIMES},
        ValueError,
        "time_bias.thresholds: expected increasing integers",
    ),
    "float thresholds": (
        {"position_bias": PositionBias(torch.zeros(3), torch.zeros(2, 4))},
        TypeError,
        "position_bias.thresholds: expected int64",
    ),
    "half a cycle": (
        {"time_bias": replace(BIAS, periods=torch.tensor([DAY])), "q_timestamps": TIMES},
        ValueError,
        "periods, cosine and sine come together",
    ),
    "cycle shape": (
        {
            "time_bias": replace(BIAS, periods=torch.tensor([DAY]), cosine=torch.zeros(2, 2), sine=torch.zeros(2, 1)),
            "q_timestamps": TIMES,
        },
        ValueError,
        "time_bias.cosine: expected floats [heads, periods] = [2, 1]",
    ),
    "cycle of nothing": (
        {
            "time_bias": replace(BIAS, periods=torch.tensor([0]), cosine=torch.zeros(2, 1), sine=torch.zeros(2, 1)),
            "q_timestamps": TIMES,
        },
        ValueError,
        "time_bias.periods: expected seconds > 0, got [0]",
    ),
    "table elsewhere": (
        {"time_bias": replace(BIAS, table=BIAS.table.to("meta")), "q_timestamps": TIMES},
        ValueError,
        "time_bias.table: expected a tensor on cpu, got one on meta",
    ),
    "cycle elsewhere": (
        {
            "time_bias": replace(
                BIAS, periods=torch.tensor([DAY]), cosine=torch.zeros(2, 1), sine=torch.zeros(2, 1, device="meta")
            ),
            "q_timestamps": TIMES,
        },
        ValueError,
        "time_bias.sine: expected a tensor on cpu, got one on meta",
    ),
    "float periods": (
        {
            "time_bias": replace(BIAS, periods=torch.tensor([1.5]), cosine=torch.zeros(2, 1), sine=torch.zeros(2, 1)),
            "q_timestamps": TIMES,
        },
        TypeError,
        "time_bias.periods: expected int64 [P] seconds",
    ),
    "windows without groups": ({"window_size": [3, None]}, ValueError, "one window a group, and there are no groups"),
    "window": ({"window_size": (-2, 3)}, ValueError, "window_size: expected numbers of positions >= 0"),
    "negative targets": ({"num_targets": torch.tensor([0, -1])}, ValueError, "num_contexts, num_targets: expected"),
    "too many targets": (
        {"num_targets": torch.tensor([1, 2]), "num_contexts": torch.tensor([0, 2])},
        ValueError,
        "got 2 and 2 for sequence 1, which has 3 keys",
    ),
    "targets elsewhere": (
        {"num_targets": torch.tensor([1, 2]).to("meta")},
        ValueError,
        "num_targets: expected a tensor on cpu, got one on meta",
    ),
    "targets dtype": ({"num_targets": torch.tensor([1.0, 2])}, ValueError, "num_targets: expected int64 [2]"),
    "contexts shape": ({"num_contexts": torch.tensor([1])}, ValueError, "num_contexts: expected int64 [2]"),
    "group beyond": (
        {
            "groups": torch.tensor([0, 2]),
            "time_bias": replace(BIAS, table=torch.zeros(2, 2, 107)),
            "q_timestamps": TIMES,
        },
        ValueError,
        "groups: expected 0 to 1, for tables of 2 groups, got 0 to 2",
    ),
    "tables without groups": (
        {"time_bias": replace(BIAS, table=torch.zeros(2, 2, 107)), "q_timestamps": TIMES},
        ValueError,
        "time_bias.table: expected floats [heads, thresholds + 1]",
    ),
    "groups disagree": (
        {
            "groups": torch.tensor([0, 1]),
            "window_size": [3, None, 1],
            "time_bias": replace(BIAS, table=torch.zeros(2, 2, 107)),
            "q_timestamps": TIMES,
        },
        ValueError,
        "groups: expected as many tables of each bias, and windows, as groups; got [2, 3]",
    ),
    "no structure": ({"q_offsets": None}, ValueError, "q_offsets: expected offsets [batch + 1] or a plan"),
    "bias of another kind": (
        {"time_bias": (BIAS.thresholds, BIAS.table), "q_timestamps": TIMES},
        TypeError,
        "time_bias: expected TimeBias or None, got tuple",
    ),
    "positions of another kind": ({"position_bias": BIAS}, TypeError, "position_bias: expected PositionBias or None"),
    "plan of another kind": ({"plan": OFFSETS}, TypeError, "plan: expected AttentionPlan or None, got Tensor"),
    "nested values": ({"q": NESTED}, TypeError, "got a nested tensor; alure.kernels.to_jagged gives the values"),
    "sparse values": ({"k": X.to_sparse()}, TypeError, "k: expected a dense tensor"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected one of auto"),
    "native double": ({"q": X.double(), "k": X.double(), "v": X.double(), "backend": "native"}, ValueError, "float32"),
    "triton double": ({"q": X.double(), "k": X.double(), "v": X.double(), "backend": "triton"}, ValueError, "float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        pytest.fail("a kernel ran")

    for module in ("reference", "native"):
        monkeypatch.setattr(f"alure.kernels.attention.{module}.forward", reached)
    changes, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        attend(**changes)


def test_the_operator_itself_refuses_hostile_offsets() -> None:
    nothing = [None] * 10
    with pytest.raises(ValueError, match="never decrease"):
        torch.ops.alure.jagged_attention(
            X, X, X, torch.tensor([0, 9, 4]), OFFSETS, *nothing, [], 1, False, 1.0, "reference"
        )


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_a_user_does_not_see_another(backend: str, device: str) -> None:
    """Everything of user 0 changes, its times and gradients too; the other users stay the same to the bit."""
    require(backend, device)
    before = random_problem([19, 9, 1], [5, 20, 1], dtype=torch.float32).to(torch.float32, device)
    rows, columns = slice(0, 19), slice(0, 5)
    changed = {name: getattr(before, name).detach().clone() for name in ("q", "k", "v", "q_timestamps", "k_timestamps")}
    for name in ("q", "k", "v"):
        part = changed[name][rows if name == "q" else columns]
        part.mul_(-3).add_(100)
    changed["q_timestamps"][rows] -= 10**7
    changed["k_timestamps"][columns] //= 3
    after = replace(before, **{n: x.requires_grad_() if x.is_floating_point() else x for n, x in changed.items()})
    grad_out = torch.randn(29, 2, 16)
    grad_changed = grad_out.clone()
    grad_changed[rows] *= 5
    first = with_gradients(before.run(backend), before.leaves()[:3], grad_out)
    second = with_gradients(after.run(backend), after.leaves()[:3], grad_changed)
    for x, y, own in zip(first, second, (rows, rows, columns, columns), strict=True):
        assert torch.equal(x[own.stop :], y[own.stop :])
        assert not torch.equal(x[own], y[own])


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_alone_or_in_a_batch(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([3, 33, 0, 8], dtype=torch.float32).to(torch.float32, device)
    together = problem.run(backend)
    for s in range(4):
        rows = slice(int(problem.q_offsets[s]), int(problem.q_offsets[s + 1]))
        alone = replace(
            problem,
            **{name: getattr(problem, name)[rows] for name in ("q", "k", "v", "q_timestamps", "k_timestamps")},
            q_offsets=torch.tensor([0, rows.stop - rows.start], device=device),
            k_offsets=torch.tensor([0, rows.stop - rows.start], device=device),
        )
        torch.testing.assert_close(alone.run(backend), together[rows], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_same_bits_every_time(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([9, 2], dtype=torch.float32).to(torch.float32, device)
    grad_out = torch.randn(11, 2, 16)
    runs = [with_gradients(problem.run(backend), problem.leaves(), grad_out) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_every_output_is_written(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN; queries without keys, rows at tile ends and unused buckets must still be written."""
    require(backend, device)
    problem = random_problem([0, 5, 0, 33, 2], [4, 0, 0, 20, 2], dtype=torch.float32).to(torch.float32, device)
    problem = replace(problem, causal=True)

    def poisoned(make: Any) -> Any:
        def empty(*arguments: Any, **options: Any) -> torch.Tensor:
            made = make(*arguments, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    results = with_gradients(problem.run(backend), problem.leaves(), torch.ones(40, 2, 16))
    monkeypatch.undo()
    for x in results:
        assert x.isfinite().all()
    assert (results[0][:5] == 0).all()  # five queries that see no key
    assert (results[2][:4] == 0).all()  # four keys that no query sees


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_nothing(backend: str, device: str) -> None:
    require(backend, device)
    for lengths in ([], [0], [0, 0]):
        problem = random_problem(lengths, dtype=torch.float32).to(torch.float32, device)
        results = with_gradients(problem.run(backend), problem.leaves(), torch.zeros(0, 2, 16))
        assert results[0].shape == (0, 2, 16)
        assert all((x == 0).all() for x in results)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_non_contiguous_input(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([9, 4], dtype=torch.float32).to(torch.float32, device)
    packed = torch.stack([problem.q, problem.k, problem.v], dim=1).detach().requires_grad_()
    q, k, v = packed.unbind(1)
    views = replace(
        problem,
        q=q,
        k=k,
        v=v,
        q_timestamps=problem.q_timestamps.repeat_interleave(2)[::2],
        k_timestamps=problem.q_timestamps.repeat_interleave(2)[::2],
        time_table=problem.time_table.t().contiguous().t().detach().requires_grad_(),
    )
    grad_out = torch.randn(16, 2, 13).transpose(0, 2).to(device)  # channels are not contiguous either
    expected = with_gradients(problem.run(backend), problem.leaves(), grad_out)
    actual = with_gradients(views.run(backend), [packed, views.time_table], grad_out)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], torch.stack(expected[1:4], dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[2], expected[4], rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    problem = random_problem([4, 0, 1], [3, 2, 2], num_heads=2, head_dim=3)

    def attention(*leaves: torch.Tensor) -> torch.Tensor:
        names = ("q", "k", "v", "time_table", "cosine", "sine", "position_table")
        return replace(problem, **dict(zip(names, leaves, strict=True))).run("reference")

    assert torch.autograd.gradcheck(attention, problem.leaves(), fast_mode=True)


def operator_arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    q_cyclic, k_cyclic = torch.randn(*problem.q.shape[:2], 4), torch.randn(problem.k.shape[0], 4)
    return (
        *(problem.q, problem.k, problem.v, problem.q_offsets, problem.k_offsets),
        *(problem.q_timestamps, problem.k_timestamps, torch.tensor([[3, UNLIMITED, 0, 0]] * 2), None),
        *(problem.time_thresholds, problem.time_table[None].detach().requires_grad_()),
        *(problem.position_thresholds, problem.position_table[None].detach().requires_grad_()),
        *(q_cyclic.requires_grad_(), k_cyclic.requires_grad_(), [], 1, False, 0.25, backend),
    )


@pytest.mark.parametrize(("backend", "device"), [target for target in TARGETS if target.values[1] == "cpu"])
def test_opcheck(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([3, 0], num_heads=1, head_dim=4, dtype=torch.float32)
    full = operator_arguments(problem, backend)
    bare = (*full[:5], *[None] * 10, *full[15:])
    for arguments in (full, bare):
        torch.library.opcheck(torch.ops.alure.jagged_attention.default, arguments)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in full)
    out, lse = torch.ops.alure.jagged_attention(*detached)
    gradients = (torch.randn_like(out), torch.randn_like(lse))
    backward = (*gradients, *detached[:3], out, lse, *detached[3:16], *detached[18:])
    torch.library.opcheck(torch.ops.alure.jagged_attention_backward.default, backward)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiles_into_one_graph(backend: str) -> None:
    problem = random_problem([4, 7], dtype=torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(q: torch.Tensor) -> torch.Tensor:
        return replace(problem, q=q * 2).run(backend)

    out = twice(problem.q)
    torch.testing.assert_close(out, replace(problem, q=problem.q * 2).run(backend))
    out.sum().backward()
    assert problem.q.grad is not None


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_a_prepared_plan_compiles_into_one_graph(backend: str, device: str) -> None:
    require(backend, device)
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("dynamo does not trace how the interpreter is found")
    problem = random_problem([4, 7], dtype=torch.float32).to(torch.float32, device)
    plan = problem.plan()
    plan.prepare(torch.float32, problem.q.shape[2], backend=backend)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def twice(q: torch.Tensor) -> torch.Tensor:
        return replace(problem, q=q * 2).run_planned(plan, backend)

    out = twice(problem.q)
    torch.testing.assert_close(out, replace(problem, q=problem.q * 2).run(backend))
    (gradient,) = torch.autograd.grad(out.sum(), problem.q)
    (expected,) = torch.autograd.grad(replace(problem, q=problem.q * 2).run(backend).sum(), problem.q)
    torch.testing.assert_close(gradient, expected)


def test_memory_of_a_long_user_beside_many_short_ones() -> None:
    """20,000 events beside 10,000 users of 5: no padding to the longest, and no square of it."""
    lengths = torch.tensor([5] * 10_000 + [20_000])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total = int(offsets[-1])
    x = torch.randn(total, 1, 4)
    times = NOW + torch.arange(total)
    bias = TimeBias(time_thresholds(per_octave=1), torch.randn(1, 53 + 1))
    bias = replace(bias, table=torch.randn(1, bias.thresholds.numel() + 1))
    for backend in ("reference", "native"):
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            jagged_attention(
                x, x, x, offsets, q_timestamps=times, time_bias=bias, causal=True, window_size=(400, 0), backend=backend
            )
        live = peak = 0
        for event in sorted(
            (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            live += event.nbytes()
            peak = max(peak, live)
        assert peak < 512 * 2**20, f"{backend}: {peak / 2**20:.0f} MiB"


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_a_plan_gives_the_same_bits(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([9, 0, 21], [5, 3, 40], num_groups=2, dtype=torch.float32)
    problem = replace(problem, causal=True, num_targets=torch.tensor([1, 0, 4])).to(torch.float32, device)
    plan = problem.plan()
    for _ in range(2):  # the second time the plan is prepared already
        out = with_gradients(problem.run_planned(plan, backend), problem.leaves(), torch.ones(30, 2, 16))
        expected = with_gradients(problem.run(backend), problem.leaves(), torch.ones(30, 2, 16))
        assert all(torch.equal(x, y) for x, y in zip(out, expected, strict=True))


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_a_plan_serves_training_after_inference(backend: str, device: str) -> None:
    require(backend, device)
    problem = random_problem([9, 0, 21], [5, 3, 40], num_groups=2, dtype=torch.float32).to(torch.float32, device)
    plan = problem.plan()
    with torch.inference_mode():
        expected = problem.run_planned(plan, backend)
    out = problem.run_planned(plan, backend)
    assert torch.equal(out, expected)
    assert all(gradient.isfinite().all() for gradient in with_gradients(out, problem.leaves(), torch.ones_like(out)))


REFUSED_PLANS = {
    "rows": ({"q": X[:3]}, "plan: expected q and k of 4 and 4 rows, got 3 and 4"),
    "both": ({"q_offsets": OFFSETS}, "expected none of them beside it"),
    "causal": ({"causal": True}, "expected none of them beside it"),
    "thresholds": (
        {"time_bias": replace(BIAS, thresholds=BIAS.thresholds + 1)},
        "expected time_thresholds to be those",
    ),
    "periods": (
        {"time_bias": replace(BIAS, periods=torch.tensor([DAY]), cosine=torch.zeros(2, 1), sine=torch.zeros(2, 1))},
        "expected periods to be those of time_bias; make the plan with them",
    ),
    "positions": (
        {"position_bias": PositionBias(torch.tensor([0]), torch.zeros(2, 2))},
        "expected position_thresholds to be those of position_bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_refuses_what_is_not_of_the_plan(case: str) -> None:
    plan = AttentionPlan(OFFSETS, q_timestamps=TIMES, time_thresholds=BIAS.thresholds)
    changes, message = REFUSED_PLANS[case]
    with pytest.raises(ValueError, match=message):
        jagged_attention(**{"q": X, "k": X, "v": X, "plan": plan, **changes})


def test_a_plan_of_more_groups_than_a_bias_has_tables_is_refused() -> None:
    plan = AttentionPlan(OFFSETS, q_timestamps=TIMES, time_thresholds=BIAS.thresholds, groups=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="plan: it has 3 groups, expected tables for each, got 2"):
        jagged_attention(X, X, X, plan=plan, time_bias=replace(BIAS, table=torch.zeros(2, 2, 107)))


def test_a_plan_of_groups_without_a_bias_is_attention_of_its_windows() -> None:
    q = torch.randn(6, 2, 16)
    plan = AttentionPlan(torch.tensor([0, 3, 6]), groups=torch.tensor([0, 1]), window_size=[None, (0, 0)])
    out = jagged_attention(q, q, q, plan=plan)
    assert torch.equal(out[:3], jagged_attention(q[:3], q[:3], q[:3], torch.tensor([0, 3])))
    torch.testing.assert_close(out[3:], q[3:])  # each sees itself alone


def test_a_plan_refuses_hostile_arguments() -> None:
    with pytest.raises(ValueError, match=re.escape("q_offsets[1] = 5 > q_offsets[2] = 4")):
        AttentionPlan(torch.tensor([0, 5, 4]))
    with pytest.raises(ValueError, match="never decrease within a sequence"):
        AttentionPlan(OFFSETS, q_timestamps=TIMES.flip(0))
    with pytest.raises(ValueError, match=re.escape("q_timestamps: expected shape [4], one a row, got [3]")):
        AttentionPlan(OFFSETS, q_timestamps=TIMES[:3])
    with pytest.raises(ValueError, match="q_timestamps: needed by time_thresholds"):
        AttentionPlan(OFFSETS, time_thresholds=time_thresholds())
    with pytest.raises(ValueError, match="plan: expected one on cpu, got one on meta"):
        jagged_attention(X, X, X, plan=AttentionPlan(OFFSETS).moved(lambda x: x.to("meta")))
    with pytest.raises(ValueError, match="periods: expected seconds > 0"):
        AttentionPlan(OFFSETS, q_timestamps=TIMES, periods=torch.tensor([DAY, 0]))
    with pytest.raises(ValueError, match="groups: expected 0 to 1"):
        AttentionPlan(OFFSETS, groups=torch.tensor([0, 2]), window_size=[None, 3])


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_log_sum_exp_and_its_gradient(backend: str, device: str) -> None:
    require(backend, device)
    exact = random_problem([6, 3], [4, 0], num_heads=1, head_dim=4).to(torch.float64)
    given = exact.to(torch.float32, device)
    weights = torch.randn(1, 9, dtype=torch.float64)
    found = []
    for problem, own in ((exact, "reference"), (given, backend)):
        arguments = (problem.q, problem.k, problem.v, problem.q_offsets, problem.k_offsets)
        out, lse = jagged_attention(*arguments, return_lse=True, backend=own)
        total = out.sum() + (lse[:, :6] * weights[:, :6].to(lse)).sum()  # the last three see nothing
        found.append([lse, *torch.autograd.grad(total, [problem.q, problem.k, problem.v])])
    logits = torch.einsum("ihd,jhd->hij", exact.q[:6], exact.k) / 2
    torch.testing.assert_close(found[0][0][:, :6], logits.logsumexp(-1))
    assert (found[0][0][:, 6:] == -torch.inf).all()
    for got, want in zip(*found[::-1], strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-5)


def test_type_checkers_see_the_keywords_of_the_signature() -> None:
    """Overloads that took any keyword let misspelt ones through."""
    parameters = inspect.signature(jagged_attention).parameters
    keywords = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    returned = keywords.pop("return_lse")
    assert AttentionOptions.__annotations__ == {name: p.annotation for name, p in keywords.items()}
    positional = [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    for overload, value in zip(get_overloads(jagged_attention), (False, True), strict=True):
        *given, lse, options = inspect.signature(overload).parameters.values()
        assert given == positional
        assert (lse.name, lse.annotation, options.annotation) == (
            returned.name, Literal[value], Unpack[AttentionOptions]
        )  # fmt: skip
