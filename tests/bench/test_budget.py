"""The gate's verdict: whatever is over a limit, or has none, is a fault."""

from pathlib import Path
from typing import Any

import pytest

from alure.bench.ahead_of_time import budget
from alure.bench.ahead_of_time.compiled import SHARED_MEMORY, Compiled

CASE = "op: case"
MEASURES = {"registers": 100, "spills": 0, "shared_memory": 4096, "slow_products": 0, "tile instructions": 9.25}
LIMITS = {"registers": 103, "shared_memory": 4096, "slow_products": 0, "tile instructions": 9.53}
PLAIN = Compiled("op: plain", 90, MEASURES | {"tile instructions": 9.0})


def verdict(
    measures: dict[str, float] | None = None,
    rules: list[dict[str, Any]] | None = None,
    budgets: dict[str, Any] | None = None,
    names: tuple[str, ...] = (CASE, "op: plain"),
    error: str = "",
) -> list[str]:
    both = {CASE: {"sm_90": LIMITS}, "op: plain": {"sm_90": LIMITS}}
    limits = {"triton": "3", "rules": rules or [], "budgets": both if budgets is None else budgets}
    found = budget.faults([Compiled(CASE, 90, MEASURES | (measures or {}), error), PLAIN], list(names), limits)
    return found["", 0] + found[CASE, 90]


def test_within_the_budget() -> None:
    assert verdict() == []


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"registers": 104}, "registers 104: over the budget of 103"),
        ({"tile instructions": 9.54}, "tile instructions 9.54: over the budget of 9.53"),
        ({"slow_products": 1}, "slow_products 1: over"),
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared_memory": SHARED_MEMORY[90] + 1}, "a block can have at most"),
        ({"other mufu": 0}, "other mufu has no budget"),
    ],
)
def test_over_the_budget(measures: dict[str, float], message: str) -> None:
    assert any(message in line for line in verdict(measures))


def test_a_spill_is_a_fault_even_after_an_update() -> None:
    spilling = Compiled(CASE, 90, MEASURES | {"spills": 8})
    limits = budget.updated({"rules": [], "budgets": {}}, [spilling], "3")
    assert budget.faults([spilling], [CASE], limits)[CASE, 90] == ["spills 8 bytes a thread"]


def test_what_cannot_be_compared_is_a_fault() -> None:
    assert verdict(error="CompilationError: no") == ["CompilationError: no"]
    assert any("has no budget" in line for line in verdict(budgets={}))
    gone = {CASE: {"sm_90": LIMITS | {"lookup instructions": 5.0}}}
    assert verdict(budgets=gone) == ["lookup instructions has a budget but was not measured"]
    assert verdict(names=("op: plain",)) == [f"the budget has a case that no kernel lists: {CASE!r}"]


def test_rules() -> None:
    ratio = {"measure": "tile instructions", "cases": CASE, "relative_to": ["op: plain", "tile instructions"]}
    assert verdict(rules=[ratio | {"at_most": 1.03}]) == []
    assert verdict(rules=[ratio | {"at_most": 1.02}]) == [
        "tile instructions 1.03 × tile instructions of op: plain: the rule allows 1.02"
    ]
    most = {"measure": "slow_products", "cases": "op: *", "at_most": 0}
    assert len(verdict({"slow_products": 2}, rules=[most])) == 2  # the rule and the budget
    assert len(verdict({"slow_products": 2}, rules=[most | {"architectures": [80]}])) == 1


def test_a_rule_that_looks_at_nothing_is_a_fault() -> None:
    assert "no case falls under the rule" in verdict(rules=[{"measure": "spills", "cases": "gone: *", "at_most": 0}])[0]
    assert "not measured" in verdict(rules=[{"measure": "gone", "cases": CASE, "at_most": 0}])[0]
    lost = {"measure": "spills", "cases": CASE, "at_most": 1, "relative_to": ["op: gone", "spills"]}
    assert "to compare with" in verdict(rules=[lost])[0]


def test_an_update_keeps_rules_and_other_operators(tmp_path: Path) -> None:
    rule = {"measure": "spills", "cases": "*", "at_most": 0}
    before = {"triton": "2", "rules": [rule], "budgets": {"a: case": {"sm_80": LIMITS}, "op: gone": {}}}
    after = budget.updated(before, [Compiled(CASE, 90, MEASURES | {"tensor": 8})], "3")
    assert after == {"triton": "3", "rules": [rule], "budgets": {"a: case": {"sm_80": LIMITS}, CASE: {"sm_90": LIMITS}}}
    budget.write(after, tmp_path / "budget.json")
    assert budget.read(tmp_path / "budget.json") == after
