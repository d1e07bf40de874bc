"""Runs suites under pytest-benchmark; prints the race and appends JSON lines, contest by contest; draws the plot."""

import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alure.bench import SUITES
from alure.bench.report import LEGEND, append_lines, render, results_path, rows_of
from alure.bench.usage import EXIT_USAGE, Parser, refuse

MOST_TIMES, SPARE_S = 1.25, 60.0  # of --minutes, after which the contest at hand is given up
POLL_S = 0.2
PYTEST_USAGE_ERROR = 4
PLOTS = {"attention": "alure.bench.plot", "neighbors": "alure.bench.plot_neighbors"}  # of all suites, the first


def main() -> int:
    parser = Parser(prog="alure bench", description="Race the kernels and stages beside their peers.")
    parser.add_argument("suite", nargs="?", default="all", choices=[*SUITES, "all"])
    parser.add_argument("--quick", action="store_true", help="small sizes, fewer laps")
    parser.add_argument("--case", help='only the cases whose name contains this, such as "equal 1024" or "backward"')
    parser.add_argument("--minutes", type=float, help="time for all: less for each case, and none for the last ones")
    parser.add_argument("--out", type=Path, help="append the results as JSON lines: a .jsonl file, or a folder")
    parser.add_argument("--plot", type=Path, help="draw the race of attention or neighbors into this SVG file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if not (find_spec("pytest") and find_spec("pytest_benchmark")):
        return refuse("alure bench", 'needs pytest-benchmark; install it (pip install "alure[dev]")')

    home = Path(__file__).resolve().parent
    chosen = SUITES if options.suite == "all" else (options.suite,)
    plotted = next((suite for suite in PLOTS if suite in chosen), None)
    if options.plot and plotted is None:
        return refuse("alure bench", f"--plot draws the race of {' or '.join(PLOTS)}; run that suite")
    words = [str(home / f"{suite}.py") for suite in chosen]
    words += [f"--rootdir={home}", "-c", str(home / "pytest.ini"), "-q", "-p", "no:cacheprovider"]
    words += ["-rs", "--disable-warnings", "--benchmark-disable-gc", "--benchmark-quiet"]
    words += ["--quick"] if options.quick else []
    words += ["--case", options.case] if options.case else []
    words += ["--minutes", str(options.minutes)] if options.minutes else []
    rows: list[dict[str, Any]] = []

    def take(contest: list[dict[str, Any]]) -> None:
        print(render(contest), flush=True)
        if options.out:
            append_lines(contest, results_path(options.out))
        rows.extend(contest)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is stopped keeps what is over
    code = run(words, None if options.minutes is None else MOST_TIMES * 60 * options.minutes + SPARE_S, take)
    print(f"\n{LEGEND}" if rows else "no results")
    if plotted and options.plot and rows:
        importlib.import_module(PLOTS[plotted]).draw(rows, options.plot)
    if options.json:
        print(json.dumps({"suites": list(chosen), "passed": code == 0, "results": rows}))
    return EXIT_USAGE if code == PYTEST_USAGE_ERROR else 1 if code else 0


def run(words: list[str], seconds: float | None, take: Callable[[list[dict[str, Any]]], None]) -> int:
    """pytest's exit code, in a process of its own: one that a GPU breaks or holds up loses only the contest at hand.

    take: called with the rows of every contest once it is over. After so many seconds the process is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        contests = Path(folder) / "contests.jsonl"
        # -P: a folder `kernels` where this runs would hide another package of that name
        command = [sys.executable, "-P", "-m", "pytest", *words, f"--contests={contests}"]
        deadline = None if seconds is None else time.monotonic() + seconds
        taken: list[dict[str, Any]] = []

        def take_new() -> None:
            lines = contests.read_text().splitlines(keepends=True) if contests.exists() else []
            for line in lines[len(taken) :]:
                if line.endswith("\n"):
                    take(rows_of(json.loads(line), taken))
                    taken.append(json.loads(line))

        with subprocess.Popen(command) as child:
            try:
                while child.poll() is None:
                    take_new()
                    if deadline is not None and time.monotonic() > deadline:
                        print(f"alure bench: ended after {seconds:.0f} s, far beyond --minutes", file=sys.stderr)
                        child.kill()
                        break
                    time.sleep(POLL_S)
            except KeyboardInterrupt:
                print("alure bench: stopped; what is over is kept", file=sys.stderr)
                child.terminate()
        take_new()
        return child.returncode


if __name__ == "__main__":
    sys.exit(main())
