"""Training: two-tower retrieval and binary tasks on point-in-time samples of an event log."""

from alure.engine.training.loop import TrainReport
from alure.engine.training.processes import leads
from alure.engine.training.train import train

__all__ = ["TrainReport", "leads", "train"]
