"""Triton: one program per (list, block of the queries that probe it), its k best keys kept on chip; see
kernel_nominate.py for all but the nearest lists.

    queries [nq, d] float32 · database [nb, d] float32, lists side by side · out [slots, K] int64 keys (scores.py)

A program scores BLOCK_M queries against its list, BLOCK_N rows at a time (tl.dot in float32), turns scores into
sortable keys and merges a tile into its K best only where some key beats the query's K-th. The nearest lists go first;
their K-th keys are where the others start. The programs' results meet in one torch.topk over keys, and the survivors
are scored exactly.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import HOPPER, capability, on_device
from alure.kernels.neighbors.kernel_nominate import AHEAD_OF_TIME as NOMINATE_AHEAD_OF_TIME
from alure.kernels.neighbors.kernel_nominate import Bounds, nominate, nominates
from alure.kernels.neighbors.pairs import pair_blocks
from alure.kernels.neighbors.scores import MISSING, Search, decode, encode, exact_scores

SIZES = (2, 16, 64, 256)  # K: how many keys a query may keep; those of BLOCK_M queries live in registers
BLOCK_N = 64
NUM_WARPS = 8  # 4 spill on sm_90
SLOT_BYTES = 1 << 28  # keys written by one launch before they are merged
NEAREST = 2  # lists of a query that are searched before rows of the others are nominated
NOMINATE_AT_ONCE = 1 << 16  # queries

_MISSING = tl.constexpr(MISSING)
_NOTHING_BETTER = tl.constexpr(torch.iinfo(torch.int64).max)


@triton.jit
def grouped_topk_kernel(
    p_queries, p_database, p_bias, p_rank, p_list_offsets,
    p_pair_query, p_pair_slot, p_block_list, p_block_first, p_block_last,
    p_floor, p_exclude, p_out, D, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    i_list = tl.load(p_block_list + i_block)
    o_pair = tl.load(p_block_first + i_block) + tl.arange(0, BLOCK_M)
    m_pair = o_pair < tl.load(p_block_last + i_block)
    i_query = tl.load(p_pair_query + o_pair, mask=m_pair, other=0)
    b_kth = tl.load(p_floor + i_query, mask=m_pair, other=_NOTHING_BETTER)
    b_exclude = tl.load(p_exclude + i_query, mask=m_pair, other=-1)
    begin = tl.load(p_list_offsets + i_list)
    end = tl.load(p_list_offsets + i_list + 1)

    # Free places hold MISSING, MISSING + 1, …: below every key and all different, so that its value names a place.
    o_k = tl.arange(0, K)
    b_best = tl.full([BLOCK_M, K], _MISSING, dtype=tl.int64) + o_k[None, :]
    b_least = tl.min(b_best, axis=1)
    for start in range(begin, end, BLOCK_N):  # loop: rows
        o_row = start + tl.arange(0, BLOCK_N)
        m_row = o_row < end
        b_score = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first in range(0, D, BLOCK_D):  # loop: products
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_q = tl.load(
                p_queries + i_query[:, None] * D + o_d[None, :], mask=m_pair[:, None] & m_d[None, :], other=0.0
            )
            b_x = tl.load(p_database + o_row[None, :] * D + o_d[:, None], mask=m_row[None, :] & m_d[:, None], other=0.0)
            b_score = tl.dot(b_q, b_x, b_score, input_precision=PRECISION)
        b_score = b_score * FACTOR + tl.load(p_bias + o_row, mask=m_row, other=0.0)[None, :]
        b_score = tl.where(b_score == 0, 0.0, b_score)  # −0.0 and 0.0 are one score
        b_bits = b_score.to(tl.int32, bitcast=True)
        b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
        b_rank = tl.load(p_rank + o_row, mask=m_row, other=0)
        b_key = (b_bits.to(tl.int64) << 32) | (0x7FFFFFFF - b_rank)[None, :]
        m_key = m_pair[:, None] & m_row[None, :] & (o_row[None, :] != b_exclude[:, None])
        b_key = tl.where(m_key, b_key, _MISSING)
        b_top = tl.max(b_key, axis=1)
        # One key a query and pass; the K-th rises with each.
        while tl.max((b_top > b_kth).to(tl.int32), axis=0) > 0:  # loop: keep
            m_better = (b_top > b_kth)[:, None]
            b_best = tl.where(m_better & (b_best == b_least[:, None]), b_top[:, None], b_best)
            b_least = tl.min(b_best, axis=1)
            b_kth = tl.maximum(b_kth, b_least)
            b_key = tl.where(b_key == b_top[:, None], _MISSING, b_key)
            b_top = tl.max(b_key, axis=1)

    i_slot = tl.load(p_pair_slot + o_pair, mask=m_pair, other=0)
    b_best = tl.where(b_best < _MISSING + K, _MISSING, b_best)
    tl.store(p_out + i_slot[:, None] * K + o_k[None, :], b_best, mask=m_pair[:, None])


def _tile(keep: int, major: int) -> dict[str, Any]:
    """The largest blocks that do not spill on sm_80 and sm_100; on Hopper those that its warps multiply together, each
    float32 as three of tf32, with half of the instructions.
    """
    if major == HOPPER and keep <= 64:
        tile = {"PRECISION": "tf32x3", "BLOCK_M": 64, "BLOCK_D": 32}
    elif keep <= 16:
        tile = {"PRECISION": "ieee", "BLOCK_M": 32, "BLOCK_D": 32}
    else:
        tile = {"PRECISION": "ieee", "BLOCK_M": 16, "BLOCK_D": 16}
    return {**tile, "BLOCK_N": BLOCK_N, "K": keep}


def _aot_case(keep: int, architectures: tuple[int, ...]) -> tuple[Any, ...]:
    signature = {
        "p_queries": "*fp32", "p_database": "*fp32", "p_bias": "*fp32", "p_rank": "*i64", "p_list_offsets": "*i64",
        "p_pair_query": "*i64", "p_pair_slot": "*i64", "p_block_list": "*i64", "p_block_first": "*i64",
        "p_block_last": "*i64", "p_floor": "*i64", "p_exclude": "*i64", "p_out": "*i64", "D": "i32",
    }  # fmt: skip
    tile = _tile(keep, architectures[0] // 10)
    facts = {
        "name": f"top {keep}" + " hopper" * (90 in architectures),
        "loops": dict.fromkeys(("rows", "products", "keep"), tile["BLOCK_M"] * tile["BLOCK_N"]),
        "architectures": architectures,
    }
    return grouped_topk_kernel, signature, {"FACTOR": 1, **tile}, {"num_warps": NUM_WARPS}, facts


AHEAD_OF_TIME = [
    *(_aot_case(keep, architectures) for keep in SIZES for architectures in ((90,), (80, 100))),
    *NOMINATE_AHEAD_OF_TIME,
]


def _size(keep: int, problem: str) -> int:
    if keep > SIZES[-1]:
        raise ValueError(f"{problem}; use backend='reference'")
    return next(size for size in SIZES if size >= keep)


def search(task: Search) -> Tensor:
    """The k best keys of every query, best first, [nq, k] int64 (MISSING where fewer were found).

    The nearest lists are searched by the kernel here, the others by the one that nominates: of a query whose k-th best
    is known few rows of those pass. Where that does not serve, all are searched by this one.
    """
    # One more than asked: a swap by rounding at the boundary is put right.
    keep = _size(task.k + 1, f"k: backend 'triton' keeps at most {SIZES[-1] - 1} neighbours, got {task.k}")
    row_of_rank = torch.empty_like(task.rank)
    row_of_rank[task.rank] = torch.arange(task.rank.numel(), device=task.rank.device)

    def exact(keys: Tensor, part: slice | Tensor) -> Tensor:
        """The k best of keys [n, m] of the queries `part`, by their exact scores."""
        rank = decode(keys)[1]
        query, place = (rank >= 0).nonzero(as_tuple=True)
        rank = rank[query, place]
        scores = exact_scores(task.queries[part], query, task.database, row_of_rank[rank], task.metric)
        keys = keys.clone()
        keys[query, place] = encode(scores, rank)
        return keys.topk(task.k, dim=1).values

    nprobe = task.probes.shape[1]
    nearest = min(NEAREST, nprobe) if nominates(task.queries.shape[1]) else nprobe
    best = exact(_search_approximately(task, keep, nearest), slice(None))
    if nearest == nprobe:
        return best
    bounds = Bounds(task)
    for start in range(0, best.shape[0], NOMINATE_AT_ONCE):
        part = slice(start, start + NOMINATE_AT_ONCE)
        rows, again = nominate(task, bounds, part, task.probes[part, nearest:], best[part], task.k)
        nominated = encode(torch.zeros((), device=rows.device), task.rank[rows.clamp(min=0)])
        nominated = torch.where(rows >= 0, nominated, MISSING)
        best[part] = exact(torch.cat([best[part], nominated], dim=1), part)
        if len(again):
            rest = _subset(task, start + again)
            best[start + again] = exact(_search_approximately(rest, keep, nprobe), start + again)
    return best


def _subset(task: Search, i_query: Tensor) -> Search:
    return replace(
        task, queries=task.queries[i_query], probes=task.probes[i_query], exclude_row=task.exclude_row[i_query]
    )


def assign(x: Tensor, centroids: Tensor, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """(D, I) of the nprobe best centroids of every row: a search in one list that holds them all."""
    keep = _size(nprobe, f"nprobe: backend 'triton' keeps at most {SIZES[-1]}, got {nprobe}")
    device, count = x.device, centroids.shape[0]
    none = torch.full((x.shape[0],), -1, dtype=torch.int64, device=device)
    task = Search(
        queries=x, database=centroids, list_offsets=torch.tensor([0, count], device=device),
        probes=torch.zeros((x.shape[0], 1), dtype=torch.int64, device=device),
        rank=torch.arange(count, device=device), exclude_row=none, k=nprobe, metric=metric,
    )  # fmt: skip
    scores, index = decode(_search_approximately(task, keep, 1)[:, :nprobe])
    if metric == "l2":
        scores = (x.square().sum(dim=1, keepdim=True) - scores).clamp_(min=0)
    return scores, index


def _search_approximately(task: Search, keep: int, nprobe: int) -> Tensor:
    """The `keep` best keys of every query in its first `nprobe` lists by the kernel's own scores, best first,
    [nq, keep]; in l2 they are |q|² − |q − x|².
    """
    device = task.queries.device
    best = torch.full((task.queries.shape[0], keep), MISSING, dtype=torch.int64, device=device)
    if task.database.shape[0] == 0:
        return best
    if task.metric == "ip":
        bias = torch.zeros(task.database.shape[0], device=device)
    else:
        bias = -task.database.square().sum(dim=1)
    queries_at_once = max(1, SLOT_BYTES // (8 * keep * max(1, nprobe)))
    for start in range(0, task.queries.shape[0], queries_at_once):
        part = slice(start, start + queries_at_once)
        for first, last in ((0, min(1, nprobe)), (1, nprobe)):
            if first < last:
                found = _launch(task, bias, part, task.probes[part, first:last], best[part])
                best[part] = torch.cat([best[part], found], dim=1).topk(keep, dim=1).values
    return best


def _launch(task: Search, bias: Tensor, part: slice, probes: Tensor, best: Tensor) -> Tensor:
    """Search the given probes of the queries in `part`; [queries, probes · K] keys that beat `best`'s last."""
    device, keep = probes.device, best.shape[1]
    num_queries, width = probes.shape
    tile = _tile(keep, capability(device))
    blocks = pair_blocks(task.list_offsets, probes, tile["BLOCK_M"])
    out = torch.full((num_queries, width * keep), MISSING, dtype=torch.int64, device=device)
    if len(blocks.list) == 0:
        return out
    queries = task.queries[part]
    with on_device(queries):
        grouped_topk_kernel[(len(blocks.list),)](
            queries, task.database, bias, task.rank, task.list_offsets,
            blocks.order // width, blocks.order, blocks.list, blocks.first, blocks.last,
            best[:, -1].contiguous(), task.exclude_row[part], out, queries.shape[1],
            FACTOR=1 if task.metric == "ip" else 2, **tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
