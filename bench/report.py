"""From pytest-benchmark's results to rows, a table of ratios, and JSON lines that are only ever appended."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def read_rows(results: Path) -> list[dict[str, Any]]:
    """One row a case and implementation: median and spread in seconds, ratio to our fastest, share of the limit."""
    found = json.loads(results.read_text())
    stamp = environment()
    rows = []
    for entry in found["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        row = {name: info[name] for name in ("suite", "case", "implementation", "ours")}
        row |= {"median_s": stats["median"], "q1_s": stats["q1"], "q3_s": stats["q3"], "rounds": stats["rounds"]}
        if info.get("flops"):
            row["gflops"] = info["flops"] / stats["median"] / 1e9
            row["share_of_matrix_rate"] = info["flops"] / stats["median"] / info["matrix_rate"]
        rows.append(row | stamp)
    for row in rows:
        rivals = [r["median_s"] for r in rows if r["ours"] and (r["suite"], r["case"]) == (row["suite"], row["case"])]
        if rivals:
            row["ours_is_faster_by"] = row["median_s"] / min(rivals)
    return rows


def environment() -> dict[str, Any]:
    """What a figure depends on: device, commit, versions, threads."""
    git = ["git", "-C", str(Path.cwd())]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit.stdout.strip() or None,
        "dirty": bool(dirty.stdout.strip()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def render(rows: list[dict[str, Any]]) -> str:
    """The race as a table: one block a case, fastest first."""
    lines = []
    for suite, case in dict.fromkeys((row["suite"], row["case"]) for row in rows):
        lines.append(f"\n{suite}: {case}")
        for row in sorted((r for r in rows if (r["suite"], r["case"]) == (suite, case)), key=lambda r: r["median_s"]):
            spread = (row["q3_s"] - row["q1_s"]) / 2
            rate = f"{row['gflops']:9.1f} GFLOP/s  {row['share_of_matrix_rate']:6.1%}" if "gflops" in row else ""
            ratio = f"{row['ours_is_faster_by']:7.2f}×" if "ours_is_faster_by" in row else ""
            mark = "*" if row["ours"] else " "
            time = f"{row['median_s'] * 1e3:10.2f} ms ± {spread * 1e3:7.2f}"
            lines.append(f" {mark} {row['implementation']:<42} {time}  {ratio} {rate}")
    legend = "* ours; × is the time over our fastest in the same run; % of the measured float32 matrix rate"
    return "\n".join([*lines, "", legend]) if rows else "no results"


def append_lines(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
