"""A warm process that runs `alure …` in forks of itself, with faults in their file operations.

python crash_server.py FAULTS.so: reads one JSON object a line, {"runs": [{"words", "root", "at", "mode", "errno",
"signal", "after_s"}, …]}, runs all at once, and answers with one line: a list of {"code", "operations", "last",
"seconds", "error"}. It never touches a Delta table itself: their runtime does not survive a fork.
"""

import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from typing import Any

import deltalake  # noqa: F401 (imported once, for all)
import torch

import alure.engine.refresh
import alure.engine.store.upkeep
import alure.engine.training  # noqa: F401
from alure.engine import cli, progress

SHARED_BYTES = 256


class Fork:
    def __init__(self, faults: ctypes.CDLL, run: dict[str, Any]) -> None:
        self.memory = mmap.mmap(-1, SHARED_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.run, self.faults = run, faults
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (read after the child has died)
        self.started = time.monotonic()
        self.process = os.fork()
        if not self.process:
            self._child()

    def _child(self) -> None:
        code = 70
        try:
            os.dup2(self.said.fileno(), 1)
            os.dup2(self.said.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            progress.console.file = sys.stderr
            sys.argv = ["alure", *self.run["words"]]
            root, faults = self.run["root"].encode(), self.run
            self.faults.faults_arm(
                ctypes.c_void_p(self.address), root, ctypes.c_long(faults["at"]), faults["mode"], faults["errno"]
            )
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException as error:  # noqa: BLE001 (reported, and the child ends)
                sys.stderr.write(f"unexpected: {type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)

    def signal_when_due(self) -> None:
        if self.run["signal"]:
            time.sleep(max(0.0, self.started + self.run["after_s"] - time.monotonic()))
            os.kill(self.process, self.run["signal"])

    def result(self) -> dict[str, Any]:
        _, status = os.waitpid(self.process, 0)
        seconds = time.monotonic() - self.started
        self.said.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "operations": int.from_bytes(self.memory[:8], "little"),
            "last": self.memory[8:].split(b"\0")[0].decode(errors="replace"),
            "seconds": seconds,
            "error": self.said.read().decode(errors="replace"),
        }


def serve(faults: ctypes.CDLL) -> None:
    for line in sys.stdin:
        runs = json.loads(line)["runs"]
        if any(run["words"][0] == "train" for run in runs):
            import torch._dynamo  # noqa: F401 (2.5 s, which an optimizer's first use would take in every fork)
        forks = [Fork(faults, run) for run in runs]
        for fork in sorted(forks, key=lambda fork: fork.run["after_s"]):
            fork.signal_when_due()
        answer(json.dumps([fork.result() for fork in forks]))


def answer(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.nn.functional.linear(torch.randn(8, 8), torch.randn(8, 8))
    answer("ready")
    serve(ctypes.CDLL(sys.argv[1]))
