"""What the backends of `grouped_topk` share: the problem after validation, exact scores, and sortable keys.

A score is defined independently of any backend's matrix product: the sum in float64 of the float64 products (or squared
differences), rounded once to float32. Backends search with fast approximate scores and end with these, so that equal
vectors tie exactly, whatever the batch.

A key packs (score, rank) into one int64 whose order is "higher score first, then lower id": the score's float32 bits
made monotone in the upper half, 2³¹ − 1 − rank in the lower. Keys of different rows never tie.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MISSING = torch.iinfo(torch.int64).min
LOWEST = torch.finfo(torch.float32).min
LOW_BITS = (1 << 31) - 1
PAIR_ELEMENTS = 1 << 20  # float64 elements of each side held at once by exact_scores: 8 MiB


@dataclass(frozen=True)
class Search:
    """One validated search. Higher scores are better: the inner product, or the negated squared distance."""

    queries: Tensor  # [nq, d] float32 or float64
    database: Tensor  # [nb, d], rows of a list side by side
    list_offsets: Tensor  # [nlist + 1] int64
    probes: Tensor  # [nq, nprobe] int64, −1 = none, no list twice in a row
    rank: Tensor  # [nb] int64, place of the row's id among all ids in ascending order
    exclude_row: Tensor  # [nq] int64, the database row not to return, −1 = none
    k: int
    metric: str  # "ip" or "l2"


def exact_scores(queries: Tensor, i_query: Tensor, database: Tensor, i_row: Tensor, metric: str) -> Tensor:
    """Score of queries[i_query[j]] against database[i_row[j]], float32 [n]."""
    out = torch.empty(i_query.shape[0], dtype=torch.float32, device=queries.device)
    block = max(1, PAIR_ELEMENTS // queries.shape[1])
    for start in range(0, out.numel(), block):
        part = slice(start, start + block)
        x = queries.index_select(0, i_query[part]).double()
        y = database.index_select(0, i_row[part]).double()
        value = (x * y).sum(dim=1) if metric == "ip" else -(x - y).square_().sum(dim=1)
        out[part] = value.float()
    return out


def encode(scores: Tensor, rank: Tensor) -> Tensor:
    """Keys, int64, of float32 `scores` and int64 `rank` < 2³¹ (same shape)."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)  # −0.0 and 0.0 are one score
    monotone = torch.where(bits < 0, bits ^ LOW_BITS, bits)
    return (monotone.to(torch.int64) << 32) | (LOW_BITS - rank)


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(scores float32, rank int64) of `keys`; a missing key gives −inf and −1."""
    high = (keys >> 32).to(torch.int32)
    scores = torch.where(high < 0, high ^ LOW_BITS, high).view(torch.float32)
    missing = keys == MISSING
    scores = torch.where(missing, -torch.inf, scores)
    return scores, torch.where(missing, -1, LOW_BITS - (keys & LOW_BITS))
