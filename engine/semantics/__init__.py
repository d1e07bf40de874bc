"""Semantic ids: content vectors of items become a few small integers each, one a level, coarse to fine.

SemanticsConfig → train_quantizer → a folder of codebooks → encode_items → items with `semantic_ids`, for `ingest`.
"""

from alure.engine.semantics.codebooks import load_quantizer, save_quantizer
from alure.engine.semantics.encoding import encode_items
from alure.engine.semantics.quantizer import Quantizer, QuantizerShape
from alure.engine.semantics.training import train_quantizer

__all__ = ["Quantizer", "QuantizerShape", "encode_items", "load_quantizer", "save_quantizer", "train_quantizer"]
