"""compress (dot-linear, n vectors to k) beside plain eager PyTorch, with XXᵀ materialised and without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alure.kernels import DotLinearCompression, compress

N, D, R, K, HIDDEN = 256, 96, 24, 2, 128


class Case:
    def __init__(self, users: int, device: torch.device) -> None:
        g = torch.Generator().manual_seed(0)
        self.name = f"{users:,} users, n={N} d={D} r={R} k={K}"
        self.x = torch.randn(users, N, D, generator=g).to(device)
        start = DotLinearCompression.initialize(N, D, K, R, HIDDEN, g)
        self.c = DotLinearCompression(**{name: t.to(device) for name, t in vars(start).items()})

    def ours(self, backend: str) -> Tensor:
        return compress(self.x, self.c, backend=backend)

    def eager(self, products: Tensor) -> Tensor:
        """products: X(XᵀY) [B, n, r], however it was made."""
        c = self.c
        flat = products.flatten(1)
        hidden = F.gelu(F.rms_norm(flat, flat.shape[1:]) @ c.hidden_weight + c.hidden_bias, approximate="tanh")
        mixed = (hidden @ c.output_weight + c.output_bias).view(-1, K, D)
        return F.normalize(F.rms_norm(c.linear @ self.x + c.gate * mixed, (D,)), dim=-1)

    def thin(self) -> Tensor:
        return self.eager(self.x @ (self.x.transpose(1, 2) @ self.c.mix))

    def square(self) -> Tensor:
        return self.eager((self.x @ self.x.transpose(1, 2)) @ self.c.mix)


@pytest.fixture(scope="module")
def case(quick: bool, device: torch.device) -> Case:
    return Case(64 if quick else 1024, device)


@pytest.mark.parametrize("implementation", ["alure", "eager PyTorch, X(XᵀY)", "eager PyTorch, (XXᵀ)Y"])
def bench_compress(race: Callable[..., Any], case: Case, implementation: str) -> None:
    runs: dict[str, Callable[[], Tensor]] = {
        "alure": lambda: case.ours("auto"),
        "eager PyTorch, X(XᵀY)": case.thin,
        "eager PyTorch, (XXᵀ)Y": case.square,
    }
    torch.testing.assert_close(runs[implementation](), case.ours("reference"), rtol=1e-3, atol=1e-4)
    flops = 2.0 * len(case.x) * N * (2 * D * R + K * D + R * HIDDEN)
    race("compression", case.name, implementation, runs[implementation], ours=implementation == "alure", flops=flops)
