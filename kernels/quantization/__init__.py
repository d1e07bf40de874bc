"""Residual quantisation: content vectors become semantic ids, one code a level."""

from alure.kernels.quantization.ops import residual_quantize
from alure.kernels.quantization.training import (
    ResidualCodebooks,
    perplexity,
    split_most_used,
    train_residual_codebooks,
)

__all__ = ["ResidualCodebooks", "perplexity", "residual_quantize", "split_most_used", "train_residual_codebooks"]
