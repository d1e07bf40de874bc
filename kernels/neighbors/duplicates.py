"""Copies of one vector that no search can return, found before the search.

Users with the same short history have bit-identical embeddings, thousands of them in one list. Of equal vectors the
lower ids win, so only the first few copies in a list can ever be among the k best; without the others a list of copies
costs no more than any other list.
"""

import torch
from torch import Tensor

HASH_ELEMENTS = 1 << 22


def first_copies(database: Tensor, list_offsets: Tensor, rank: Tensor, copies: int) -> Tensor | None:
    """The rows, ascending, that are among the first `copies` (by rank) of their vector in their list; None for all."""
    digest = _digest(database)
    if digest.unique().numel() == digest.numel():
        return None
    lists = torch.repeat_interleave(
        torch.arange(list_offsets.numel() - 1, device=rank.device), list_offsets[1:] - list_offsets[:-1]
    )
    order = rank.argsort()
    for column in (digest, lists):  # least significant first: by list, then vector, then rank
        order = order[column[order].argsort(stable=True)]
    same = (digest[order[1:]] == digest[order[:-1]]) & (lists[order[1:]] == lists[order[:-1]])
    for part in same.nonzero().squeeze(1).split(max(1, HASH_ELEMENTS // database.shape[1])):
        same[part] = (database[order[part]] == database[order[part + 1]]).all(dim=1)  # equal digests prove nothing
    place = torch.arange(order.numel(), device=order.device)
    begins = torch.cat([same.new_zeros(1), same]).logical_not_()
    place = place - torch.where(begins, place, 0).cummax(dim=0).values
    kept = order[place < copies]
    return None if kept.numel() == order.numel() else kept.sort().values


def _digest(x: Tensor) -> Tensor:
    """A 64-bit hash of every row's bits, [n] int64: equal rows have equal hashes."""
    bits = x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    generator = torch.Generator().manual_seed(0x5EED)
    limits = torch.iinfo(torch.int64)
    factors = torch.randint(limits.min, limits.max, (x.shape[1],), generator=generator).to(x.device) | 1
    out = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    block = max(1, HASH_ELEMENTS // x.shape[1])
    for start in range(0, x.shape[0], block):
        out[start : start + block] = (bits[start : start + block].to(torch.int64) * factors).sum(dim=1)
    return out
