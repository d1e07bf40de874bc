"""`alure profile`: where a stage's time goes, as a trace for Perfetto and as a table."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from alure.engine.config import RefreshConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.refresh.embedder import STAGES, Embedder, Snapshot, resolve_precision

ROWS = 12


def profile_refresh(model_path: Path, events_path: Path, out: Path, num_users: int = 2048) -> dict[str, Any]:
    """Embed `num_users` users under the profiler, batched as a refresh does; writes a Chrome trace to `out`.

    The result holds users/s, the share of the time of each stage and of the operators that took most, and the share of
    the measured matrix rate of this machine that PyTorch's own matrix products reached (the kernels' are not counted).
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
    embedder.embed(users[:64], tokens[:64], lambda users, tokens: None)  # warm-up
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, with_flops=True) as trace:
        started = time.perf_counter()
        _, work = embedder.embed(users, tokens, lambda users, tokens: None)
        seconds = time.perf_counter() - started
    out.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(out))
    on_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = sorted(trace.key_averages(), key=lambda row: -getattr(row, on_device))
    operators = [row for row in averages if row.key not in STAGES]
    flops = sum(row.flops for row in operators if row.flops)
    rate = matrix_rate(device, embedder.model.dtype)
    total = sum(getattr(row, on_device) for row in operators)
    return {
        "trace": str(out),
        "device": str(device),
        "precision": config.precision,
        "users": len(users),
        "tokens": work.tokens,
        "batches": work.batches,
        "seconds": seconds,
        "users_per_second": len(users) / seconds,
        "stages": {row.key: row.cpu_time_total / 1e6 / seconds for row in averages if row.key in STAGES},
        "matrix_gflops": flops / 1e9,
        "share_of_matrix_rate": flops / seconds / rate,
        "measured_matrix_tflops": rate / 1e12,
        "operators": [
            {"name": row.key, "calls": row.count, "share": getattr(row, on_device) / max(total, 1)}
            for row in operators[:ROWS]
        ],
    }


def matrix_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of a large matrix product of `dtype` on this machine; of a small one where a large one takes seconds."""
    small, large = 256, 8192 if device.type == "cuda" else 2048
    rate = _product_rate(device, dtype, small, clock)
    return rate if 2 * large**3 / rate > 2.0 else _product_rate(device, dtype, large, clock)


def _product_rate(device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float]) -> float:
    """FLOP/s of a product of two size × size matrices, best of five."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = clock()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return 2 * size**3 / best
