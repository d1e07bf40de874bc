"""Sampled softmax for the two-tower head, and the binary tasks' cross entropy."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = -1e9  # a logit that counts for nothing; finite, so that a user without negatives has a gradient of 0, not NaN


class CandidateItems(NamedTuple):
    """The distinct items a batch's users are scored against."""

    items: Tensor  # int64 [C]
    draws: Tensor  # float32 [C], how often each was drawn into the batch
    expected: Tensor  # float32 [C], how often each is drawn on average: n · Q


def sampled_softmax(logits: Tensor, candidates: CandidateItems, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean over users of the mean over a user's positives of −log softmax, estimated from sampled negatives.

    A negative drawn c times of n·Q expected counts c / (n·Q) times: its logit becomes z + log(c / (n·Q)), the log-Q
    correction. A positive is not sampled (it is there with probability 1), so it is not corrected; correcting it too
    gives tail items an eighth of their true gradient ("Correcting the LogQ Correction", RecSys 2025). Accidental hits,
    a user's own positives among the negatives, are masked.

    logits: [B, C], scores / temperature. rows, columns: int64 [R], the positives' places in it, no place twice.
    """
    correction = (candidates.draws / candidates.expected).log()
    hits = torch.zeros_like(logits, dtype=torch.bool)
    hits[rows, columns] = True
    negatives = (logits + correction).masked_fill(hits, MASKED).logsumexp(dim=1)  # [B]
    positive = logits.flatten()[rows * logits.shape[1] + columns]
    loss = F.softplus(negatives[rows] - positive)
    counts = torch.bincount(rows, minlength=logits.shape[0])
    return (loss / counts[rows]).sum() / (counts > 0).sum()


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy of one task: logits [E], labels float32 [E]."""
    return F.binary_cross_entropy_with_logits(logits, labels)
