"""Events at random and the definition of their encoding, event by event."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alure.kernels import EventEncoder, encode_events

NOW = 1_780_000_000  # June 2026
DAY = 86_400
WEIGHTS = ("id_weight", "time_weight", "bias", "position_table", "frequency_table", "phases", "dense_weight")


@dataclass(frozen=True)
class Problem:
    """Arguments of encode_events."""

    ids: Tensor
    table: Tensor
    offsets: Tensor
    timestamps: Tensor
    reference_times: Tensor
    encoder: EventEncoder
    counts: Tensor | None
    dense: Tensor | None
    utc_offsets: Tensor | None

    def run(self, backend: str = "auto") -> Tensor:
        return encode_events(
            self.ids,
            self.table,
            self.offsets,
            self.timestamps,
            self.reference_times,
            self.encoder,
            counts=self.counts,
            dense=self.dense,
            utc_offsets=self.utc_offsets,
            backend=backend,
        )

    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        given = {"table": self.table, "dense": self.dense}
        given |= {name: getattr(self.encoder, name) for name in WEIGHTS}
        return {name: x for name, x in given.items() if x is not None}

    def with_leaves(self, leaves: dict[str, Tensor]) -> "Problem":
        encoder = replace(self.encoder, **{name: x for name, x in leaves.items() if name in WEIGHTS})
        return replace(self, encoder=encoder, table=leaves["table"], dense=leaves.get("dense"))

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        """The same values, rounded to `dtype`, as fresh leaves on `device`."""
        names = ("ids", "offsets", "timestamps", "reference_times", "counts", "utc_offsets")
        moved = {name: x.to(device) for name in names if (x := getattr(self, name)) is not None}
        leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in self.leaves().items()}
        encoder = replace(self.encoder, periods=self.encoder.periods.to(device))
        return replace(self, encoder=encoder, **moved).with_leaves(leaves)

    def definition(self) -> Tensor:
        """The formula, one event at a time, in the table's dtype; integer features by Python's integers."""
        e, out = self.encoder, []
        for s in range(len(self.offsets) - 1):
            rows = range(int(self.offsets[s]), int(self.offsets[s + 1]))
            for row in rows:
                time, snapshot = int(self.timestamps[row]), int(self.reference_times[s])
                gap = time - int(self.timestamps[row - 1]) if row > rows.start else 0
                y = e.bias + e.position_table[min(rows.stop - 1 - row, len(e.position_table) - 1)]
                for a, index in enumerate(self.ids[row].tolist()):
                    if index >= 0:
                        y = y + self.table[index] @ e.id_weight[a]
                if self.dense is not None and e.dense_weight is not None:
                    y = y + self.dense[row] @ e.dense_weight
                if self.counts is not None:
                    bucket = (1 + int(self.counts[row])).bit_length() - 1
                    y = y + e.frequency_table[min(bucket, len(e.frequency_table) - 1)]
                decay = [math.log1p(max(0, snapshot - time) / e.tau), math.log1p(gap / e.tau)]
                local = time + (0 if self.utc_offsets is None else int(self.utc_offsets[row]))
                turn = [2 * math.pi * (local % p) / p for p in e.periods.tolist()]
                angle = torch.tensor(turn, dtype=torch.float64).to(y.dtype) + e.phases
                y = y + torch.cat([torch.tensor(decay, dtype=y.dtype), angle.sin(), angle.cos()]) @ e.time_weight
                out.append(y)
        return torch.stack(out) if out else self.table.new_zeros(0, len(e.bias))


def random_problem(
    lengths: Sequence[int],
    *,
    attributes: int = 3,
    d_e: int = 5,
    width: int = 7,
    rows: int = 20,
    periods: Sequence[int] = (3_600, DAY, 365 * DAY),
    d_dense: int | None = 6,
    optional: bool = True,
    seed: int = 0,
) -> Problem:
    """Missing ids, ties in time, events after the snapshot, counts beyond the table; in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    times = [(NOW - integers(-DAY, 400 * DAY, n) // 7 * 7).sort().values for n in lengths]
    encoder = EventEncoder(
        id_weight=normal(attributes, d_e, width),
        time_weight=normal(2 + 2 * len(periods), width),
        bias=normal(width),
        position_table=normal(4, width),
        frequency_table=normal(5, width),
        periods=torch.tensor(list(periods), dtype=torch.int64),
        phases=normal(len(periods)),
        tau=3_600.0,
        dense_weight=None if d_dense is None else normal(d_dense, width),
    )
    return Problem(
        ids=integers(-1, rows, total, attributes),
        table=normal(rows, d_e),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        timestamps=torch.cat([*times, torch.zeros(0, dtype=torch.int64)]),
        reference_times=NOW - integers(0, DAY, len(lengths)),
        encoder=encoder,
        counts=integers(0, 100, total) if optional else None,
        dense=None if d_dense is None else normal(total, d_dense),
        utc_offsets=integers(-12, 15, total) * 3_600 if optional else None,
    )


def with_gradients(problem: Problem, out: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every leaf for one fixed random direction."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = problem.leaves()
    gradients = torch.autograd.grad(out, list(leaves.values()), direction.to(out), materialize_grads=True)
    return {"out": out.detach()} | {f"d_{name}": g for name, g in zip(leaves, gradients)}
