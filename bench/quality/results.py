"""Rows of measured runs: appended one by one, so that what was stopped goes on where it was."""

import json
from pathlib import Path
from typing import Any

from alure.bench.report import environment

KEYS = ("experiment", "variant", "seed", "settings")  # of a run: with another of these it is another run


class Results:
    """results/quality/EXPERIMENT.jsonl."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.path, self.experiment = folder / f"{experiment}.jsonl", experiment

    def rows(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def find(self, variant: str, seed: int, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The newest row of this run; None where it is still to be done."""
        wanted = json.loads(json.dumps([self.experiment, variant, seed, settings]))
        return next((row for row in reversed(self.rows()) if [row[key] for key in KEYS] == wanted), None)

    def append(self, variant: str, seed: int, settings: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        row = dict(zip(KEYS, (self.experiment, variant, seed, settings))) | figures | environment()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def matching(results: Results, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of these settings, the newest of each variant and seed, in the order they were first measured."""
    wanted = json.loads(json.dumps(settings))
    found = {(row["variant"], row["seed"]): row for row in results.rows() if row["settings"] == wanted}
    return list(found.values())
