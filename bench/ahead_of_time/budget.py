"""The verdict: what was compiled against budget.json.

    budgets   case → architecture → measure → the most that it may be; `--update` writes it again
    rules     what a release must keep whatever its budgets are; written by hand:
              {"measure": "atomics", "cases": "attention: *", "at_most": 0}
              {"measure": "uniform instructions", "cases": "attention: forward bf16 64 time", "at_most": 1.1,
               "relative_to": ["attention: forward bf16 64", "plain instructions"]}
              `cases` is a pattern of the shell; `architectures` names some of them, without it all are meant

Whatever the file says, a spill, a compiler error and more shared memory than a block can have are faults. So are a
measure without a budget, a budget without a case, and a rule that no case falls under: nothing passes unlooked at.
"""

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alure.bench.ahead_of_time.compiled import SHARED_MEMORY, Compiled

HEADROOM = 0.03  # of what an update measured; another patch release of the compiler moves figures by less
EXACT = ("shared_memory", "slow_products", "atomics")  # have no headroom
UNBUDGETED = ("spills", "tensor")  # spills are faults; more tensor core instructions are no worse


def faults(compiled: list[Compiled], names: list[str], budget: dict[str, Any]) -> dict[tuple[str, int], list[str]]:
    """(case, architecture) → what is wrong with it; ("", 0) → what is wrong with the budget itself.

    `compiled` may be a part of the cases; `names` are all of them.
    """
    found: dict[tuple[str, int], list[str]] = {("", 0): []}
    for this in compiled:
        limits = budget["budgets"].get(this.case, {}).get(f"sm_{this.architecture}", {})
        found[this.case, this.architecture] = list(_faults_of(this, limits))
    for case in budget["budgets"].keys() - set(names):
        found["", 0].append(f"the budget has a case that no kernel lists: {case!r}")
    for rule in budget["rules"]:
        if not any(fnmatchcase(name, rule["cases"]) for name in names):
            found["", 0].append(f"no case falls under the rule {rule}")
        for this in compiled:
            if fnmatchcase(this.case, rule["cases"]) and this.architecture in rule.get(
                "architectures", [this.architecture]
            ):
                found[this.case, this.architecture] += _broken(rule, this, compiled)
    return found


def _faults_of(this: Compiled, limits: dict[str, float]) -> list[str]:
    if this.error:
        return [this.error]
    found = []
    if this.measures["spills"]:
        found.append(f"spills {this.measures['spills']:.0f} bytes a thread")
    if this.measures["shared_memory"] > SHARED_MEMORY[this.architecture]:
        found.append(f"shared memory {this.measures['shared_memory']:.0f}: a block can have at most "
                     f"{SHARED_MEMORY[this.architecture]} bytes")  # fmt: skip
    budgeted = {measure: value for measure, value in this.measures.items() if measure not in UNBUDGETED}
    for measure in budgeted.keys() - limits.keys():
        found.append(f"{measure} has no budget")
    for measure in limits.keys() - budgeted.keys():
        found.append(f"{measure} has a budget but was not measured")
    for measure in budgeted.keys() & limits.keys():
        if budgeted[measure] > limits[measure]:
            found.append(f"{measure} {budgeted[measure]:.4g}: over the budget of {limits[measure]:.4g}")
    return sorted(found)


def _broken(rule: dict[str, Any], this: Compiled, compiled: list[Compiled]) -> list[str]:
    if this.error:
        return []
    measure, at_most, unit = rule["measure"], rule["at_most"], 1.0
    if measure not in this.measures:
        return [f"{measure}: not measured, but there is a rule for it"]
    of = ""
    if "relative_to" in rule:
        case, other = rule["relative_to"]
        peers = [peer for peer in compiled if (peer.case, peer.architecture) == (case, this.architecture)]
        if not peers or other not in peers[0].measures:
            return [f"{measure}: there is no {other!r} of {case!r} to compare with"]
        unit, of = peers[0].measures[other], f" × {other} of {case}"
    if this.measures[measure] <= at_most * unit:
        return []
    return [f"{measure} {this.measures[measure] / unit:.3g}{of}: the rule allows {at_most}"]


def updated(budget: dict[str, Any], compiled: list[Compiled], triton_version: str) -> dict[str, Any]:
    """The budget with limits a little above what was measured, for all cases of the operators in `compiled`."""
    operators = {operator_of(this.case) for this in compiled}
    budgets = {case: limits for case, limits in budget["budgets"].items() if operator_of(case) not in operators}
    for this in compiled:
        limits = {
            measure: value if measure in EXACT else _limit(measure, value)
            for measure, value in this.measures.items()
            if measure not in UNBUDGETED
        }
        budgets.setdefault(this.case, {})[f"sm_{this.architecture}"] = limits
    ordered = {case: budgets[case] for case in sorted(budgets, key=operator_of)}
    return {"triton": triton_version, "rules": budget["rules"], "budgets": ordered}


def operator_of(case: str) -> str:
    return case.split(":")[0]


def _limit(measure: str, value: float) -> float:
    if measure == "registers":
        return min(255, math.ceil(value * (1 + HEADROOM)))
    return math.ceil(value * (1 + HEADROOM) * 100) / 100


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(budget: dict[str, Any], path: Path) -> None:
    """One line a rule, one line an architecture."""
    rules = ",\n".join(f"    {json.dumps(rule)}" for rule in budget["rules"])
    cases = ",\n".join(
        f"    {json.dumps(case)}: {{\n"
        + ",\n".join(
            f"      {json.dumps(architecture)}: {json.dumps(limits)}" for architecture, limits in limited.items()
        )
        + "\n    }"
        for case, limited in budget["budgets"].items()
    )
    head = f'  "triton": {json.dumps(budget["triton"])},\n  "rules": [\n{rules}\n  ],\n'
    path.write_text(f'{{\n{head}  "budgets": {{\n{cases}\n  }}\n}}\n')
