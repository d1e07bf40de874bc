"""The losses of a training over its steps, as its report shows them."""

import math
from typing import Any

CURVE_POINTS = 100


class Curve:
    """Means of the losses over stretches of steps, CURVE_POINTS of them or fewer."""

    def __init__(self, steps: int) -> None:
        self.steps, self.every = steps, math.ceil(steps / CURVE_POINTS)
        self.points: list[dict[str, float]] = []
        self.pending: dict[str, list[float]] = {}
        self.recent = math.nan

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.pending.setdefault(name, []).append(value)
        self.recent = values["loss"] if math.isnan(self.recent) else 0.95 * self.recent + 0.05 * values["loss"]
        if step % self.every == 0 or step == self.steps:
            self.points.append({"step": step, **{name: sum(v) / len(v) for name, v in self.pending.items()}})
            self.pending = {}

    def state(self) -> dict[str, Any]:
        """Plain JSON; load_state takes it back."""
        return {"points": self.points, "pending": self.pending, "recent": self.recent}

    def load_state(self, state: dict[str, Any]) -> None:
        self.points, self.pending, self.recent = state["points"], state["pending"], state["recent"]
