"""Jagged attention with a relative-time bias, beside what PyTorch offers for the same work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alure.kernels import TimeBias, jagged_attention
from alure.kernels.attention import time_thresholds

HEADS, HEAD_DIM = 4, 64
TOKENS = 8192
DAY = 86_400


def lengths_of(case: str, tokens: int) -> list[int]:
    rng = np.random.default_rng(0)
    if case.startswith("equal"):
        length = int(case.split()[1])
        return [length] * max(1, tokens // length)
    drawn: list[int] = []
    while sum(drawn) < tokens:
        drawn.append(int(np.clip(rng.lognormal(np.log(256), 1.0), 1, 4096)))
    return drawn


class Case:
    """q, k, v of a batch of histories with bursty sessions over 90 days, and a bias of log-spaced buckets."""

    def __init__(self, name: str, tokens: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        rng = np.random.default_rng(1)
        self.lengths = lengths_of(name, tokens)
        total = sum(self.lengths)
        self.q, self.k, self.v = (torch.randn(total, HEADS, HEAD_DIM, generator=generator).to(device) for _ in range(3))
        self.offsets = torch.tensor(np.concatenate([[0], np.cumsum(self.lengths)])).to(device)
        sessions = [rng.integers(0, 90 * DAY, max(1, n // 20)) for n in self.lengths]
        times = [np.sort(rng.choice(s, n) + rng.integers(0, 1800, n)) for s, n in zip(sessions, self.lengths)]
        self.timestamps = torch.from_numpy(np.concatenate(times) + 1_790_000_000).to(device)
        thresholds = time_thresholds(per_octave=2).to(device)
        table = torch.randn(HEADS, len(thresholds) + 1, generator=generator).to(device) * 0.3
        self.bias = TimeBias(thresholds, table)
        self.flops = 4.0 * HEADS * HEAD_DIM * sum(n * n for n in self.lengths)

    def ours(self, backend: str, bias: bool) -> Tensor:
        return jagged_attention(
            self.q,
            self.k,
            self.v,
            self.offsets,
            q_timestamps=self.timestamps if bias else None,
            time_bias=self.bias if bias else None,
            backend=backend,
        )

    def sdpa_each(self) -> Tensor:
        """One call a sequence, no bias."""
        parts = []
        for begin, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist()):
            q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (self.q, self.k, self.v))
            parts.append(scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
        return torch.cat(parts)

    def pad(self) -> "Padded":
        return Padded(self)


class Padded:
    """What most people do: pad to the longest, add a dense bias that is built beforehand (not timed)."""

    def __init__(self, case: Case) -> None:
        longest = max(case.lengths)
        batch = len(case.lengths)
        self.rows = torch.full((batch, longest), -1, dtype=torch.int64)
        for i, (begin, n) in enumerate(zip(case.offsets.tolist(), case.lengths)):
            self.rows[i, :n] = torch.arange(begin, begin + n)
        self.valid = self.rows >= 0
        rows = self.rows.clamp(min=0)
        self.q, self.k, self.v = (x[rows].transpose(1, 2).contiguous() for x in (case.q, case.k, case.v))
        t = case.timestamps[rows]
        buckets = torch.bucketize(t[:, :, None] - t[:, None, :], case.bias.thresholds, right=True)
        self.bias = case.bias.table[:, buckets].transpose(0, 1).masked_fill(~self.valid[:, None, None], -torch.inf)

    def __call__(self) -> Tensor:
        out = scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.bias)
        return out.transpose(1, 2)[self.valid]


CASES = ("equal 256", "equal 1024", "lognormal σ=1 median 256")
IMPLEMENTATIONS = ("alure with time bias", "alure without bias", "alure reference with time bias",
                   "SDPA a sequence, without bias", "padded SDPA, dense bias built beforehand")  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def bench_forward(race: Callable[..., Any], quick: bool, device: torch.device, name: str, implementation: str) -> None:
    case = Case(name, TOKENS // 4 if quick else TOKENS, device)
    biased = case.ours("reference", bias=True)
    plain = case.ours("reference", bias=False)
    runs: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "alure with time bias": (lambda: case.ours("auto", bias=True), biased),
        "alure without bias": (lambda: case.ours("auto", bias=False), plain),
        "alure reference with time bias": (lambda: case.ours("reference", bias=True), biased),
        "SDPA a sequence, without bias": (case.sdpa_each, plain),
    }
    if implementation.startswith("padded"):
        runs[implementation] = (case.pad(), biased)
    run, expected = runs[implementation]
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    ours = implementation == "alure with time bias"
    race("attention", f"{name}, {len(case.lengths)} users", implementation, run, ours=ours, flops=case.flops)
