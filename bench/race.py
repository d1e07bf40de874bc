"""A race: the implementations of one case, each checked before it is timed, then timed in turn, round after round.

Shared machines drift, so one after the other would compare two different machines. A round times every implementation
once; a slow one sits out rounds, evenly, so that it does not spend the time of the others. pytest-benchmark's record of
a contest is of the rounds; the laps are in its extra_info.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alure.bench.clock import Clock

LEAST_LAPS, MOST_LAPS = 3, 25  # one lap where even that is longer than the time of an implementation
# Largest |error| over the largest |value| of the reference, which computes in float32 from the same inputs.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class LeftOut(Exception):
    """Why an implementation does not take part in a case."""


@dataclass(frozen=True)
class Entry:
    """One implementation. `prepare` does what is not timed and returns (run, check): the call that is timed, and what
    is wrong with its result, "" for nothing. It raises LeftOut where the implementation cannot take part. `facts` go
    into its row of the report, beside the contest's.
    """

    name: str
    prepare: Callable[[], tuple[Callable[[], Any], Callable[[Any], str]]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.name.startswith("alure")

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """The errors that mean "not this case". PyTorch refuses by RuntimeError; ours must not fail so."""
        refusals = (LeftOut, TypeError, ValueError, NotImplementedError)
        return refusals if self.ours else (*refusals, RuntimeError)


@dataclass(frozen=True)
class Contest:
    """A case of a suite: flops and moved (bytes read and written once) are the least that the work needs."""

    suite: str
    case: str
    entries: Sequence[Entry]
    flops: float = 0.0
    moved: float = 0.0
    dtype: torch.dtype = torch.float32
    facts: dict[str, Any] = field(default_factory=dict)


def difference(result: Tensor, expected: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a result in `dtype`; nothing where it is within TOLERANCE."""
    error = (result.to(expected.dtype) - expected).abs().max().item()
    allowed = TOLERANCE[dtype] * expected.abs().max().item()
    return "" if error <= allowed else f"off the reference by {error:.2e}, {allowed:.2e} is allowed"


def forward_entry(name: str, call: Callable[[], Tensor], expected: Tensor, dtype: torch.dtype) -> Entry:
    """An implementation whose call returns one tensor."""
    return Entry(name, lambda: (call, lambda found: difference(found, expected, dtype)))


def backward_entry(
    name: str,
    call: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    grad_out: Tensor,
    expected: Sequence[Tensor],
    dtype: torch.dtype,
) -> Entry:
    """The same, forward and backward: the gradients of `inputs`, which require them."""

    def check(found: Sequence[Tensor]) -> str:
        problems = [difference(got, want, dtype) for got, want in zip(found, expected)]
        return "; ".join(f"gradient {i}: {problem}" for i, problem in enumerate(problems) if problem)

    return Entry(name, lambda: (lambda: torch.autograd.grad(call(), inputs, grad_out), check))


class Race:
    """Prepares and checks the entries of a contest, then `round` times them; `results` tells the laps in seconds."""

    def __init__(self, contest: Contest, clock: Clock, seconds: float) -> None:
        self.contest, self.clock = contest, clock
        self.left_out: dict[str, str] = {}
        self.wrong: list[str] = []
        self.peaks: dict[str, int | None] = {}
        self.laps: dict[str, list[float]] = {}
        self._runs: dict[str, Callable[[], Any]] = {}
        self._planned: dict[str, int] = {}
        self._rounds_done = 0
        times = {entry.name: elapsed for entry in contest.entries if (elapsed := self._qualify(entry)) is not None}
        for name, elapsed in times.items():
            self._planned[name] = _laps(seconds / len(times), elapsed)

    @property
    def rounds(self) -> int:
        return max(self._planned.values(), default=0)

    def round(self) -> None:
        """Times every implementation whose turn it is, once."""
        done, rounds = self._rounds_done, self.rounds
        for name, run in self._runs.items():
            planned = self._planned[name]
            if (done + 1) * planned // rounds > done * planned // rounds:
                self.laps[name].append(self.clock.lap(run))
        self._rounds_done += 1

    def results(self) -> list[dict[str, Any]]:
        entries = {entry.name: entry for entry in self.contest.entries}
        return [
            {
                "implementation": name,
                "ours": entries[name].ours,
                "laps_s": laps,
                "peak_bytes": self.peaks[name],
                "facts": entries[name].facts,
            }
            for name, laps in self.laps.items()
        ]

    def _qualify(self, entry: Entry) -> float | None:
        """Seconds of a run, None where the entry is left out. The first run compiles and is checked, the second tells
        memory and time.
        """
        try:
            run, check = entry.prepare()
            problem = check(run())
        except entry.refusals as error:
            self.left_out[entry.name] = _first_line(error)
            return None
        if problem:
            self.left_out[entry.name] = problem
            self.wrong.append(f"{entry.name}: {problem}")
            return None
        self.peaks[entry.name], elapsed = self.clock.peak(run)
        self._runs[entry.name] = run
        self.laps[entry.name] = []
        return elapsed


def _laps(seconds: float, elapsed: float) -> int:
    """Laps that fit into `seconds`, one where none does."""
    return min(MOST_LAPS, max(LEAST_LAPS, int(seconds / elapsed))) if elapsed < seconds else 1


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
