"""Table 2 of the paper, offline: future engagement found by BFF + PPR, and by BFF + PPR + ALURE, at equal budgets.

The whole chain runs on the synthetic ads world, whose last three days are the truth. Both sets are cut to the same K.
A seed is a world and a training of its own. BFF is the graph of follows, PPR personalized PageRank over it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from alure.bench.quality.results import Results, matching
from alure.engine.config import TrainingConfig
from alure.engine.pipeline import run_demo
from alure.engine.progress import say

EXPERIMENT = "table2"
VARIANT = "social+ppr, alure+social+ppr"
SETTINGS: dict[str, Any] = {"users": 1_500, "training": {"steps": 120, "threads": 1}}
BASELINE = "BFF + PPR"


def run(data: Path | None, results: Results, seeds: tuple[int, ...]) -> None:
    """Run the chain of every seed that has no row yet; needs no data."""
    for seed in seeds:
        if results.find(VARIANT, seed, SETTINGS) is None:
            say(f"table2: seed {seed}")
            with tempfile.TemporaryDirectory() as scratch:
                results.append(VARIANT, seed, SETTINGS, measure(Path(scratch), seed))


def measure(folder: Path, seed: int) -> dict[str, Any]:
    summary = run_demo(folder, SETTINGS["users"], seed, TrainingConfig.model_validate(SETTINGS["training"]))
    return figures_of(folder) | {"seconds": summary["seconds"]}


def figures_of(folder: Path) -> dict[str, Any]:
    """Recall of both sets and their paired difference, from the stamp of the evaluation in a run's folder."""
    report = json.loads((folder / "stages" / "evaluate.json").read_text())["report"]
    by_parts = {frozenset(found["name"].split("+")): found for found in report["sets"]}
    sets = {
        BASELINE: by_parts[frozenset({"social", "ppr"})],
        f"{BASELINE} + ALURE": by_parts[frozenset({"social", "ppr", "alure"})],
    }
    pair = [found["name"] for found in sets.values()]
    apart = [d for d in report["differences"] if [d["baseline"], d["set"]] == pair and d["metric"] == "recall"]
    return {
        "evaluated_users": report["users"],
        "recall": {name: found["metrics"]["recall"] for name, found in sets.items()},
        "difference": {str(d["k"]): {key: d[key] for key in ("value", "low", "high")} for d in apart},
    }


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    rows = matching(results, SETTINGS)
    lines = ["## Table 2: candidates from similar users", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    if not rows:
        return "\n".join([*lines, "Not yet measured."]) + "\n"
    lines += [f"| seed | K | {BASELINE} | {BASELINE} + ALURE | difference (95 %, paired over users) | |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        for k, apart in row["difference"].items():
            before, after = (found[k]["value"] for found in row["recall"].values())
            verdict = "significant" if apart["low"] > 0 or apart["high"] < 0 else "includes zero"
            interval = f"{apart['value']:+.4f} ({apart['low']:+.4f} to {apart['high']:+.4f})"
            lines.append(f"| {row['seed']} | {k} | {before:.4f} | {after:.4f} | {interval} | {verdict} |")
    users = ", ".join(f"{row['evaluated_users']:,}" for row in rows)
    lines += ["", f"{SETTINGS['users']:,} users; users with an engagement to come: {users} ({rows[0]['device']})."]
    return "\n".join(lines) + "\n"
