"""Softmax attention over jagged sequences with learned time, position and cyclic biases."""

from alure.kernels.attention.bias import PositionBias, TimeBias, position_thresholds, time_thresholds
from alure.kernels.attention.ops import jagged_attention
from alure.kernels.attention.plan import AttentionPlan

__all__ = ["AttentionPlan", "PositionBias", "TimeBias", "jagged_attention", "position_thresholds", "time_thresholds"]
