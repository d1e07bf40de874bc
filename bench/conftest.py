"""What the suites share: the options, the measured limits of the device, and `race`, which times one contest."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alure.bench.clock import Clock
from alure.bench.race import Contest, Race
from alure.engine.limits import copy_rate, matrix_limit

SECONDS, QUICK_SECONDS = 8.0, 1.0  # of laps a contest, all implementations together


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small sizes, fewer rounds")
    parser.addoption("--case", help="only the cases whose name contains this")
    parser.addoption("--minutes", type=float, help="time for all suites together")
    parser.addoption("--contests", type=Path, help="a file that takes every contest, a JSON line, once it is over")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--case")
    if wanted:
        chosen = [item for item in items if wanted.lower() in item.name.lower()]
        if not chosen:
            names = "\n  ".join(item.name for item in items)
            raise pytest.UsageError(f"no case contains {wanted!r}; the cases are\n  {names}")
        items[:] = chosen


class Schedule:
    """Seconds of laps for a contest. --minutes are shared by the suites as they have contests, so that none starves;
    half of a contest's share goes into laps, and what comes after the end of its suite's share is skipped.
    """

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        minutes = config.getoption("--minutes")
        self.most = QUICK_SECONDS if config.getoption("--quick") else SECONDS
        self.seconds_in_all = None if minutes is None else 60.0 * minutes
        self.began = time.monotonic()
        self.items = items
        self.last_of = {item.path: index for index, item in enumerate(items)}  # suite -> its last contest

    def seconds(self, item: pytest.Item) -> float:
        if self.seconds_in_all is None:
            return self.most
        last = self.last_of[item.path]
        left = self.began + self.seconds_in_all * (last + 1) / len(self.items) - time.monotonic()
        if left <= 0:
            pytest.skip("no time left of --minutes")
        return min(self.most, left / (last + 1 - self.items.index(item)) / 2)


_SCHEDULE = pytest.StashKey[Schedule]()


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[_SCHEDULE] = Schedule(session.config, session.items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before what a contest needs is made, which can take longer than the contest."""
    item.config.stash[_SCHEDULE].seconds(item)


@pytest.fixture(scope="session")
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.config.stash[_SCHEDULE]


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def clock(device: torch.device) -> Clock:
    return Clock(device)


@pytest.fixture(scope="session")
def limits(device: torch.device, clock: Clock) -> Callable[[torch.dtype], dict[str, float]]:
    """Measured limits that shares are taken of: FLOP/s of a large matrix product of a dtype, bytes/s of a copy.

    Measured anew for every contest: the report takes the best so far, for a shared machine may be busy at any one.
    """

    def of(dtype: torch.dtype) -> dict[str, float]:
        return {"matrix_rate": matrix_limit(device, dtype, clock.lap), "copy_rate": copy_rate(device, clock.lap)}

    return of


@pytest.fixture
def race(
    benchmark: Any,
    request: pytest.FixtureRequest,
    schedule: Schedule,
    clock: Clock,
    limits: Callable[[torch.dtype], dict[str, float]],
) -> Callable[[Contest], None]:
    """`race(contest)`: a round of pytest-benchmark is a lap of everyone. What they took is written once it is known:
    whatever happens to the contests after it, it is kept.
    """

    def run(contest: Contest) -> None:
        racing = Race(contest, clock, schedule.seconds(request.node))
        measured = limits(contest.dtype)
        if not racing.rounds:
            pytest.skip("; ".join(f"{name}: {reason}" for name, reason in racing.left_out.items()))
        benchmark.pedantic(racing.round, rounds=racing.rounds, iterations=1)
        info = {
            "suite": contest.suite,
            "case": contest.case,
            "dtype": str(contest.dtype).removeprefix("torch."),
            "facts": contest.facts | {"clock": clock.kind},
            "flops": contest.flops,
            "moved": contest.moved,
            **measured,
            "left_out": racing.left_out,
            "results": racing.results(),
        }
        contests = request.config.getoption("--contests")
        if contests is not None:
            with contests.open("a") as file:
                file.write(json.dumps(info) + "\n")
        assert not racing.wrong, racing.wrong

    return run
