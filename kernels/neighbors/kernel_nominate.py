"""Triton: the rows that may be among a query's k best, by products in tf32 and a bound that is known beforehand.

    queries [nq, D] float32 · database [nb, D] float32, lists side by side · out: rows [nq, CAPACITY] int64, counts [nq]

One program scores BLOCK_M queries against their list, BLOCK_N rows at a time, and compares. The nearest lists were
searched before, so a query's k-th best is good, few rows pass, and what those few cost is next to nothing: no keys are
kept on chip, and a pair costs its product and a comparison. A row that does not pass is not among the k best, for tf32
cuts a float32 to 11 bits, and the bound is lower by what that can change (`slack`). Which place of a query's rows one
takes is left to chance; the set is not, and their exact scores decide.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alure.kernels.backend import on_device
from alure.kernels.neighbors.pairs import pair_blocks
from alure.kernels.neighbors.scores import MISSING, Search, decode

CAPACITY = 256  # rows that a query may nominate; of more it is searched in the other way
WIDEST = 256  # vectors whose queries stay in shared memory
NUM_WARPS = 8


@triton.jit
def nominate_kernel(
    p_queries, p_database, p_bias, p_list_offsets, p_list_norm,
    p_pair_query, p_block_list, p_block_first, p_block_last,
    p_floor, p_slack, p_count, p_rows, D: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    i_list = tl.load(p_block_list + i_block)
    o_pair = tl.load(p_block_first + i_block) + tl.arange(0, BLOCK_M)
    m_pair = o_pair < tl.load(p_block_last + i_block)
    i_query = tl.load(p_pair_query + o_pair, mask=m_pair, other=0)
    floor = tl.load(p_floor + i_query, mask=m_pair, other=float("inf"))
    bound = floor - tl.load(p_slack + i_query, mask=m_pair, other=0.0) * tl.load(p_list_norm + i_list)
    begin = tl.load(p_list_offsets + i_list)
    end = tl.load(p_list_offsets + i_list + 1)

    o_d = tl.arange(0, BLOCK_D)
    m_q = m_pair[:, None] if D == BLOCK_D else m_pair[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_queries + i_query[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    for start in range(begin, end, BLOCK_N):  # loop: rows
        o_row = start + tl.arange(0, BLOCK_N)
        m_row = o_row < end
        m_x = m_row[:, None] if D == BLOCK_D else m_row[:, None] & (o_d < D)[None, :]
        b_x = tl.load(p_database + o_row[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
        score = tl.dot(b_q, tl.trans(b_x), input_precision="tf32")
        if FACTOR != 1:
            score = score * FACTOR + tl.load(p_bias + o_row, mask=m_row, other=0.0)[None, :]
        top = tl.max(score, axis=1, keep_dims=True)
        if tl.max((top >= bound[:, None]).to(tl.int32)) > 0:  # rare
            passed = (score >= bound[:, None]) & m_pair[:, None] & m_row[None, :]
            p_counts = p_count + tl.broadcast_to(i_query[:, None], [BLOCK_M, BLOCK_N])
            place = tl.atomic_add(p_counts, 1, mask=passed, sem="relaxed")
            p_place = p_rows + i_query[:, None] * CAPACITY + place
            tl.store(p_place, tl.broadcast_to(o_row[None, :], [BLOCK_M, BLOCK_N]), mask=passed & (place < CAPACITY))


def _tile(width: int) -> dict[str, int]:
    """Blocks whose queries and staged rows fit the shared memory of an A100."""
    block_m, block_n = (128, 32) if width <= 128 else (64, 32)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": width}


def _aot_case(width: int, factor: int) -> tuple[Any, ...]:
    signature = {
        "p_queries": "*fp32:16", "p_database": "*fp32:16", "p_bias": "*fp32:16", "p_list_offsets": "*i64:16",
        "p_list_norm": "*fp32:16", "p_pair_query": "*i64:16", "p_block_list": "*i64:16", "p_block_first": "*i64:16",
        "p_block_last": "*i64:16", "p_floor": "*fp32:16", "p_slack": "*fp32:16", "p_count": "*i32:16",
        "p_rows": "*i64:16",
    }  # fmt: skip
    tile = _tile(width)
    facts = {
        "name": f"nominate {width}" + (" l2" if factor == 2 else ""),
        "loops": {"rows": tile["BLOCK_M"] * tile["BLOCK_N"]},
    }
    options = {"num_warps": NUM_WARPS, "num_stages": _stages(width)}
    return nominate_kernel, signature, {"D": width, "FACTOR": factor, **tile, "CAPACITY": CAPACITY}, options, facts


def _stages(width: int) -> int:
    return 3 if width <= 128 else 2


AHEAD_OF_TIME = [_aot_case(64, 1), _aot_case(64, 2), _aot_case(128, 1), _aot_case(256, 1)]


def nominates(width: int) -> bool:
    """Whether the kernel takes vectors of this width."""
    return width <= WIDEST


class Bounds:
    """How far the products of a search in tf32 may be off.

    Of two float32 numbers, cut to 11 bits each, to the nearest or towards zero, the product is off by less than 2⁻⁹ of
    itself, so a score by less than 2⁻⁹·|q|·|x| and what sums in float32 lose. What underflows is in 2⁻⁶⁰·(|x| + 2⁻⁶⁰).
    """

    def __init__(self, task: Search) -> None:
        self.task, self.width = task, task.queries.shape[1]
        counts = task.list_offsets[1:] - task.list_offsets[:-1]
        lists = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        norms = task.database.norm(dim=1)
        self.list_norm = norms.new_zeros(len(counts)).scatter_reduce_(0, lists, norms, "amax") + 2.0**-60
        self.bias = -task.database.square().sum(dim=1) if task.metric == "l2" else norms

    def of(self, part: slice, kth: Tensor) -> tuple[Tensor, Tensor]:
        """(floor, slack) [queries] float32: a row of a list scores less than floor − slack · the list's norm only if
        its exact score is below `kth`. In l2 the kernel's score is 2·q·x − |x|², |q|² above the negated square.
        """
        lost = (self.width + 8) * 2.0**-21
        lengths = self.task.queries[part].norm(dim=1)
        slack = lengths * (1.01 * (2.0**-9 + lost)) + 2.0**-60
        if self.task.metric == "ip":
            return kth - kth.abs() * 2.0**-23, slack
        squares = self.task.queries[part].square().sum(dim=1)
        return kth + squares - (kth.abs() + squares) * lost, 2 * slack + self.list_norm.max() * lost


def nominate(task: Search, bounds: Bounds, part: slice, probes: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(rows [n, CAPACITY] int64 that may be among the k best of the queries in `part`, −1 for none; the queries that
    nominated too many, or of which fewer than k rows are known: to those no row is given).

    keys: [n, ≥ k] int64 of exact scores, the best so far, best first; probes: [n, p], the lists to look at.
    """
    queries = task.queries[part]
    block_d = max(16, triton.next_power_of_2(bounds.width))
    tile = _tile(block_d)
    count = torch.zeros(len(queries), dtype=torch.int32, device=queries.device)
    rows = torch.full((len(queries), CAPACITY), -1, dtype=torch.int64, device=queries.device)
    known = keys[:, k - 1] != MISSING
    floor, slack = bounds.of(part, decode(keys[:, k - 1])[0])
    blocks = pair_blocks(task.list_offsets, probes, tile["BLOCK_M"])
    if len(blocks.list):
        with on_device(queries):
            nominate_kernel[(len(blocks.list),)](
                queries, task.database, bounds.bias, task.list_offsets, bounds.list_norm,
                blocks.order // probes.shape[1], blocks.list, blocks.first, blocks.last,
                torch.where(known, floor, torch.inf), slack, count, rows, D=bounds.width,
                FACTOR=1 if task.metric == "ip" else 2, **tile, CAPACITY=CAPACITY,
                num_warps=NUM_WARPS, num_stages=_stages(block_d),
            )  # fmt: skip
    again = (~known | (count > CAPACITY)).nonzero().squeeze(1)
    rows[again] = -1
    return torch.where(rows == task.exclude_row[part, None], -1, rows), again
