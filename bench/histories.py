"""The histories that attention races on: lengths, bursty times over 90 days, and a bias of log-spaced buckets."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from alure.kernels import TimeBias

HEADS = 4
DAY = 86_400
SPAN = 90 * DAY
SESSION = 20  # events, within half an hour


def lengths_of(shape: str, tokens: int) -> list[int]:
    """Lengths that sum to `tokens`. "equal N"; "lognormal": mean 512, σ 1; "heavy-tailed": Zipf's law of exponent 1.5
    over groups of 64 users, the first of whom have half the tokens, at most 16,384.
    """
    if shape.startswith("equal"):
        length = int(shape.split()[1])
        return [length] * max(1, tokens // length)
    rng = np.random.default_rng(0)
    drawn: list[int] = []
    while sum(drawn) < tokens:
        if shape == "lognormal":
            length = round(rng.lognormal(math.log(512) - 0.5, 1.0))
        else:
            length = round(min(tokens // 2, 16_384) / (len(drawn) % 64 + 1) ** 1.5)
        drawn.append(max(1, min(length, tokens - sum(drawn))))
    return [int(n) for n in rng.permutation(drawn)]


def bucket_thresholds(longest: int = 2 * SPAN) -> Tensor:
    """1, 2, 3, 4, 6, 8, 12, … and their mirror image: two buckets an octave, which are the exponent and the first bit
    of the mantissa of a float, so that peers find a bucket by the fastest formula there is.
    """
    octaves = range(1, int(math.log2(longest)) + 1)
    forward = [1, *(step << (octave - 1) for octave in octaves for step in (2, 3))]
    return torch.tensor([1 - t for t in reversed(forward)] + forward)


@dataclass(frozen=True)
class Histories:
    """q, k, v [total, H, D] of a batch; times in seconds; the bias of `bucket_thresholds`."""

    shape: str
    tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def lengths(self) -> list[int]:
        return lengths_of(self.shape, self.tokens)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._normal(3, sum(self.lengths), HEADS, self.head_dim, seed=0).to(self.dtype).unbind(0)
        return q, k, v

    @cached_property
    def grad_out(self) -> Tensor:
        return self._normal(sum(self.lengths), HEADS, self.head_dim, seed=1).to(self.dtype)

    @cached_property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *np.cumsum(self.lengths)]).to(self.device)

    @cached_property
    def timestamps(self) -> Tensor:
        rng = np.random.default_rng(1)
        starts = [rng.integers(0, SPAN, max(1, n // SESSION)) for n in self.lengths]
        times = [np.sort(rng.choice(s, n) + rng.integers(0, 1800, n)) for s, n in zip(starts, self.lengths)]
        return torch.from_numpy(np.concatenate(times) + 1_790_000_000).to(self.device)

    @cached_property
    def bias(self) -> TimeBias:
        thresholds = bucket_thresholds()
        return TimeBias(thresholds.to(self.device), self._normal(HEADS, len(thresholds) + 1, seed=2) * 0.3)

    @property
    def flops(self) -> float:
        """Of the two products of the forward pass; the backward has five."""
        return 4.0 * HEADS * self.head_dim * sum(n * n for n in self.lengths)

    def _normal(self, *shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
