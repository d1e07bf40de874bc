"""`alure profile`: where a stage's time goes, as a trace for Perfetto and as a table beside the roofline."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from alure.engine.config import RefreshConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.limits import copy_rate, matrix_limit
from alure.engine.model import UserModel
from alure.engine.ranges import stage
from alure.engine.refresh.embedder import Embedder, Snapshot, Work, resolve_precision
from alure.engine.roofline import TIMED, Least, LeastWork

ROWS = 12


def profile_refresh(model_path: Path, events_path: Path, out: Path, num_users: int = 2048) -> dict[str, Any]:
    """Embed `num_users` users under the profiler, batched as a refresh does; writes a Chrome trace to `out`.

    The result holds users/s, the model's share of the matrix rate, the share of the time of each range (ranges are
    inside one another), and of the operators that took most: their least FLOPs and bytes, which limit these reach
    first, and the share of it that was reached. The limits, a matrix product's FLOP/s and a copy's bytes/s, are
    measured here; what stays in the caches may go beyond a copy. Operators are timed in a second pass.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    events = Events.open(events_path)
    if not events.manifest.num_users:
        raise InputError(f"profile: {events_path} has no users")
    config = RefreshConfig(precision=resolve_precision("auto", device))
    snapshot = Snapshot("", events.manifest.last_timestamp, "", None, config)
    embedder = Embedder(UserModel.load(model_path), events, snapshot, device)
    users = np.sort(np.random.default_rng(0).permutation(events.manifest.num_users)[:num_users])
    tokens = events.num_events(users=users)
    embedder.embed(users[:64], tokens[:64], Work().add)  # warm-up
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as trace, stage("refresh", record_function):
        started = time.perf_counter()
        _, work = embedder.embed(users, tokens, Work().add)
        seconds = time.perf_counter() - started
    out.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(out))
    with profile(activities=activities) as timed, LeastWork() as least:
        embedder.embed(users, tokens, Work().add)
    limits = matrix_limit(device, embedder.model.dtype, seconds=2.0), copy_rate(device)
    return {
        "trace": str(out),
        "device": str(device),
        "precision": config.precision,
        "users": len(users),
        "tokens": work.tokens,
        "batches": work.batches,
        "seconds": seconds,
        "users_per_second": len(users) / seconds,
        "gflop": work.flops / 1e9,
        "share_of_matrix_rate": work.flops / seconds / limits[0],
        "measured_matrix_tflops": limits[0] / 1e12,
        "measured_copy_gbytes_per_second": limits[1] / 1e9,
        "ranges": [
            {"name": name, "calls": calls, "share": spent / seconds}
            for name, (calls, spent) in times(trace, "alure.", torch.device("cpu")).items()
        ],
        "operators": roofline(times(timed, TIMED, device), least.found, limits),
    }


def times(trace: profile, prefix: str, device: torch.device) -> dict[str, tuple[int, float]]:
    """(calls, seconds on the device) of the ranges whose names begin so, longest first. On a CPU: of the wall clock."""
    spent = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    rows = [row for row in trace.key_averages() if row.key.startswith(prefix) and row.device_type == DeviceType.CPU]
    rows.sort(key=lambda row: -getattr(row, spent))
    return {row.key: (row.count, getattr(row, spent) / 1e6) for row in rows}


def roofline(
    spent: dict[str, tuple[int, float]], least: dict[str, Least], limits: tuple[float, float]
) -> list[dict[str, Any]]:
    """The operators that took longest, beside what `limits`, FLOP/s and bytes/s, would allow."""
    table, total = [], sum(seconds for _, seconds in spent.values())
    for name, (calls, seconds) in list(spent.items())[:ROWS]:
        work = least.get(name.removeprefix(TIMED), Least())
        of_matrix = work.flops / limits[0] > work.moved / limits[1]
        table.append(
            {
                "name": name.removeprefix(TIMED),
                "calls": calls,
                "share": seconds / max(total, 1e-9),
                "gflop": work.flops / 1e9,
                "gbyte": work.moved / 1e9,
                "limit": "matrix rate" if of_matrix else "copy rate",
                "share_of_limit": work.seconds(*limits) / max(seconds, 1e-9),
            }
        )
    return table
