"""What codes are worth: how evenly they are used, and how many items they tell apart."""

import numpy as np
import torch

from alure.kernels.quantization import perplexity

BLOCK = 8_192  # rows hashed at once


def perplexities(codes: np.ndarray, codebook: int) -> list[float]:
    """Of each level of codes [n, levels]: how many codes are in effective use, 1 to `codebook`."""
    return [float(perplexity(torch.from_numpy(level).to(torch.int64), codebook)) for level in codes.T]


def fingerprints(vectors: np.ndarray) -> np.ndarray:
    """uint64 [n] of float32 vectors [n, width]: the same for equal vectors, for others as good as never."""
    multipliers = np.random.default_rng(0).integers(0, 1 << 64, vectors.shape[1], dtype=np.uint64) | np.uint64(1)
    prints = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK] + np.float32(0)  # −0 becomes 0
        prints[start : start + BLOCK] = (block.view(np.uint32) * multipliers).sum(axis=1, dtype=np.uint64)
    return prints


def distinctness(codes: np.ndarray, prints: np.ndarray) -> dict[str, float]:
    """How well codes [n, levels] tell items apart.

    unique_share: distinct code lists ÷ items. collision_rate: the share of the distinct vectors whose code list is that
    of another vector too; copies of one vector cannot but share theirs, and do not count.
    """
    if not len(codes):
        return {"unique_share": 0.0, "collision_rate": 0.0}
    lists, which = np.unique(codes, axis=0, return_inverse=True)
    pairs = np.unique(np.stack([which.astype(np.uint64).ravel(), prints], axis=1), axis=0)
    vectors_of = np.bincount(pairs[:, 0].astype(np.int64))
    shared = int(vectors_of[vectors_of > 1].sum())
    return {"unique_share": len(lists) / len(codes), "collision_rate": shared / len(pairs)}
