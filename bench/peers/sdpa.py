"""PyTorch's scaled_dot_product_attention: a batch of equal lengths, a call a sequence, padded with a dense bias."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alure.bench.histories import HEADS, Histories
from alure.bench.peers import Peer
from alure.bench.race import LeftOut

MOST_BYTES = {"cpu": 1 << 30, "cuda": 24 << 30}  # of a dense bias


def batched(histories: Histories) -> Peer:
    """[batch, H, n, D], no bias: the fair peer where all lengths are equal."""
    if len(set(histories.lengths)) > 1:
        raise LeftOut("lengths differ")
    batch = len(histories.lengths)
    return Peer(
        lambda q, k, v, _: scaled_dot_product_attention(q, k, v),
        None,
        lambda x: x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous(),
        lambda x: x.transpose(1, 2).flatten(0, 1),
    )


def each(histories: Histories) -> Peer:
    """A call a sequence, no bias, on [H, total, D]."""
    if len(histories.lengths) == 1:
        raise LeftOut("one sequence: the same call as the batch")

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
        sequences = zip(*(x[None].split(histories.lengths, dim=2) for x in (q, k, v)))
        return torch.cat([scaled_dot_product_attention(*one) for one in sequences], dim=2)[0]

    return Peer(attend, None, lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))


def padded(histories: Histories) -> Peer:
    """What most people do: pad to the longest, add a dense bias, which is built beforehand and learns nothing."""
    batch, longest = len(histories.lengths), -(-max(histories.lengths) // 16) * 16  # GPU kernels want aligned rows
    size = batch * HEADS * longest**2 * histories.dtype.itemsize
    if size > MOST_BYTES[histories.device.type]:
        raise LeftOut(f"its dense bias is {size / 2**30:.1f} GiB")
    device, table = histories.device, histories.bias.table.to(histories.dtype)
    rows = histories.offsets[:-1, None] + torch.arange(longest, device=device)  # [batch, longest]
    valid = rows < histories.offsets[1:, None]
    rows = rows.clamp(max=int(histories.offsets[-1]) - 1)
    bias = torch.full((batch, HEADS, longest, longest), -torch.inf, dtype=histories.dtype, device=device)
    for i, (n, times) in enumerate(zip(histories.lengths, histories.timestamps.split(histories.lengths))):
        buckets = torch.bucketize(times[:, None] - times, histories.bias.thresholds, right=True)
        bias[i, :, :n, :n] = table[:, buckets]
        bias[i, :, n:, 0] = 0.0  # padding rows see one key: nothing that is not a number
    return Peer(
        lambda q, k, v, _: scaled_dot_product_attention(q, k, v, attn_mask=bias),
        histories.bias,
        lambda x: x[rows].transpose(1, 2).contiguous(),
        lambda x: x.transpose(1, 2)[valid],
    )
