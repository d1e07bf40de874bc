"""encode_events beside the same encoding written as plain eager PyTorch operations."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alure.kernels import EventEncoder, encode_events

DAY = 86_400
ATTRIBUTES, ATTRIBUTE_WIDTH, DENSE, WIDTH, ROWS = 5, 32, 32, 64, 1 << 16


class Case:
    """Histories of 64 events with five hashed attributes and a content vector."""

    def __init__(self, total: int, device: torch.device) -> None:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(device) * 0.1

        self.name = f"{total:,} events"
        users = total // 64
        self.offsets = (torch.arange(users + 1) * 64).to(device)
        self.ids = torch.randint(0, ROWS, (total, ATTRIBUTES), generator=g).to(device)
        times = torch.randint(0, 90 * DAY, (users, 64), generator=g).sort(dim=1).values.flatten()
        self.timestamps = (times + 1_790_000_000).to(device)
        self.reference_times = torch.full((users,), 1_790_000_000 + 91 * DAY).to(device)
        self.counts = torch.randint(1, 50, (total,), generator=g).to(device)
        self.dense = normal(total, DENSE)
        self.table = normal(ROWS, ATTRIBUTE_WIDTH)
        periods = torch.tensor([3_600, 6 * 3_600, DAY, 7 * DAY, 28 * DAY, 365 * DAY]).to(device)
        self.encoder = EventEncoder(
            id_weight=normal(ATTRIBUTES, ATTRIBUTE_WIDTH, WIDTH),
            dense_weight=normal(DENSE, WIDTH),
            time_weight=normal(2 + 2 * len(periods), WIDTH),
            bias=normal(WIDTH),
            position_table=normal(1024, WIDTH),
            frequency_table=normal(16, WIDTH),
            periods=periods,
            phases=normal(len(periods)),
            tau=3_600.0,
        )

    def ours(self, backend: str) -> Tensor:
        return encode_events(
            self.ids,
            self.table,
            self.offsets,
            self.timestamps,
            self.reference_times,
            self.encoder,
            counts=self.counts,
            dense=self.dense,
            backend=backend,
        )

    def eager(self) -> Tensor:
        """One operation after another, as a model file would write it."""
        e = self.encoder
        users = torch.repeat_interleave(self.offsets.diff())
        begins = self.offsets[:-1][users]
        rows = torch.arange(len(users), device=users.device)
        age = (self.reference_times[users] - self.timestamps).clamp(min=0)
        gap = torch.where(rows > begins, self.timestamps - self.timestamps.roll(1), 0)
        turns = (self.timestamps[:, None] % e.periods) / e.periods * (2 * math.pi) + e.phases
        decay = torch.stack([torch.log1p(age / e.tau), torch.log1p(gap / e.tau)], dim=1)
        features = torch.cat([decay, turns.sin(), turns.cos()], dim=1)
        order = (self.offsets[1:][users] - 1 - rows).clamp(max=len(e.position_table) - 1)
        bucket = torch.log2(1.0 + self.counts).floor().long().clamp(max=len(e.frequency_table) - 1)
        out = torch.einsum("nae,aed->nd", self.table[self.ids], e.id_weight)
        assert e.dense_weight is not None
        out = out + self.dense @ e.dense_weight + features @ e.time_weight + e.bias
        return out + e.position_table[order] + e.frequency_table[bucket]


@pytest.fixture(scope="module")
def case(quick: bool, device: torch.device) -> Case:
    return Case(1 << 15 if quick else 1 << 18, device)


@pytest.mark.parametrize("implementation", ["alure", "eager PyTorch"])
def bench_encode(race: Callable[..., Any], case: Case, implementation: str) -> None:
    runs: dict[str, Callable[[], Tensor]] = {"alure": lambda: case.ours("auto"), "eager PyTorch": case.eager}
    torch.testing.assert_close(runs[implementation](), case.ours("reference"), rtol=1e-3, atol=1e-4)
    flops = 2.0 * case.ids.shape[0] * WIDTH * (ATTRIBUTES * ATTRIBUTE_WIDTH + DENSE + 14)
    race("encoding", case.name, implementation, runs[implementation], ours=implementation == "alure", flops=flops)
