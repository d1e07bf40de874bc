"""Compression of a user's n pooled vectors to k unit embeddings."""

from alure.kernels.compression.interaction import InteractionPlan
from alure.kernels.compression.ops import compress, compress_int8, normalize_int8
from alure.kernels.compression.parameters import DotLinearCompression, InteractionCompression, InteractionLayer

__all__ = [
    "DotLinearCompression",
    "InteractionCompression",
    "InteractionLayer",
    "InteractionPlan",
    "compress",
    "compress_int8",
    "normalize_int8",
]
