"""The relative-time bias as HSTU's public kernels computed it before December 2024, written anew, in softmax attention.

Per score element: subtract two int64 times, cast, clamp, logarithm, scale, cast to a bucket, gather from the table.
The table has no head dimension, and the grid covers the longest sequence, as theirs.
"""

import math

import torch
from torch import Tensor

from alure.bench.histories import HEADS, Histories
from alure.bench.peers import Peer
from alure.bench.race import LeftOut
from alure.kernels import TimeBias
from alure.kernels.backend import has_triton, triton_interprets

PER_BUCKET = 0.301  # of ln Δ
BUCKETS = 64


def hstu(histories: Histories) -> Peer:
    if not has_triton():
        raise LeftOut("triton is not installed")
    if histories.device.type != "cuda" and not triton_interprets():
        raise LeftOut("needs a GPU")
    from alure.bench.peers.hstu_kernel import forward

    row = torch.randn(BUCKETS, generator=torch.Generator().manual_seed(3)).to(histories.device) * 0.3
    offsets, longest = histories.offsets, max(histories.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return forward(q, k, v, offsets, histories.timestamps, row, longest, PER_BUCKET)

    return Peer(attend, as_time_bias(row))


def as_time_bias(row: Tensor) -> TimeBias:
    """The same bias by thresholds: bucket b begins at the least whole Δ whose ⌊ln Δ / 0.301⌋, in float32, is b."""
    begins = [torch.ones((), dtype=torch.int64, device=row.device)]
    for bucket in range(1, len(row)):
        near = torch.arange(-2048, 2049, device=row.device) + round(math.exp(PER_BUCKET * bucket))
        found = (near.clamp(min=1).float().log() * (1.0 / PER_BUCKET)).int()
        begins.append(near[found >= bucket][0])
    # Where several buckets begin at one whole Δ, the last of them is the one that is seen.
    starts = torch.stack(begins)
    seen = torch.cat([starts[1:] > starts[:-1], starts.new_ones(1, dtype=torch.bool)])
    forward, values = starts[seen][1:], row[seen]
    thresholds = torch.cat([1 - forward.flip(0), forward])
    return TimeBias(thresholds, torch.cat([values[1:].flip(0), values]).expand(HEADS, -1).contiguous())
