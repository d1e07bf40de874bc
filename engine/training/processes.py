"""Several processes train one model, each on its share of every batch, as `torchrun` starts them: gloo or NCCL.

Every process draws the same batch and takes its rows; gradients are summed before the step, so all make the same step
and hold the same weights. The first process alone writes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alure.engine.errors import AlureError
from alure.engine.progress import muted

LONGEST_WAIT = timedelta(minutes=30)  # of the others, while the first one validates


class Processes:
    """This process among all of them; alone by default."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def check_equal(self, value: int, what: str) -> None:
        """AlureError unless the value, below 2^53 ÷ size, is the same in all processes."""
        (total,) = self.sum([value])
        if total != value * self.size:
            raise AlureError(
                f"training: {what} is {value} in process {self.rank} and another in others; the model's folder and the "
                "event log must be on storage that all processes share, and the machines alike"
            )

    def check_in_step(self, model: nn.Module) -> None:
        """AlureError unless all processes hold the same weights, to the bit."""
        if self.size > 1:
            bits = sum(int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in model.parameters())
            self.check_equal(bits % (1 << 31), "the checksum of the weights")

    def sum_gradients(self, dense: Sequence[nn.Parameter], table: nn.Parameter) -> None:
        """Replace every gradient by its sum over the processes; None where no process has one."""
        if self.size == 1:
            return
        present = self.sum([float(p.grad is not None) for p in (*dense, table)])
        some = [p for p, count in zip(dense, present) if count]
        if some:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some])
            dist.all_reduce(flat)
            for p, part in zip(some, flat.split([p.numel() for p in some])):
                p.grad = part.view_as(p)
        if present[-1]:
            table.grad = self._gather_rows(table)

    def _gather_rows(self, table: nn.Parameter) -> Tensor:
        """The table's gradient: rows and values of all processes, in the order of their ranks."""
        rows = torch.empty(0, dtype=torch.int64, device=self.device)
        values = torch.empty(0, table.shape[1], device=self.device)
        if table.grad is not None:
            grad = table.grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
        counts = [int(count) for count in self.sum([len(rows) * (rank == self.rank) for rank in range(self.size)])]
        all_rows, all_values = self._gather(rows, counts), self._gather(values, counts)
        return torch.sparse_coo_tensor(all_rows[None], all_values, table.shape, check_invariants=False)

    def _gather(self, part: Tensor, counts: list[int]) -> Tensor:
        """Parts of counts[rank] rows, end to end. Sent in equal sizes, as every backend can."""
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([piece[:count] for piece, count in zip(found, counts)])


@contextmanager
def processes(device: torch.device | str | None) -> Iterator[Processes]:
    """The processes of a `torchrun`, or of a process group that the caller has made; else this one alone.

    device: the GPU by default where there is one, each process its own.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    launched = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if launched:
        if kind.type == "cuda" and kind.index is None:
            kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if kind.type == "cuda":
            torch.cuda.set_device(kind)
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        if dist.is_available() and dist.is_initialized():
            with muted(dist.get_rank() > 0):
                yield Processes(kind, dist.get_rank(), dist.get_world_size())
        else:
            yield Processes(kind)
    finally:
        if launched:
            dist.destroy_process_group()


def leads() -> bool:
    """Whether this process is the one of a `torchrun` that speaks; any other process is."""
    return not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["RANK"] == "0"
