"""`alure bench` from the command line to the table, the JSON line and the file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alure.bench.__main__ import MOST_TIMES, SPARE_S


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which it knows by the environment
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "alure.bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_one_case_end_to_end(tmp_path: Path) -> None:
    words = ("--quick", "--case", "all_pairs[8]", "--minutes", "30", "--out", str(tmp_path), "--json")
    done = bench("neighbors", *words, "--plot", str(tmp_path / "pairs.svg"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["passed"]
    rows = [row for row in found["results"] if "median_s" in row]
    assert {row["implementation"] for row in rows} == {"alure grouped", "FAISS IVFFlat", "FAISS big_batch_search"}
    assert all(row["gflops"] > 0 and row["rounds"] >= 1 for row in rows)
    (written,) = tmp_path.glob("*.jsonl")
    assert len(written.read_text().splitlines()) == len(found["results"])
    assert "FAISS IVFFlat" in done.stdout
    assert "FAISS IVFFlat" in (tmp_path / "pairs.svg").read_text()


@pytest.mark.slow
def test_attention_is_raced_and_drawn(tmp_path: Path) -> None:
    plot = tmp_path / "attention.svg"
    done = bench("attention", "--quick", "--plot", str(plot), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])["results"]
    timed = {row["implementation"] for row in found if "median_s" in row}
    assert {"alure, time bias", "FlexAttention compiled, time bias", "SDPA of the batch, no bias"} <= timed
    assert {row["implementation"] for row in found if "left_out" in row}.isdisjoint({"alure, time bias"})
    assert all(name in plot.read_text() for name in ("alure, time bias", "FlexAttention compiled, time bias"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("attention", "--case", "nothing like it"), "no case contains"),
        (("encoding", "--plot", "x.svg"), "--plot draws the race of attention or neighbors"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], message: str) -> None:
    done = bench(*words)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr


def test_the_limits_of_make_bench_gpu_keep_what_its_help_says() -> None:
    rule = re.search(r"^bench-gpu:.*at most (\d+) minutes.*(?:\n\t.*)+", Path("Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    limits = [sum(map(float, found)) for found in re.findall(r"timeout (?:-s INT )?-k (\d+) (\d+)", rule[0])]
    (minutes,) = re.findall(r"bench all --minutes ([\d.]+)", rule[0])
    assert len(limits) == 2
    assert sum(limits) + MOST_TIMES * 60 * float(minutes) + SPARE_S <= 60 * int(rule[1])
