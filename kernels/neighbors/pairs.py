"""(query, probe) pairs by list, in blocks of the size that a Triton program takes."""

from typing import NamedTuple

import torch
from torch import Tensor


class PairBlocks(NamedTuple):
    """A block is pairs order[first … last] of one list; a pair is query · probes + probe."""

    order: Tensor  # [pairs] int64
    list: Tensor  # [blocks] int64
    first: Tensor
    last: Tensor


def pair_blocks(list_offsets: Tensor, probes: Tensor, block_m: int) -> PairBlocks:
    """probes: [queries, p] int64, −1 for none, which is in no block."""
    nlist = list_offsets.numel() - 1
    order = probes.reshape(-1).argsort(stable=True)  # the −1s come first
    counts = torch.bincount(probes.reshape(-1) + 1, minlength=nlist + 1)
    begin = counts.cumsum(0) - counts
    blocks = (counts[1:] + block_m - 1) // block_m
    index = torch.repeat_interleave(torch.arange(nlist, device=probes.device), blocks)
    within = torch.arange(index.numel(), device=probes.device) - (blocks.cumsum(0) - blocks)[index]
    return PairBlocks(order, index, begin[1:][index] + within * block_m, (begin + counts)[1:][index])
