"""What the suites share: sizes by --quick, and `race`, which times one implementation of one case."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, fewer rounds")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large float32 matrix product here, best of ten: the limit that shares are taken of."""
    a = torch.randn(2048, 2048, device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


@pytest.fixture
def race(benchmark: Any, quick: bool, device: torch.device, matrix_rate: float) -> Callable[..., None]:
    """`race(suite, case, implementation, run, ours=…, flops=…)`: times `run` after a warm-up round."""

    def timed(
        suite: str, case: str, implementation: str, run: Callable[[], Any], *, ours: bool, flops: float | None = None
    ) -> None:
        def synchronised() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.extra_info.update(
            suite=suite, case=case, implementation=implementation, ours=ours, flops=flops, matrix_rate=matrix_rate
        )
        benchmark.pedantic(synchronised, rounds=3 if quick else 7, iterations=1, warmup_rounds=1)

    return timed
