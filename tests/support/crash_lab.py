"""Runs of `alure …` that die, fail or are stopped at a chosen file operation or moment."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


class Mode(IntEnum):
    """What happens to the n-th file operation; as in faults.c."""

    PASS = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    FAIL = 3
    TEAR = 4
    TEAR_AND_KILL = 5


@dataclass(frozen=True)
class Fault:
    at: int = 0  # from 1; 0: none
    mode: Mode = Mode.PASS
    errno: int = errno.EIO
    signal: int = 0
    after_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    code: int  # −9: killed
    operations: int
    last: str
    seconds: float
    error: str


class CrashLab:
    def __init__(self, server: "subprocess.Popen[str]") -> None:
        self.server = server

    def run(self, root: Path, words: list[Any], fault: Fault = Fault()) -> Outcome:
        """One run, with the fault below the folder `root`."""
        return self.run_together(root, [(words, fault)])[0]

    def run_together(self, root: Path, runs: list[tuple[list[Any], Fault]]) -> list[Outcome]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        asked = [{"words": [str(word) for word in words], "root": str(root), **vars(fault)} for words, fault in runs]
        self.server.stdin.write(json.dumps({"runs": asked}) + "\n")
        self.server.stdin.flush()
        return [Outcome(**found) for found in json.loads(self.server.stdout.readline())]


@contextmanager
def crash_lab(folder: Path) -> Iterator[CrashLab]:
    """Builds the faults and starts the server. Skips where there is no C compiler or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, for faults in file operations")
    faults = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", faults, HERE / "faults.c"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(faults), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "crash_server.py"), str(faults)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield CrashLab(server)
    finally:
        server.kill()
        server.communicate()
