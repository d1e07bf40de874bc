"""Ranking and probability metrics, and their confidence intervals, on plain arrays.

A hit is (user, relevant item, rank in the user's list); everything here is made of hits, so lists of a billion users
never have to be held at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CONFIDENCE = (2.5, 97.5)  # percentiles of the bootstrap: 95 % intervals


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def hits_of_lists(
    users: np.ndarray, items: np.ndarray, ranks: np.ndarray, relevant: np.ndarray, num_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which list entries are relevant: (pair, rank) of every hit, each pair once, at its best rank.

    users, items, ranks: int64 [entries]; ranks from 0; item −1 is none. relevant: int64 [r] sorted, distinct keys
    user · num_items + item; a pair is a position there.
    """
    keys = users * num_items + items
    if len(relevant) == 0 or len(keys) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(relevant, keys), len(relevant) - 1)
    found = np.flatnonzero((items >= 0) & (relevant[place] == keys))
    found = found[np.lexsort((ranks[found], keys[found]))]
    first = np.ones(len(found), bool)
    first[1:] = keys[found[1:]] != keys[found[:-1]]
    found = found[first]
    return place[found], ranks[found]


def recall(users: np.ndarray, ranks: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Per user the share of its relevant items among its first `k`: float64 [n]. num_relevant: int64 [n], all > 0."""
    hits = np.bincount(users[ranks < k], minlength=len(num_relevant))
    return hits / num_relevant


def hit_rate(users: np.ndarray, ranks: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Per user 1.0 where any of its relevant items is among its first `k`."""
    return (np.bincount(users[ranks < k], minlength=len(num_relevant)) > 0).astype(np.float64)


def ndcg(users: np.ndarray, ranks: np.ndarray, num_relevant: np.ndarray, k: int) -> np.ndarray:
    """Per user DCG@k ÷ the DCG of a perfect list, with gain 1 and discount 1 / log2(rank + 2)."""
    within = ranks < k
    discounts = 1.0 / np.log2(np.arange(k) + 2.0)
    dcg = np.bincount(users[within], weights=discounts[ranks[within]], minlength=len(num_relevant))
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])
    return dcg / ideal[np.minimum(num_relevant, k)]


def coverage(counts: np.ndarray) -> float:
    """Share of the catalogue shown to anybody. counts: int64 [catalogue], list entries of each item; not empty."""
    return float((counts > 0).mean())


def p90_coverage(counts: np.ndarray) -> float:
    """The smallest share of the catalogue that fills 90 % of all list entries: low where few items crowd the lists."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    filled = np.cumsum(np.sort(counts)[::-1])
    return float((np.searchsorted(filled, 0.9 * total, side="left") + 1) / len(counts))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Per row −log of the probability given to what happened; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return -np.where(labels > 0, np.log(p), np.log1p(-p))


def base_entropy(rate: np.ndarray | float) -> np.ndarray:
    """Log loss of always predicting the base rate; 0 at rates 0 and 1."""
    p = np.clip(np.asarray(rate, np.float64), 1e-300, 1.0)
    q = np.clip(1.0 - np.asarray(rate, np.float64), 1e-300, 1.0)
    return -(p * np.log(p) + q * np.log(q))


def normalized_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean log loss ÷ entropy of the labels' base rate (He et al. 2014); below 1 is better than the base rate.

    Raises ValueError where only one class occurs: the base rate has no entropy.
    """
    rate = float(np.mean(labels > 0)) if len(labels) else 0.0
    if not 0.0 < rate < 1.0:
        raise ValueError(f"normalized entropy: expected both classes, got {len(labels)} labels with base rate {rate:g}")
    return float(log_loss(labels, probabilities).mean() / base_entropy(rate))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, where equals count half.

    Raises ValueError where only one class occurs.
    """
    positive = labels > 0
    if positive.all() or not positive.any():
        raise ValueError(
            f"AUC: expected both classes, got {len(labels)} labels, {int(positive.sum())} of them positive"
        )
    _, place = np.unique(scores, return_inverse=True)
    return area(
        np.bincount(place[positive], minlength=len(labels)), np.bincount(place[~positive], minlength=len(labels))
    )


def area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """AUC from the weights of positives and of negatives at each distinct score, ascending; NaN of one class."""
    below = np.cumsum(negatives) - 0.5 * negatives
    pairs = float(positives.sum()) * float(negatives.sum())
    return float((positives * below).sum() / pairs) if pairs else float("nan")


def resamples(n: int, count: int, seed: int, chunk: int = 1 << 23) -> Iterator[np.ndarray]:
    """How often each of n rows is drawn in each of `count` bootstrap samples: float64 [some, n], block by block.

    At most about `chunk` draws are held at once.
    """
    rng = np.random.default_rng(seed)
    per_block = max(1, chunk // n)
    for first in range(0, count, per_block):
        size = min(per_block, count - first)
        drawn = rng.integers(0, n, (size, n))
        drawn += np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def bootstrap_means(values: np.ndarray, count: int, seed: int, chunk: int = 1 << 23) -> np.ndarray:
    """Means of `values` [n, columns] in `count` resamples of the n rows: float64 [count, columns].

    Columns share the resamples, so a difference of two columns is a paired difference.
    """
    return np.concatenate([times @ values / len(values) for times in resamples(len(values), count, seed, chunk)])


def bootstrap_auc(rows: np.ndarray, labels: np.ndarray, scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """AUC in the same `count` resamples of the rows' owners, int64 [n] from 0: float64 [count], NaN of one class."""
    _, place = np.unique(scores, return_inverse=True)
    size, positive = int(place.max()) + 1, labels > 0
    found = []
    for block in resamples(int(rows.max()) + 1, count, seed):
        for times in block:
            each = times[rows]
            all_of, hit = (np.bincount(place, weights=w, minlength=size) for w in (each, each * positive))
            found.append(area(hit, all_of - hit))
    return np.array(found)


def interval(value: float, samples: np.ndarray) -> Interval:
    """`value` with the middle 95 % of `samples` [count]."""
    low, high = np.percentile(samples, CONFIDENCE)
    return Interval(float(value), float(low), float(high))
