"""Runs suites under pytest-benchmark, prints the race, appends JSON lines, draws the plot."""

import importlib
import json
import sys
import tempfile
from pathlib import Path

from alure.bench import SUITES
from alure.bench.report import append_lines, read_rows, render, results_path
from alure.bench.usage import EXIT_USAGE, Parser, refuse

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
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ModuleNotFoundError:
        return refuse("alure bench", 'needs pytest-benchmark; install it (pip install "alure[dev]")')

    home = Path(__file__).resolve().parent
    chosen = SUITES if options.suite == "all" else (options.suite,)
    plotted = next((suite for suite in PLOTS if suite in chosen), None)
    if options.plot and plotted is None:
        return refuse("alure bench", f"--plot draws the race of {' or '.join(PLOTS)}; run that suite")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        words = [str(home / f"{suite}.py") for suite in chosen]
        words += [
            f"--rootdir={home}",
            "-c",
            str(home / "pytest.ini"),
            "-q",
            "-p",
            "no:cacheprovider",
            "-rs",
            "--disable-warnings",
        ]
        words += [f"--benchmark-json={results}", "--benchmark-disable-gc", "--benchmark-quiet"]
        words += ["--quick"] if options.quick else []
        words += ["--case", options.case] if options.case else []
        words += ["--minutes", str(options.minutes)] if options.minutes else []
        code = int(pytest.main(words))
        rows = read_rows(results) if results.exists() and results.stat().st_size else []
    print(render(rows))
    if options.out:
        append_lines(rows, results_path(options.out))
    if plotted and options.plot and rows:
        importlib.import_module(PLOTS[plotted]).draw(rows, options.plot)
    if options.json:
        print(json.dumps({"suites": list(chosen), "passed": code == 0, "results": rows}))
    if code == pytest.ExitCode.USAGE_ERROR:
        return EXIT_USAGE
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
