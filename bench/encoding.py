"""encode_events beside the same encoding written as plain PyTorch operations, eager and compiled."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alure.bench.race import Contest, backward_entry, forward_entry
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

        e = self.encoder
        assert e.dense_weight is not None
        self.weights = [
            e.id_weight,
            e.dense_weight,
            e.time_weight,
            e.bias,
            e.position_table,
            e.frequency_table,
            e.phases,
        ]
        self.flops = 2.0 * total * WIDTH * (ATTRIBUTES * ATTRIBUTE_WIDTH + DENSE + 2 + 2 * len(periods))
        # An event: ids, time, count; rows of the table, content, output.
        self.moved = total * (8.0 * (ATTRIBUTES + 2) + 4.0 * (ATTRIBUTES * ATTRIBUTE_WIDTH + DENSE + WIDTH))

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

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "alure": lambda: self.ours("auto"),
            "eager PyTorch": self.eager,
            "eager PyTorch, compiled": torch.compile(self.eager, dynamic=False),
        }

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "total" in metafunc.fixturenames:
        quick, cuda = bool(metafunc.config.getoption("--quick")), torch.cuda.is_available()
        total = 1 << (15 if quick else 20 if cuda else 17)
        metafunc.parametrize("total", [total], ids=[f"{total:,} events"])


def bench_forward(race: Callable[[Contest], None], total: int, device: torch.device) -> None:
    case = Case(total, device)
    expected = case.ours("reference")
    entries = [forward_entry(name, call, expected, torch.float32) for name, call in case.calls().items()]
    facts = {"events": total, "backward": False}
    race(Contest("encoding", case.name, entries, case.flops, case.moved, facts=facts))


def bench_backward(race: Callable[[Contest], None], total: int, device: torch.device) -> None:
    """Gradients of the embedding table, the content vectors and every weight."""
    case = Case(total, device)
    inputs = [case.table, case.dense, *case.weights]
    for x in inputs:
        x.requires_grad_()
    grad_out = torch.randn(total, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    expected = torch.autograd.grad(case.ours("reference"), inputs, grad_out)
    entries = [
        backward_entry(name, call, inputs, grad_out, expected, torch.float32) for name, call in case.calls().items()
    ]
    facts = {"events": total, "backward": True}
    race(Contest("encoding", f"{case.name}, forward and backward", entries, 3 * case.flops, facts=facts))
