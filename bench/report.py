"""From contests to rows, a table of ratios, and JSON lines that are only ever appended."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "flash_attn", "faiss-cpu", "faiss-gpu", "duckdb")  # whose versions a figure may depend on


def rows_of(info: dict[str, Any], before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Of a contest one row an implementation: median and spread in seconds, ratio to ours, shares of the limits.

    A row of an implementation that did not take part has `left_out`, the reason, and no times. before: the contests of
    the run so far; the limits are the best that were measured, for a shared machine may be busy at any one.
    """
    stamp = environment()
    rows = []
    alike = [info, *(other for other in before if other["dtype"] == info["dtype"])]
    limits = {name: max(other[name] for other in alike) for name in ("matrix_rate", "copy_rate")}
    case = {name: info[name] for name in ("suite", "case", "dtype")} | info["facts"]
    times = {result["implementation"]: statistics.median(result["laps_s"]) for result in info["results"]}
    ours = [times[result["implementation"]] for result in info["results"] if result["ours"]]
    for result in info["results"]:
        row = case | {name: result[name] for name in ("implementation", "ours", "peak_bytes")}
        row |= result["facts"]
        row |= _spread(result["laps_s"]) | _rates(info | limits, times[result["implementation"]])
        if ours:
            row["ours_is_faster_by"] = times[result["implementation"]] / ours[0]
        rows.append(row | stamp)
    rows += [case | {"implementation": name, "left_out": why} | stamp for name, why in info["left_out"].items()]
    return rows


def _spread(laps: list[float]) -> dict[str, Any]:
    q1, median, q3 = statistics.quantiles(laps, n=4, method="inclusive") if len(laps) > 1 else laps * 3
    return {"median_s": median, "q1_s": q1, "q3_s": q3, "rounds": len(laps)}


def _rates(info: dict[str, Any], seconds: float) -> dict[str, float]:
    rates = {}
    if info["flops"]:
        rates["gflops"] = info["flops"] / seconds / 1e9
        rates["share_of_matrix_rate"] = info["flops"] / seconds / info["matrix_rate"]
    if info["moved"]:
        rates["gbytes_per_s"] = info["moved"] / seconds / 1e9
        rates["share_of_copy_rate"] = info["moved"] / seconds / info["copy_rate"]
    return rates


def environment() -> dict[str, Any]:
    """What a figure depends on; `load` of the last minute includes this run."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        **_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": _versions(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _commit() -> dict[str, Any]:
    """As the run found it: its own results may lie in the repository."""
    git = ["git", "-C", str(Path.cwd())]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip() or None, "dirty": bool(dirty.stdout.strip())}


def _versions() -> dict[str, str]:
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def device_name() -> str:
    """The GPU's name, or the CPU's with its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


def results_path(out: Path) -> Path:
    """`out`, or where it is a folder, the file in it that is named after the device: nvidia-h200.jsonl."""
    if out.suffix == ".jsonl":
        return out
    return out / f"{re.sub(r'[^a-z0-9]+', '-', device_name().lower()).strip('-')}.jsonl"


LEGEND = (
    "* ours. ×: time over our first line of the case, timed in turn in the same run; n: laps. On one thread of\n"
    "a CPU all times are CPU time. Shares: of the rate of a large matrix product of the dtype (of float32 where\n"
    "that is faster), and of a copy's bytes/s, measured here. MB: the most memory held during a call beyond its\n"
    "inputs, its result included. What a peer prepares beforehand is in neither."
)


def render(rows: list[dict[str, Any]]) -> str:
    """A contest as a block: fastest first, then who did not take part and why."""
    lines = [f"\n{rows[0]['suite']}: {rows[0]['case']}"]
    for row in sorted((r for r in rows if "median_s" in r), key=lambda r: r["median_s"]):
        lines += [_line(row), *_quantiles(row.get("quantiles_ms", {}))]
    lines += [f"   {row['implementation']:<38} – {row['left_out']}" for row in rows if "left_out" in row]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    spread = (row["q3_s"] - row["q1_s"]) / 2
    parts = [
        f" {'*' if row['ours'] else ' '} {row['implementation']:<38}",
        f"{row['median_s'] * 1e3:10.3f} ms ± {spread * 1e3:7.3f} n={row['rounds']:<2}",
        f"{row['ours_is_faster_by']:7.2f}×" if "ours_is_faster_by" in row else " " * 8,
        _rate(row["gflops"]) + f" {row['share_of_matrix_rate']:6.1%}" if "gflops" in row else "",
        f"{row['gbytes_per_s']:7.1f} GB/s {row['share_of_copy_rate']:6.1%}" if "gbytes_per_s" in row else "",
        f"{row['peak_bytes'] / 1e6:9.1f} MB" if row["peak_bytes"] is not None else "",
    ]
    return "  ".join(part for part in parts if part)


def _quantiles(found: dict[str, dict[str, float]]) -> list[str]:
    """A line a stage: its quantiles over single requests."""
    return [f"     {name:<35}{''.join(f'  {q} {ms:8.3f} ms' for q, ms in of.items())}" for name, of in found.items()]


def _rate(gflops: float) -> str:
    return f"{gflops / 1e3:8.1f} TFLOP/s" if gflops >= 1e4 else f"{gflops:8.1f} GFLOP/s"


def append_lines(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
