"""Eager torch: one matrix product per (list, block of its queries), and a bound that lets most scores be skipped.

Exact by construction: a matrix product only nominates candidates, with a margin for its rounding error; each nominee is
then scored exactly (scores.py), and the k best keys win.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from alure.kernels.neighbors.scores import LOWEST, MISSING, Search, decode, encode, exact_scores

QUERY_BLOCK = 1 << 16  # queries grouped by list at once: bounds the (query, list) pairs held
TILE = 1 << 20  # scores held at once: 4 MiB, a core's share of cache
TILE_COLUMNS = 1 << 12
PENDING = 1 << 20  # nominees held before they are merged: 16 MiB


class RunningTopK:
    """The k best keys of each query so far, and `floor`: no score below it can still enter them."""

    def __init__(self, task: Search, queries: Tensor) -> None:
        count, device = queries.shape[0], queries.device
        self.task, self.queries = task, queries
        self.keys = torch.full((count, task.k), MISSING, dtype=torch.int64, device=device)  # best first
        self.floor = torch.full((count,), -torch.inf, device=device)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.num_pending = 0

    def offer(self, queries: Tensor, rows: Tensor) -> None:
        """Nominate pairs of a query and a database row, each pair once."""
        self.pending.append((queries, rows))
        self.num_pending += queries.numel()
        if self.num_pending >= PENDING:
            self.merge()

    def merge(self) -> None:
        if self.num_pending == 0:
            return
        queries = torch.cat([query for query, _ in self.pending])
        rows = torch.cat([row for _, row in self.pending])
        self.pending, self.num_pending = [], 0
        task, k = self.task, self.task.k
        keys = encode(exact_scores(self.queries, queries, task.database, rows, task.metric), task.rank[rows])
        better = keys > self.keys[queries, -1]
        queries, keys = queries[better], keys[better]
        keys, by_key = keys.sort(descending=True)
        queries, by_query = queries[by_key].sort(stable=True)
        keys = keys[by_query]
        touched, counts = queries.unique_consecutive(return_counts=True)
        group = torch.repeat_interleave(torch.arange(touched.numel(), device=keys.device), counts)
        place = torch.arange(keys.numel(), device=keys.device) - (counts.cumsum(0) - counts)[group]
        kept = place < k
        best = torch.full((touched.numel(), 2 * k), MISSING, dtype=torch.int64, device=keys.device)
        best[:, :k] = self.keys[touched]
        best[group[kept], k + place[kept]] = keys[kept]
        self.keys[touched] = best.sort(dim=1, descending=True).values[:, :k]
        self.floor[touched] = torch.maximum(self.floor[touched], decode(self.keys[touched, -1])[0])


def search(task: Search) -> Tensor:
    """The k best keys of every query, best first, [nq, k] int64 (MISSING where fewer were found)."""
    found = [_search_block(task, start) for start in range(0, task.queries.shape[0], QUERY_BLOCK)]
    return torch.cat(found) if found else torch.empty((0, task.k), dtype=torch.int64, device=task.queries.device)


def _search_block(task: Search, start: int) -> Tensor:
    part = slice(start, start + QUERY_BLOCK)
    queries, probes = task.queries[part], task.probes[part]
    best = RunningTopK(task, queries)
    scan = _Scan(task, queries, task.exclude_row[part], best)
    for first, last in _waves(probes.shape[1]):
        for index, members in _by_list(probes[:, first:last], task.list_offsets.numel() - 1):
            scan.list(index, members)
        best.merge()
    return best.keys


def _waves(nprobe: int) -> Iterator[tuple[int, int]]:
    """Ranges of probe ranks. Probes come nearest first: the early lists set a bound that few later scores pass."""
    edges = [edge for edge in (0, 1, 4, 12) if edge < nprobe] + [nprobe]
    yield from pairwise(edges)


def _by_list(probes: Tensor, nlist: int) -> Iterator[tuple[int, Tensor]]:
    """(list, the queries that probe it in ascending order), for every list that is probed."""
    flat = probes.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=nlist + 1).tolist()
    position = counts[0]  # the −1s come first
    for index, count in enumerate(counts[1:]):
        if count:
            yield index, order[position : position + count] // probes.shape[1]
        position += count


class _Scan:
    """Scores one list against its queries, tile by tile, and offers the nominees."""

    def __init__(self, task: Search, queries: Tensor, exclude_row: Tensor, best: RunningTopK) -> None:
        self.task, self.queries, self.exclude_row, self.best = task, queries, exclude_row, best
        self.offsets = task.list_offsets.tolist()
        self.query_norms = torch.linalg.vector_norm(queries, dim=1).float()
        self.row_norms = torch.linalg.vector_norm(task.database, dim=1).float()
        # In l2 the product gives 2q·x − |x|² = −|q − x|² + |q|²: the queries are doubled, the floor shifted by |q|².
        ip = task.metric == "ip"
        self.factors = queries if ip else 2 * queries
        self.shift = torch.zeros_like(self.query_norms) if ip else self.query_norms.square()
        # Twice the bound d·2⁻²⁴·|q||x| on a float32 product's rounding, and some for the roundings around it.
        self.error = (queries.shape[1] + 16) * 2.0**-23
        self.vanished = (queries.shape[1] + 16) * 2.0**-125  # denormals, also where they are flushed to zero

    def list(self, index: int, members: Tensor) -> None:
        begin, end = self.offsets[index], self.offsets[index + 1]
        if begin == end:
            return
        norm = self.row_norms[begin:end].max()
        columns = min(end - begin, TILE_COLUMNS)
        for rows in members.split(max(1, TILE // columns)):
            norms = self.query_norms[rows]
            product = norms * norm if self.task.metric == "ip" else (norms + norm).square()
            margin = self.error * product + self.vanished
            for first in range(begin, end, columns):
                self.tile(rows, margin, first, min(first + columns, end))

    def tile(self, rows: Tensor, margin: Tensor, first: int, last: int) -> None:
        task, best = self.task, self.best
        database = task.database[first:last]
        scores = (self.factors.index_select(0, rows) @ database.T).float()  # [rows, columns]
        if task.metric == "l2":
            scores -= self.row_norms[first:last].square()
        excluded = self.exclude_row[rows] - first
        hidden = ((excluded >= 0) & (excluded < last - first)).nonzero().squeeze(1)
        scores[hidden, excluded[hidden]] = -torch.inf

        shift = self.shift[rows]
        floor = best.floor[rows]
        fresh = floor == -torch.inf
        if last - first > task.k and bool(fresh.any()):
            kth = scores.topk(task.k, dim=1, sorted=False).values.amin(dim=1) - shift - margin
            floor = torch.where(fresh, kth, floor)
            best.floor[rows] = floor
        threshold = (floor + shift - margin).clamp_(min=LOWEST)
        hits = (scores >= threshold[:, None]).nonzero()
        if hits.shape[0]:
            best.offer(rows[hits[:, 0]], hits[:, 1] + first)


def assign(x: Tensor, centroids: Tensor, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """(D, I) of the nprobe best centroids of every row; scores are one float32 matrix product."""
    scores_out = torch.empty((x.shape[0], nprobe), dtype=torch.float32, device=x.device)
    index_out = torch.empty((x.shape[0], nprobe), dtype=torch.int64, device=x.device)
    squares = centroids.square().sum(dim=1)
    block = max(1, TILE // max(1, centroids.shape[0]))
    for start in range(0, x.shape[0], block):
        part = slice(start, start + block)
        scores = x[part] @ centroids.T
        if metric == "l2":
            scores = 2 * scores - squares - x[part].square().sum(dim=1, keepdim=True)
        best, index_out[part] = _topk_lowest(scores.float(), nprobe)
        scores_out[part] = best if metric == "ip" else (-best).clamp_(min=0)
    return scores_out, index_out


def _topk_lowest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk along the last dimension with ties to the lower index, which torch.topk leaves open."""
    if k == 1:
        best = scores.max(dim=1, keepdim=True)  # of equal maxima torch.max returns the first
        return best.values, best.indices
    more = min(k + 1, scores.shape[1])  # one more shows a tie across the boundary
    values, index = scores.topk(more, dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().squeeze(1)
    if tied.numel():
        whole = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], index[tied] = whole.values[:, :more], whole.indices[:, :more]
    return values[:, :k], index[:, :k]
