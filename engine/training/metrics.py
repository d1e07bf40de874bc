"""Validation figures: Normalized Entropy of the binary tasks, Recall@K of the two-tower head."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alure.engine.model.towers import two_tower_scores

NAMES = ("hit_rate", "ndcg")
SMOOTHING = 20.0  # exposures that the item-rate baseline mixes in at the base rate


def normalized_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Log loss ÷ entropy of the base rate of these labels (He et al., ADKDD 2014); below 1 is better than the rate.

    None where the labels are all equal, as the base rate then has no entropy.
    """
    rate = float(labels.mean()) if len(labels) else 0.0
    if rate in (0.0, 1.0):
        return None
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean()
    return float(loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)))


def item_rates(items: np.ndarray, labels: np.ndarray, num_items: int) -> np.ndarray:
    """Rate of positives of each item, pulled to the base rate by SMOOTHING exposures: float64 [num_items]."""
    base = float(labels.mean()) if len(labels) else 0.0
    shown = np.bincount(items, minlength=num_items)
    positive = np.bincount(items, weights=labels, minlength=num_items)
    return (positive + SMOOTHING * base) / (shown + SMOOTHING)


def top_columns(users: Tensor, ads: Tensor, k: int, scores_held: int = 1 << 24) -> Tensor:
    """Columns of the k best ads of each user, best first: users [B, k', d], ads [N, k', d] → int64 [B, k].

    At most about `scores_held` scores are held at once.
    """
    block = max(1, scores_held // max(1, ads.shape[0]))
    best = [two_tower_scores(part, ads).topk(min(k, ads.shape[0]), dim=1).indices for part in users.split(block)]
    return torch.cat(best) if best else torch.empty(0, k, dtype=torch.int64)


def recall_at(top: np.ndarray, rows: np.ndarray, columns: np.ndarray, k: int) -> float:
    """Mean over users of the share of their positives among their first k.

    top: int64 [B, ≥k] columns, best first. rows, columns: the positives, each once; every user has at least one.
    """
    hit = (top[rows, :k] == columns[:, None]).any(axis=1)
    counts = np.bincount(rows, minlength=len(top))
    return float((np.bincount(rows, weights=hit, minlength=len(top)) / counts).mean())


def hit_rate_and_ndcg(ranks: np.ndarray, ks: list[int], seed: int, resamples: int = 1_000) -> dict[str, dict[str, Any]]:
    """HR@K and NDCG@K of one held-out item a user, from its rank (from 0) in the full list: int64 [n].

    {"hit_rate" | "ndcg": {K: {"value", "low", "high"}}}, 95 % bootstrap intervals over users.
    """
    gains = 1.0 / np.log2(ranks.astype(np.float64) + 2.0)
    columns = [(name, k, (ranks < k) * (1.0 if name == "hit_rate" else gains)) for name in NAMES for k in ks]
    values = np.stack([column for _, _, column in columns], axis=1)
    generator = np.random.default_rng(seed)
    n = len(ranks)
    samples = np.stack([values[generator.integers(0, n, n)].mean(0) for _ in range(resamples)]) if n else values
    found: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    for column, (name, k, each) in enumerate(columns):
        low, high = np.percentile(samples[:, column], (2.5, 97.5)) if n else (0.0, 0.0)
        found[name][str(k)] = {"value": float(each.mean()) if n else 0.0, "low": float(low), "high": float(high)}
    return found
