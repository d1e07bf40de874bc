"""A prepared batch's way to a CUDA device: one copy out of pinned memory, beside what the device computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from alure.engine.model.prepared import PreparedBatch

ALIGNMENT = 16  # bytes; kernels read aligned tensors in wide loads


@dataclass(frozen=True)
class Packed:
    """A batch on the host, and its tensors end to end in one buffer."""

    batch: PreparedBatch
    buffer: Tensor  # uint8
    begins: dict[int, int]  # by the id of a tensor of `batch` the byte where it begins

    @classmethod
    def of(cls, batch: PreparedBatch, pinned: bool) -> "Packed":
        """pinned: in memory that a CUDA device copies from while the host goes on."""
        tensors: dict[int, Tensor] = {}
        batch.moved(lambda x: tensors.setdefault(id(x), x))
        begins, end = {}, 0
        for key, x in tensors.items():
            begins[key], end = end, end + -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        packed = cls(batch, torch.empty(end, dtype=torch.uint8, pin_memory=pinned), begins)
        for x in tensors.values():
            packed._place(packed.buffer, x).copy_(x)
        return packed

    def unpacked(self, buffer: Tensor) -> PreparedBatch:
        """The batch in a copy of the buffer, anywhere."""
        placed: dict[int, Tensor] = {}

        def move(x: Tensor) -> Tensor:
            if id(x) not in placed:
                placed[id(x)] = self._place(buffer, x)
            return placed[id(x)]

        return self.batch.moved(move)

    def _place(self, buffer: Tensor, x: Tensor) -> Tensor:
        begin = self.begins[id(x)]
        return buffer[begin : begin + x.nbytes].view(x.dtype).view(x.shape)


class Sender:
    """Copies batches to `device` on a stream of its own. What is launched there afterwards waits for the copy; neither
    the host nor what the device still computes does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def pack(self, batch: PreparedBatch) -> Packed:
        return Packed.of(batch, pinned=True)

    def send(self, packed: Packed) -> PreparedBatch:
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            buffer = packed.buffer.to(self.device, non_blocking=True)
        computing.wait_stream(self.stream)
        buffer.record_stream(computing)  # its memory is not given to another copy before that is done with it
        return packed.unpacked(buffer)
