"""Every Triton kernel compiles for A100, H100 and B200 without a GPU, within its budget."""

from pathlib import Path

import pytest

from alure.bench.ahead_of_time import budget
from alure.bench.ahead_of_time.compiled import ARCHITECTURES, OPERATORS, Compiled, compile_cases

pytest.importorskip("triton")
BUDGET = Path(budget.__file__).with_name("budget.json")


def test_common_configurations_are_within_their_budgets() -> None:
    check(slow=False)


@pytest.mark.slow
def test_every_configuration_is_within_its_budget() -> None:
    check(slow=True)


def check(slow: bool) -> None:
    compiled, names = compile_cases(OPERATORS, OPERATORS, slow)
    assert {this.case.split(":")[0] for this in compiled} == OPERATORS.keys(), "an operator without AHEAD_OF_TIME"
    found = budget.faults(compiled, names, budget.read(BUDGET))
    lines = [f"{case} sm_{architecture}: {line}" for (case, architecture), lines in found.items() for line in lines]
    assert not lines, "\n".join([*lines, "python -P -m alure.bench.ahead_of_time [OPERATOR] --update accepts them"])


@pytest.fixture(scope="module")
def examples() -> dict[tuple[str, int], Compiled]:
    compiled, _ = compile_cases({"examples": "support.spilling"}, ["examples"], slow=False)
    return {(this.case.split(": ")[1], this.architecture): this for this in compiled}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_spill_is_seen(examples: dict[tuple[str, int], Compiled], architecture: int) -> None:
    this = examples["spilling", architecture]
    assert this.measures["spills"] > 0
    found = budget.faults([this], [this.case], {"rules": [], "budgets": {}})
    assert any("spills" in line for line in found[this.case, architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_helper_inlined_twice_is_two_named_loops(
    examples: dict[tuple[str, int], Compiled], architecture: int
) -> None:
    measures = examples["two loops", architecture].measures
    assert measures["plain mufu"] == 0
    assert measures["exponential mufu"] == 1  # one exp2 an element
    assert 1 <= measures["plain instructions"] < measures["exponential instructions"]
    assert measures["atomics"] > 0
    assert measures["spills"] == 0
