"""FlexAttention, compiled, on the packed batch: sequences kept apart by a block mask, the time bias a score_mod."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from alure.bench.histories import Histories
from alure.bench.peers import Peer
from alure.bench.race import LeftOut

MOST_CPU_FLOPS = 1e11  # beyond it a CPU needs minutes
FIRST_CELL = 254  # of a float of exponent 0: bits >> 22 of 1.0


@cache
def compiled() -> Any:
    """One for all cases, so that cases of one shape share a compilation. Static shapes: with dynamic ones, PyTorch
    2.13 writes C++ that does not compile.
    """
    torch._dynamo.config.recompile_limit = 64  # past the default of 8 it would fall back to eager, silently
    return torch.compile(flex_attention, dynamic=False)


def flex(histories: Histories, with_bias: bool) -> Peer:
    """The block mask is built beforehand. The bucket is read from the bits of a float, without a logarithm."""
    if histories.device.type == "cpu" and histories.flops > MOST_CPU_FLOPS:
        raise LeftOut("takes minutes on a CPU")
    total, bias = sum(histories.lengths), histories.bias
    lengths = torch.tensor(histories.lengths, device=histories.device)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=histories.device), lengths).int()
    times = (histories.timestamps - histories.timestamps.min()).int()
    middle = len(bias.thresholds) // 2

    def same_sequence(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sequence[i] == sequence[j]

    mask = create_block_mask(same_sequence, None, None, total, total, device=histories.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert table is not None
            elapsed = times[i] - times[j]
            size = elapsed.abs()
            cell = torch.maximum((size.float().view(torch.int32) >> 22) - FIRST_CELL, size.clamp(max=1))
            return score + table[h, middle + torch.where(elapsed < 0, -cell, cell)]

        return compiled()(q, k, v, score_mod=add_bias if with_bias else None, block_mask=mask)

    return Peer(
        attend,
        bias if with_bias else None,
        lambda x: x.transpose(0, 1)[None].contiguous(),
        lambda x: x[0].transpose(0, 1),
    )
