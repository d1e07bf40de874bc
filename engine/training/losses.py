"""Sampled softmax for the two-tower head, the user–user loss, and the binary tasks' cross entropy."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = -1e9  # a logit that counts for nothing; finite, so that a user without negatives has a gradient of 0, not NaN


class CandidateItems(NamedTuple):
    """The distinct items a batch's users are scored against."""

    items: Tensor  # int64 [C]
    draws: Tensor  # float32 [C], how often each was drawn into the batch
    expected: Tensor  # float32 [C], how often each is drawn on average: n · Q

    def correction(self, log_q: str) -> Tensor:
        """What log-Q adds to a negative's logit, float32 [C]: log(c / (n·Q)); without the correction log c."""
        return (self.draws if log_q == "none" else self.draws / self.expected).log()


def sampled_softmax(
    logits: Tensor, candidates: CandidateItems, rows: Tensor, columns: Tensor, log_q: str = "negatives"
) -> Tensor:
    """Mean over users of the mean over a user's positives of −log softmax, estimated from sampled negatives.

    A negative drawn c times of n·Q expected counts c / (n·Q) times: its logit becomes z + log(c / (n·Q)), the log-Q
    correction. A positive is not sampled (it is there with probability 1), so it is not corrected; correcting it too
    gives tail items an eighth of their true gradient ("Correcting the LogQ Correction", RecSys 2025); log_q "tfrs" does
    so, as TensorFlow Recommenders does. Accidental hits, a user's own positives among the negatives, are masked.

    logits: [B, C], scores / temperature. rows, columns: int64 [R], the positives' places in it, no place twice.
    """
    hits = torch.zeros_like(logits, dtype=torch.bool)
    hits[rows, columns] = True
    negatives = (logits + candidates.correction(log_q)).masked_fill(hits, MASKED).logsumexp(dim=1)  # [B]
    positive = logits.flatten()[rows * logits.shape[1] + columns]
    if log_q == "tfrs":
        positive = positive - candidates.expected[columns].log()
    loss = F.softplus(negatives[rows] - positive)
    counts = torch.bincount(rows, minlength=logits.shape[0])
    return (loss / counts[rows]).sum() / (counts > 0).sum()


class RowSoftmax(torch.autograd.Function):
    """Mean over n rows of −log softmax of each row's positive among C candidates, a block of rows at a time.

    The [n, C] logits are never held: a block's gradients are made while it is in the cache, as in fused linear cross
    entropy. users [n, D], ads [C, D]: their products are logits. correction float32 [C]: added to a candidate's logit
    where it is a negative. positive [n]: the positives' logits. hits int64 [n]: the column that a row's positive
    itself has among the candidates, masked there; −1 where it has none. The products are made in the type `low`.
    """

    BLOCK = 1_024

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, ads: Tensor, correction: Tensor, positive: Tensor, hits: Tensor, low: torch.dtype
    ) -> Tensor:
        total = users.new_zeros((), dtype=torch.float64)
        d_users, d_ads, d_positive = torch.empty_like(users), torch.zeros_like(ads), torch.empty_like(positive)
        low_ads = ads.to(low)
        for begin in range(0, len(users), RowSoftmax.BLOCK):
            block = slice(begin, begin + RowSoftmax.BLOCK)
            low_users = users[block].to(low)
            logits = (low_users @ low_ads.T).to(users.dtype).add_(correction)
            rows = (hits[block] >= 0).nonzero().squeeze(1)
            logits[rows, hits[block][rows]] = MASKED
            highest = logits.amax(dim=1, keepdim=True)
            weights = logits.sub_(highest).exp_()
            sums = weights.sum(dim=1, keepdim=True)
            behind = (highest + sums.log()).squeeze(1) - positive[block]
            total += F.softplus(behind).sum()
            missing = torch.sigmoid(behind)  # probability of the negatives together
            low_weights = weights.mul_(missing[:, None] / sums).to(low)
            d_users[block] = low_weights @ low_ads
            d_ads += low_weights.T @ low_users
            d_positive[block] = -missing
        ctx.save_for_backward(d_users, d_ads, d_positive)
        ctx.rows = max(len(users), 1)
        return (total / ctx.rows).to(users.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.rows
        d_users, d_ads, d_positive = ctx.saved_tensors
        return d_users * scale, d_ads * scale, None, d_positive * scale, None, None


def view_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Two views [B, D] of each user, unit rows: each finds its other view among the batch's users (InfoNCE)."""
    logits = first @ second.T / temperature
    own = torch.arange(len(first), device=first.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy of one task: logits [E], labels float32 [E]."""
    return F.binary_cross_entropy_with_logits(logits, labels)
