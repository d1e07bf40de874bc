"""`alure tune`: the fastest tiles and launch options of the attention kernels on this GPU, found by trying.

Candidates are compiled and run once in processes of their own, all cores at a time, so that one that breaks its process
breaks nothing else; then they are timed one after the other, each checked against the untuned kernel.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alure.bench.clock import Clock
from alure.bench.histories import Histories
from alure.bench.usage import Parser, refuse
from alure.kernels import AttentionPlan, TimeBias, jagged_attention
from alure.kernels.attention.tuned import (
    DTYPES,
    HEAD_DIMS,
    Config,
    Configs,
    read_tuned,
    tuned,
    tuned_path,
    write_tuned,
)

TOKENS = 1 << 17
FEW_TOKENS = 1 << 13  # of a candidate that is compiled: the same kernel
CANDIDATES: dict[str, list[Config]] = {
    "forward": [
        *(Config(128, 64, warps, stages) for warps in (8, 4) for stages in (2, 3, 4)),
        *(Config(128, 64, 8, stages, 128) for stages in (2, 3)),  # room for two blocks a processor, for some spills
        *(Config(128, 128, 8, stages) for stages in (2, 3)),
        *(Config(128, 32, warps, 3) for warps in (8, 4)),
        *(Config(64, 64, 4, stages) for stages in (2, 3)),
        Config(64, 128, 4, 2),
        Config(64, 32, 4, 3),
    ],
    "dq": [
        *(Config(128, 64, 8, stages) for stages in (1, 2, 3)),
        Config(128, 64, 8, 2, 128),
        *(Config(128, 32, warps, 2) for warps in (8, 4)),
        *(Config(64, 64, 4, stages) for stages in (1, 2)),
        *(Config(64, 32, 4, stages) for stages in (1, 2)),
        Config(64, 128, 8, 1),
    ],
    "dkdv": [
        *(Config(32, 128, 8, stages) for stages in (1, 2, 3)),
        *(Config(64, 128, 8, stages) for stages in (1, 2)),
        *(Config(32, 64, 4, stages) for stages in (1, 2)),
        *(Config(64, 64, 4, stages) for stages in (1, 2)),
        Config(16, 128, 8, 2),
    ],
}
WORTH = 0.98  # of the untuned time; what is not below is noise
LAPS, LEAST_SECONDS = 7, 0.1


class Trial:
    """Attention with a time bias over lognormal histories, forward or both passes, with any tiles."""

    def __init__(self, dtype: torch.dtype, head_dim: int, device: torch.device, tokens: int = TOKENS) -> None:
        self.histories = Histories("lognormal", tokens, head_dim, dtype, device)
        self.leaves = [x.detach().requires_grad_() for x in (*self.histories.qkv, self.histories.bias.table)]
        self.key, self.device = (dtype, head_dim), device

    def results(self, configs: Configs, kernel: str) -> Callable[[], Sequence[Tensor]]:
        """A call that runs what `kernel` is part of: the forward alone, or both passes."""
        h = self.histories
        tuned(self.device)[self.key] = configs
        plan = AttentionPlan(h.offsets, q_timestamps=h.timestamps, time_thresholds=h.bias.thresholds)

        def attend() -> Tensor:
            q, k, v, table = self.leaves
            bias = TimeBias(h.bias.thresholds, table)
            return jagged_attention(q, k, v, plan=plan, time_bias=bias, backend="triton")

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [attend()]

        def both() -> Sequence[Tensor]:
            return torch.autograd.grad(attend(), self.leaves, h.grad_out)

        return forward if kernel == "forward" else both


class Job(NamedTuple):
    """A candidate for one kernel; the other kernels as they are."""

    dtype: str
    head_dim: int
    kernel: str
    configs: Configs
    tokens: int = FEW_TOKENS

    def trial(self, device: torch.device) -> Trial:
        return Trial(DTYPES[self.dtype], self.head_dim, device, self.tokens)

    @property
    def config(self) -> Config:
        return getattr(self.configs, self.kernel)


def runs(job: Job) -> tuple[Job, str]:
    """Compiles and runs it once: (it, why it does not run)."""
    from triton import TritonError

    device = current_device()
    try:
        job.trial(device).results(job.configs, job.kernel)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (TritonError, RuntimeError, ValueError) as error:  # too many registers, too much memory, no such tiles
        return job, str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
    return job, ""


def that_run(jobs: Sequence[Job], seconds: float, say: Callable[[str], None]) -> list[Job]:
    """Those that run, of those that do so in time; in the order of `jobs`."""
    started, found = time.monotonic(), set()
    deadline = started + seconds
    # forked from a process that has imported all this: to import it takes as long as to compile
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alure.bench.tune", "alure.kernels.attention.kernel"])
    with context.Pool(min(os.cpu_count() or 1, len(jobs)), maxtasksperchild=1) as pool:  # ends by terminating them
        answers = pool.imap_unordered(runs, jobs)
        for done in range(1, len(jobs) + 1):
            try:
                job, problem = answers.next(timeout=max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                say(f"{len(jobs) - done + 1} of {len(jobs)} did not compile in {seconds:.0f} s; give more --minutes")
                break
            if problem:
                say(f"{name_of(job)} does not run: {problem}")
            else:
                found.add(job)
            if done % 10 == 0:
                left = (len(jobs) - done) * (time.monotonic() - started) / done
                say(f"{done} of {len(jobs)} compiled, about {left:.0f} s to go")
    return [job for job in jobs if job in found]


def seconds_of(call: Callable[[], object], clock: Clock) -> float:
    """The median of some laps."""
    call()
    laps: list[float] = []
    while len(laps) < LAPS or sum(laps) < LEAST_SECONDS:
        laps.append(clock.lap(call))
    return statistics.median(laps)


def choose(trial: Trial, untuned: Configs, jobs: Sequence[Job], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Finds the fastest of `jobs`, kernel after kernel, and leaves them in `tuned`. What was found for each kernel."""
    clock, best = Clock(trial.device), untuned
    for kernel in Configs._fields:
        call = trial.results(best, kernel)
        expected = call()
        before = best
        fastest = base = seconds_of(call, clock)
        for job in jobs:
            if job.kernel != kernel:
                continue
            configs = before._replace(**{kernel: job.config})
            call = trial.results(configs, kernel)
            if not all(map(agree, call(), expected)):
                say(f"{name_of(job)} gives other results and is left out")
                continue
            seconds = seconds_of(call, clock)
            if seconds < fastest and seconds < base * WORTH:
                fastest, best = seconds, configs
        tuned(trial.device)[trial.key] = best
        chosen = getattr(best, kernel)
        gain = f"{base / fastest:.2f} times as fast" if best is not before else "nothing better"
        say(f"  {kernel:<8} {base * 1e3:8.3f} ms, now {fastest * 1e3:8.3f}, {gain}: {text(chosen)}")
        yield {"kernel": kernel, "untuned_seconds": base, "seconds": fastest, "config": list(chosen)}


def agree(x: Tensor, y: Tensor) -> bool:
    """Up to what another order of sums changes."""
    return bool((x.double() - y.double()).abs().max() <= 0.02 * y.double().abs().max())


def delete_broken(path: Path, device_name: str, say: Callable[[str], None]) -> None:
    """Whoever reads a broken file fails, this process too, and is told to tune again."""
    try:
        read_tuned(path, device_name)
    except ValueError as error:
        say(f"{error}: deleted")
        path.unlink()


def name_of(job: Job) -> str:
    return f"{job.kernel} of {job.dtype} {job.head_dim}, {text(job.config)}"


def text(config: Config) -> str:
    registers = f", {config.maxnreg} registers" if config.maxnreg else ""
    return f"{config.block_m} × {config.block_n}, {config.num_warps} warps, {config.num_stages} stages{registers}"


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def main() -> int:
    parser = Parser(prog="alure tune")
    parser.add_argument("--head-dim", type=int, action="append", choices=HEAD_DIMS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return refuse("alure tune", "needs a CUDA device, and there is none; the CPU's kernels need no tuning")
    from alure.kernels.attention.kernel_configs import untuned_configs

    def say(line: str) -> None:
        print(line, flush=True)

    device = current_device()
    device_name = torch.cuda.get_device_name(device)
    path = tuned_path(device_name)
    delete_broken(path, device_name, say)
    kinds = [(dtype, head_dim) for dtype in options.dtype or ["bfloat16"] for head_dim in options.head_dim or [64, 128]]
    untuned = {(dtype, head_dim): untuned_configs(DTYPES[dtype], head_dim, device) for dtype, head_dim in kinds}
    jobs = [
        Job(*kind, kernel, of._replace(**{kernel: config}))
        for kernel in Configs._fields
        for kind, of in untuned.items()
        for config in CANDIDATES[kernel]
        if config != getattr(of, kernel)
    ]
    say(f"{device_name}: compiling {len(jobs)} candidates on {os.cpu_count()} cores")
    usable = that_run(jobs, options.minutes * 60, say)
    results = []
    for kind, of in untuned.items():
        dtype, head_dim = kind
        say(f"{dtype}, head_dim {head_dim}")
        trial = Trial(DTYPES[dtype], head_dim, device)
        mine = [job for job in usable if (job.dtype, job.head_dim) == kind]
        for found in choose(trial, of, mine, say):
            results.append({"dtype": dtype, "head_dim": head_dim, **found})
            write_tuned(path, device_name, tuned(device))  # who is stopped keeps what was found
    say(f"written to {path}; the kernels of processes that start from now on read it")
    if options.json:
        say(json.dumps({"device": device_name, "path": str(path), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
