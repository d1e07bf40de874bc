"""Training: two-tower retrieval and binary tasks on point-in-time samples of an event log."""

from alure.engine.training.train import TrainReport, train

__all__ = ["TrainReport", "train"]
