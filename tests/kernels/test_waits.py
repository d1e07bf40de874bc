"""What is prepared never waits for the device: it only launches."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.attention import Problem, random_problem
from support.encoding import Problem as Encoding
from support.encoding import random_problem as random_encoding
from support.tolerance import require
from support.waits import DEVICE, DeviceWaits, Watch, launch_only
from torch import Tensor

from alure.kernels import TimeBias, compress, compress_int8, jagged_attention
from alure.kernels.attention import AttentionPlan, PositionBias
from alure.kernels.compression import DotLinearCompression, InteractionCompression, InteractionLayer, InteractionPlan
from alure.kernels.encoding import CheckedColumns, EventColumns, EventEncoder, encode_columns


def mover(to: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same copy for the same tensor."""
    known: dict[int, Tensor] = {}
    return lambda x: known.setdefault(id(x), to(x))


def problem_of(cross: bool) -> Problem:
    problem = random_problem([9, 0, 21], [5, 3, 40] if cross else None, num_groups=2, dtype=torch.float32)
    return replace(problem, causal=True, num_targets=torch.tensor([1, 0, 4]))


def attend(problem: Problem, plan: AttentionPlan, device: torch.device) -> Tensor:
    assert plan.time_thresholds is not None
    assert plan.position_thresholds is not None
    q, k, v, *tables = (
        x.detach().to(device)
        for x in (
            problem.q, problem.k, problem.v, problem.time_table, problem.cosine, problem.sine, problem.position_table,
        )
    )  # fmt: skip
    bias = TimeBias(plan.time_thresholds, tables[0], plan.periods, *tables[1:3])
    position_bias = PositionBias(plan.position_thresholds, tables[3])
    with Watch():
        return jagged_attention(q, k, v, plan=plan, time_bias=bias, position_bias=position_bias)


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "put by a mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device=DEVICE)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x.clone()),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.to(torch.int64)),
    "to the host": lambda x: x.cpu(),
    "to the host, as a type": lambda x: x.to("cpu", torch.float64),
    "to the device": lambda x: torch.ones(4).to(DEVICE),
    "a list": lambda x: torch.tensor([1, 2], device=DEVICE),
    "another list": lambda x: x.new_tensor([1, 2]),
    "copy": lambda x: x.copy_(torch.ones(4)),
    "index of the host": lambda x: x[torch.arange(2)],
}


@pytest.mark.parametrize("case", WAITING)
def test_the_watch_sees(case: str) -> None:
    with pytest.raises(DeviceWaits), Watch():
        WAITING[case](torch.ones(4, device=DEVICE))


def test_the_watch_lets_launches_pass_and_counts_them() -> None:
    with Watch() as watch:
        x = torch.zeros(3, 4, device=DEVICE)
        y = torch.where(x > 0, -1, x.t().reshape(3, 4) @ x.mT @ x)
        torch.repeat_interleave(y, torch.ones(3, dtype=torch.int64, device=DEVICE), 0, output_size=3)
    expected = {"zeros", "gt", "clone", "mm", "where", "ones", "repeat_interleave", "index_select"}
    assert watch.launches == {name: 1 + (name == "mm") for name in expected}


@pytest.mark.parametrize("cross", [False, True])
def test_attention_of_a_plan_made_on_the_host_only_launches(monkeypatch: pytest.MonkeyPatch, cross: bool) -> None:
    require("triton", "cpu")
    launches, problem = launch_only(monkeypatch), problem_of(cross)
    with torch.no_grad():
        plan = problem.plan()
        plan.prepare(torch.float32, problem.q.shape[2], DEVICE)
        moved = plan.moved(mover(lambda x: x.to(DEVICE)))
        assert attend(problem, moved, DEVICE).shape == problem.q.shape
    assert launches == {"cell_values_kernel": 1, "forward_kernel": 1}


def test_a_plan_that_is_not_prepared_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton", "cpu")
    launch_only(monkeypatch)
    problem = problem_of(cross=False)
    with torch.no_grad(), pytest.raises(DeviceWaits, match="tolist"):
        attend(problem, problem.plan(), torch.device("cpu"))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_moved_plan_gives_the_same_bits(gradients: bool) -> None:
    require("triton", "cpu")
    problem = problem_of(cross=True)
    with torch.set_grad_enabled(gradients):
        plan = problem.plan()
        plan.prepare(torch.float32, problem.q.shape[2], backend="triton")
        moved = plan.moved(mover(Tensor.clone))
        expected, found = problem.run_planned(plan, "triton"), problem.run_planned(moved, "triton")
        assert torch.equal(expected, problem.run("triton"))
    assert torch.equal(found, expected)
    if gradients:
        found.sum().backward()
        assert problem.q.grad is not None


def test_periods_are_checked_by_the_plan_and_are_those_of_the_bias() -> None:
    problem = problem_of(cross=False)
    with pytest.raises(ValueError, match="periods: expected seconds > 0"):
        replace(problem, periods=torch.tensor([0, 5])).plan()
    plan = problem.plan()
    with pytest.raises(ValueError, match="plan: expected periods to be those of time_bias"):
        replace(problem, periods=torch.tensor([7, 5])).run_planned(plan, "reference")


def checked(p: Encoding, **changes: Tensor) -> CheckedColumns:
    columns = {name: getattr(p, name) for name in ("ids", "offsets", "timestamps", "reference_times", "counts")}
    columns |= {"utc_offsets": p.utc_offsets, **changes}
    return CheckedColumns(**columns, num_rows=len(p.table), periods=p.encoder.periods)


def test_checked_columns_only_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton", "cpu")
    launches, p = launch_only(monkeypatch), random_encoding([4, 0, 9]).to(torch.float32)
    move = mover(lambda x: x.detach().to(DEVICE))
    columns = checked(p).moved(move)
    encoder = EventEncoder(**{name: move(x) if isinstance(x, Tensor) else x for name, x in vars(p.encoder).items()})
    assert p.dense is not None
    table, dense = move(p.table), move(p.dense)
    with torch.no_grad(), Watch():
        found = encode_columns(columns, table, encoder, dense=dense)
    assert found.shape == (13, len(p.encoder.bias))
    assert launches == {"encode_events_kernel": 1}


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_checked_columns_give_the_same_bits(backend: str) -> None:
    require(backend, "cpu")
    p = random_encoding([4, 0, 9]).to(torch.float32)
    assert torch.equal(encode_columns(checked(p), p.table, p.encoder, dense=p.dense, backend=backend), p.run(backend))


WRONG_COLUMNS: dict[str, tuple[dict[str, Tensor], str]] = {
    "ids": ({"ids": torch.full((13, 3), 1 << 40)}, "ids: expected values from -1 to"),
    "offsets": ({"offsets": torch.tensor([0, 4, 3, 13])}, "offsets that never decrease"),
    "timestamps": ({"timestamps": torch.arange(13).flip(0)}, "times that never decrease"),
    "counts": ({"counts": torch.full((13,), -1)}, "counts: expected values from 0"),
    "shape": ({"reference_times": torch.zeros(2, dtype=torch.int64)}, "reference_times: expected shape"),
    "dtype": ({"counts": torch.zeros(13)}, "counts: expected torch.int64"),
}


@pytest.mark.parametrize("case", WRONG_COLUMNS)
def test_columns_are_checked_before_they_are_trusted(case: str) -> None:
    changes, message = WRONG_COLUMNS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        checked(random_encoding([4, 0, 9], attributes=3), **changes)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_columns_of_another_table_or_encoder_are_checked_anew(backend: str) -> None:
    require(backend, "cpu")
    p = random_encoding([4, 0, 9]).to(torch.float32)
    columns, few = checked(p, ids=torch.full_like(p.ids, len(p.table) - 1)), p.table[:-1]
    with pytest.raises(ValueError, match="ids: expected values from -1"):
        encode_columns(columns, few, p.encoder, dense=p.dense, backend=backend)
    zero = replace(p.encoder, periods=torch.zeros_like(p.encoder.periods))
    with pytest.raises(ValueError, match="periods: expected values from 1"):
        encode_columns(columns, p.table, zero, dense=p.dense, backend=backend)
    unchecked = EventColumns(columns.ids, torch.tensor([0, 5, 4, 13]), *list(vars(columns).values())[2:7])
    with pytest.raises(ValueError, match="offsets that never decrease"):
        encode_columns(unchecked, p.table, p.encoder, dense=p.dense, backend=backend)


def compression_of(kind: str, x: Tensor) -> DotLinearCompression | InteractionCompression:
    (_, n, d), generator = x.shape, torch.Generator().manual_seed(0)
    if kind == "dot_linear":
        return DotLinearCompression.initialize(n, d, 2, 4, 8, generator)
    return InteractionCompression.initialize(d, 2, 2, num_layers=3, generator=generator)


def on_device(c: DotLinearCompression | InteractionCompression) -> DotLinearCompression | InteractionCompression:
    if isinstance(c, DotLinearCompression):
        return DotLinearCompression(*(x.to(DEVICE) for x in c.tensors()))
    layers = (InteractionLayer(**{name: x.to(DEVICE) for name, x in vars(layer).items()}) for layer in c.layers)
    return InteractionCompression(c.seeds.to(DEVICE), tuple(layers), c.num_heads)


@pytest.mark.parametrize("d", [16, 512])  # 512: wider than a head, so keys are projected
@pytest.mark.parametrize("kind", ["dot_linear", "interaction"])
def test_compression_only_launches(monkeypatch: pytest.MonkeyPatch, kind: str, d: int) -> None:
    require("triton", "cpu")
    launches, x = launch_only(monkeypatch), torch.randn(5, 6, d)
    compression, plan = on_device(compression_of(kind, x)), None
    with torch.no_grad():
        if isinstance(compression, InteractionCompression):
            plan = InteractionPlan.of(5, 6, compression).moved(mover(lambda x: x.to(DEVICE)))
        x = x.to(DEVICE)
        with Watch():
            compress(x, compression, plan=plan)
            compress_int8(x, compression, plan=plan)
    assert launches["forward_kernel"] == (6 if plan else 0)


def test_a_compression_plan_gives_the_same_bits_and_is_of_its_batch() -> None:
    x = torch.randn(5, 6, 16)
    compression = compression_of("interaction", x)
    assert isinstance(compression, InteractionCompression)
    plan = InteractionPlan.of(5, 6, compression)
    assert torch.equal(compress(x, compression, plan=plan), compress(x, compression))
    for found, expected in zip(compress_int8(x, compression, plan=plan), compress_int8(x, compression)):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="plan: expected one of 4 users of 6 vectors, got 5 of 6"):
        compress(x[:4], compression, plan=plan)
    with pytest.raises(ValueError, match="plan: the dot-linear form has none"):
        compress(x, compression_of("dot_linear", x), plan=plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_cuda_sees_no_wait() -> None:
    problem, device = problem_of(cross=True), torch.device("cuda")
    with torch.no_grad():
        plan = problem.plan()
        plan.prepare(torch.float32, problem.q.shape[2], device)
        moved = plan.moved(mover(lambda x: x.to(device)))
        there = problem.to(torch.float32, "cuda")
        expected = there.run("triton")  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = attend(there, moved, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
