"""Residual quantisation: content vectors become semantic ids, one code a level."""

from alure.kernels.quantization.ops import residual_quantize
from alure.kernels.quantization.training import ResidualCodebooks, perplexity, train_residual_codebooks

__all__ = ["ResidualCodebooks", "perplexity", "residual_quantize", "train_residual_codebooks"]
