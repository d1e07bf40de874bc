"""What is prepared never waits for the device: it only launches."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.attention import Problem, random_problem
from support.tolerance import require
from support.waits import DEVICE, DeviceWaits, Watch, launch_only
from torch import Tensor

from alure.kernels import TimeBias, jagged_attention
from alure.kernels.attention import AttentionPlan, PositionBias


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


@pytest.mark.parametrize("cross", [False, True])
def test_attention_of_a_plan_made_on_the_host_only_launches(monkeypatch: pytest.MonkeyPatch, cross: bool) -> None:
    require("triton", "cpu")
    launches, problem = launch_only(monkeypatch), problem_of(cross)
    with torch.no_grad():
        plan = problem.plan()
        plan.prepare(torch.float32, problem.q.shape[2], DEVICE)
        moved = plan.moved(mover(lambda x: x.to(DEVICE)))
        assert attend(problem, moved, DEVICE).shape == problem.q.shape
    assert launches == {"forward_kernel": 1}


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_cuda_sees_no_wait() -> None:
    problem, device = problem_of(cross=True), torch.device("cuda")
    with torch.no_grad():
        plan = problem.plan()
        plan.prepare(torch.float32, problem.q.shape[2], device)
        moved = plan.moved(mover(lambda x: x.to(device)))
        on_device = problem.to(torch.float32, "cuda")
        expected = on_device.run("triton")  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = attend(on_device, moved, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
