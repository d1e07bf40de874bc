"""The best model of the validations on the way, and when a better one is no longer waited for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from alure.engine.errors import InputError


@dataclass(frozen=True)
class Best:
    step: int
    score: float
    figures: dict[str, Any]
    tensors: dict[str, Tensor]


class Selection:
    """patience: validations in a row without a better score that end the training; None: any."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.waited = patience, 0
        self.points: list[dict[str, float]] = []  # step and the watched figure of every validation
        self.best: Best | None = None

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def add(self, point: dict[str, float], score: float, figures: dict[str, Any], model: nn.Module) -> bool:
        """Whether this is the best so far; its tensors are then copied."""
        self.points.append(point)
        self.waited += 1
        if self.best is not None and not score > self.best.score:
            return False
        tensors = {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}
        self.best, self.waited = Best(int(point["step"]), score, figures, tensors), 0
        return True

    def state(self) -> dict[str, Any]:
        """Plain JSON, without the best model's tensors; load_state takes it back."""
        best = self.best and {"step": self.best.step, "score": self.best.score, "figures": self.best.figures}
        return {"points": self.points, "waited": self.waited, "best": best}

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.points, self.waited = state["points"], state["waited"]
        self.best = state["best"] and Best(**state["best"], tensors=tensors)


def watched(figures: dict[str, Any]) -> tuple[str, float, float]:
    """(name, value, score) of the figure that the best model is chosen by; the higher the score, the better.

    NDCG@10 of held-out events or Recall@10 of the held-out time; the mean NE of the tasks where nothing is retrieved.
    """
    if "ndcg" in figures:
        value = figures["ndcg"]["10"]["value"]
        return "ndcg@10", value, value
    if "recall" in figures["retrieval"]:
        value = figures["retrieval"]["recall"]["10"]
        return "recall@10", value, value
    found = [task["ne"] for task in figures["tasks"].values() if task.get("ne") is not None]
    if not found:
        raise InputError(
            "training.validate_every: the validation time has neither targets nor exposures of both labels, so no "
            "model is better than another; raise training.validation_share, or leave validate_every out"
        )
    value = float(np.mean(found))
    return "ne", value, -value
