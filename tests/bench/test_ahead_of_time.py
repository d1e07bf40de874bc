"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, within its budget."""

from pathlib import Path

import pytest

from alure.bench.ahead_of_time import budget
from alure.bench.ahead_of_time.compiled import ARCHITECTURES, OPERATORS, compile_cases

pytest.importorskip("triton")
BUDGET = Path(budget.__file__).with_name("budget.json")


def test_common_configurations_are_within_their_budgets() -> None:
    check(slow=False, architectures=(90,))


@pytest.mark.slow
def test_every_configuration_is_within_its_budget() -> None:
    check(slow=True, architectures=ARCHITECTURES)


def check(slow: bool, architectures: tuple[int, ...]) -> None:
    compiled, names = compile_cases(OPERATORS, OPERATORS, slow, architectures)
    assert {this.case.split(":")[0] for this in compiled} == OPERATORS.keys(), "an operator without AHEAD_OF_TIME"
    found = budget.faults(compiled, names, budget.read(BUDGET))
    lines = [f"{case} sm_{architecture}: {line}" for (case, architecture), lines in found.items() for line in lines]
    assert not lines, "\n".join([*lines, "`python -m alure.bench.ahead_of_time OPERATOR --update` accepts them"])


def test_spills_and_loops_are_seen() -> None:
    compiled, names = compile_cases({"examples": "support.spilling"}, ["examples"], False, ARCHITECTURES, workers=1)
    found = budget.faults(compiled, names, {"rules": [], "budgets": {}})
    for this in compiled:
        measures = this.measures
        if this.case == "examples: spilling":
            assert measures["spills"] > 0
            assert any("spills" in line for line in found[this.case, this.architecture])
        else:  # one helper inlined twice is two named loops; the assembler unrolls both
            assert measures["spills"] == 0
            assert measures["plain mufu"] == 0
            assert measures["exponential mufu"] == 1  # one exp2 an element
            assert 1 < measures["plain instructions"] < measures["exponential instructions"] < 4
            assert measures["atomics"] > 0
