"""Compiles every case, prints what each needs, and fails where one needs more than the budget."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alure.bench.ahead_of_time import budget
from alure.bench.ahead_of_time.compiled import OPERATORS, Compiled, compile_cases

HINT = "\nIf a change is meant to cost this much, `--update` writes the new budget: read its diff before committing it."


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alure.bench.ahead_of_time",
        description="Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and check its budget.",
    )
    parser.add_argument("operators", nargs="*", default=list(OPERATORS), help=f"some of {', '.join(OPERATORS)} (all)")
    parser.add_argument("--budget", type=Path, default=Path(__file__).with_name("budget.json"))
    parser.add_argument("--update", action="store_true", help="write the budget anew, with a little headroom")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--workers", type=int, help="processes that compile (all cores)")
    options = parser.parse_args()
    if unknown := set(options.operators) - OPERATORS.keys():
        parser.error(f"no operator {sorted(unknown)}; there are {', '.join(OPERATORS)}")
    if find_spec("triton") is None:
        print('needs Triton; install it (pip install "alure[dev]", Linux)', file=sys.stderr)
        return 2
    import triton

    compiled, names = compile_cases(OPERATORS, options.operators, slow=True, workers=options.workers)
    limits = budget.read(options.budget)
    if options.update:
        limits = budget.updated(limits, compiled, triton.__version__)
        budget.write(limits, options.budget)
    found = budget.faults(compiled, names, limits)
    print("\n".join(table(compiled, limits, found)))
    if triton.__version__ != limits["triton"]:
        print(f"the budget was made with Triton {limits['triton']}; this is {triton.__version__}")
    number = sum(map(len, found.values()))
    print(f"{len(compiled)} compiled, {number} faults" + ("" if not number or options.update else HINT))
    if options.json:
        results = [{**asdict(this), "faults": found[this.case, this.architecture]} for this in compiled]
        print(json.dumps({"passed": number == 0, "budget": found["", 0], "results": results}))
    return 1 if number else 0


def table(compiled: list[Compiled], limits: dict[str, Any], found: dict[tuple[str, int], list[str]]) -> Iterator[str]:
    """A block a case, a line an architecture: what is not 0 as measured/budget; then a line a fault."""
    case = ""
    for this in compiled:
        if this.case != case:
            case = this.case
            yield f"\n{case}"
        most = limits["budgets"].get(case, {}).get(f"sm_{this.architecture}", {})
        faults = found[case, this.architecture]
        figures = [
            f"{measure} {_figure(value)}" + (f"/{_figure(most[measure])}" if measure in most else "")
            for measure, value in this.measures.items()
            if value or most.get(measure)
        ]
        yield f"  sm_{this.architecture:<4} {'FAIL' if faults else 'ok':<5} {'  '.join(figures)}"
        yield from (f"         {fault}" for fault in faults)
    yield from ("", *found["", 0])


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
