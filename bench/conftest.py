"""What the suites share: sizes by --quick, and `race`, which times one implementation of one case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alure.engine.profiling import matrix_rate


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, fewer rounds")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", name="matrix_rate")
def measured_matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large float32 matrix product here: the limit that shares are taken of."""
    return matrix_rate(device)


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
