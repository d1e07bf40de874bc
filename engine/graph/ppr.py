"""Personalized PageRank from every user over the follow graph (Jeh and Widom 2003), by sparse power iteration."""

from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array, diags_array, eye_array

from alure.engine.graph.follows import Follows
from alure.engine.graph.similarity import SimilarityGraph
from alure.engine.progress import track

EXACT_USERS = 8192  # above, walks are pruned: the exact iteration costs users × follows
BLOCK_ENTRIES = 1 << 18  # (source, user) pairs held at once by the exact iteration: 2 MiB an array
PRUNED_ENTRIES = 1 << 22
TOLERANCE = 1e-6  # of a source's probabilities, summed over users, in the exact iteration
CHECK_STEPS = 4
PRUNE = 1e-4


@dataclass(frozen=True)
class PageRanks:
    """rows [n, k] (−1 = none) and probabilities [n, k], best first.

    lost_mass: the largest probability that a source's pruned walks kept from their ends; mean_lost_mass: the mean over
    sources; 0 where nothing was pruned. No probability is too small by more than its source's.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    lost_mass: float
    mean_lost_mass: float


def ppr_graph(
    follows: Follows, user_ids: pa.Array, countries: pa.Array, k: int, *, alpha: float = 0.15
) -> tuple[SimilarityGraph, PageRanks]:
    """Every user's k others of largest Personalized PageRank; similarity = probability ÷ the best one's, in (0, 1].

    alpha: the probability of a restart at each step. Up to EXACT_USERS users by exact iteration, more by pruned walks.
    """
    prune = PRUNE if len(user_ids) > EXACT_USERS else 0.0
    ranks = personalized_pagerank(follows.adjacency, k, alpha=alpha, prune=prune)
    best = np.where(ranks.rows[:, :1] >= 0, ranks.probabilities[:, :1], 1.0)
    similarities = np.where(ranks.rows >= 0, ranks.probabilities / best, -np.inf)
    return SimilarityGraph.from_topk(user_ids, countries, similarities, ranks.rows), ranks


def personalized_pagerank(adjacency: csr_array, k: int, *, alpha: float = 0.15, prune: float = 0.0) -> PageRanks:
    """Top k of p = α Σ_t (1 − α)^t e_s P^t for every source s, the source itself left out; ties to the lower row.

    P: `adjacency` with rows divided by their sums. A walk that reaches a user without follows restarts at its source,
    as in networkx. prune: walks at user u with less probability than prune · follows of u stop there (Andersen, Chung
    and Lang 2006), which bounds a source's work by 1 ÷ (α · prune) whatever the graph; 0 keeps all, exact to TOLERANCE.
    Memory is bounded: sources go in blocks.
    """
    n = adjacency.shape[0]
    degree = np.diff(adjacency.indptr)
    transition = (diags_array(1.0 / np.maximum(degree, 1)) @ adjacency).tocsr() if n else adjacency
    rows = np.full((n, k), -1, dtype=np.int64)
    probabilities = np.zeros((n, k))
    lost = np.zeros(n)
    block = max(1, BLOCK_ENTRIES // max(n, 1)) if prune == 0 else max(1, int(PRUNED_ENTRIES / min(n, 1 / prune)))
    backward = transition.T.tocsr()
    with track("Walking the follow graph", n, "users") as bar:
        for first in range(0, n, block):
            sources = np.arange(first, min(first + block, n))
            if prune == 0:
                best = _best_of(_walk(backward, degree == 0, sources, alpha), sources, k)
            else:
                reached, lost[sources] = _walk_pruned(transition, degree, sources, alpha, prune)
                best = _best(reached, sources, k)
            rows[sources], probabilities[sources] = best
            bar.advance(len(sources))
    return PageRanks(rows, probabilities, float(lost.max(initial=0.0)), float(lost.mean()) if n else 0.0)


def _walk(backward: csr_array, dangling: np.ndarray, sources: np.ndarray, alpha: float) -> np.ndarray:
    """Probabilities [sources, n] by power iteration that stops when walking on changes nothing.

    Once a step moves the walkers' distribution x_t by δ (L1), the rest of the series, (1 − α)^t Σ α(1 − α)^τ x_{t + τ},
    is (1 − α)^t x_t to within (1 − α)^t δ (1 − α) ÷ α: in a graph that mixes, long before the series itself ends.
    """
    columns = np.arange(len(sources))
    walking = np.zeros((backward.shape[0], len(sources)))  # [n, sources], each column a distribution
    walking[sources, columns] = 1.0
    reached = np.zeros_like(walking)
    remaining = 1.0
    ends = np.flatnonzero(dangling)
    for step in count():
        onward = backward @ walking
        onward[sources, columns] += walking[ends].sum(axis=0)
        if step % CHECK_STEPS == 0:
            moved = float(np.abs(onward - walking).sum(axis=0).max())
            if remaining * moved * (1 - alpha) / alpha <= TOLERANCE:
                break
        reached += (remaining * alpha) * walking
        walking, remaining = onward, remaining * (1 - alpha)
    reached += remaining * walking
    return np.ascontiguousarray(reached.T)


def _walk_pruned(
    transition: csr_array, degree: np.ndarray, sources: np.ndarray, alpha: float, prune: float
) -> tuple[csr_array, np.ndarray]:
    """(probabilities [sources, n], probability that stopped walks kept from others [sources])."""
    home = eye_array(transition.shape[0], format="csr")[sources]
    dangling = (degree == 0).astype(np.float64)
    least = prune * np.maximum(degree, 1)
    reached = csr_array(home.shape)
    stopped = csr_array(home.shape)
    walking = home
    while walking.nnz:
        present = (walking + stopped).tocsr()
        goes = present.data >= least[present.indices]
        going, stopped = _part(present, goes), _part(present, ~goes)
        reached = reached + alpha * going
        walking = (1 - alpha) * (going @ transition + diags_array(going @ dangling) @ home).tocsr()
    reached = reached + alpha * stopped
    return reached.tocsr(), (1 - alpha) * np.asarray(stopped.sum(axis=1)).ravel()


def _part(matrix: csr_array, chosen: np.ndarray) -> csr_array:
    """`matrix` with only the chosen of its stored entries."""
    before = np.concatenate([[0], np.cumsum(chosen)])
    return csr_array((matrix.data[chosen], matrix.indices[chosen], before[matrix.indptr]), shape=matrix.shape)


def _best_of(reached: np.ndarray, sources: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of every row of a dense array."""
    kept = min(k + 1, reached.shape[1])  # one more: the source is among them
    least = np.partition(reached, -kept, axis=1)[:, -kept]
    return _best(csr_array(np.where(reached >= least[:, None], reached, 0.0)), sources, k)


def _best(reached: csr_array, sources: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, probabilities) of the k largest of every row, its source left out; ties to the lower row."""
    candidate = reached.data > 0
    for begin, end in pairwise(reached.indptr.tolist()):
        if end - begin > k + 1:  # sort only what may be among the k best
            values = reached.data[begin:end]
            candidate[begin:end] &= values >= np.partition(values, -k - 1)[-k - 1]
    owner = np.repeat(np.arange(len(sources)), np.diff(reached.indptr))[candidate]
    column, value = reached.indices[candidate], reached.data[candidate]
    other = column != sources[owner]
    owner, column, value = owner[other], column[other], value[other]
    order = np.lexsort((column, -value, owner))
    counts = np.bincount(owner, minlength=len(sources))
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = order[place < k]
    rows = np.full((len(sources), k), -1, dtype=np.int64)
    probabilities = np.zeros((len(sources), k))
    at = owner[kept], place[place < k]
    rows[at], probabilities[at] = column[kept], value[kept]
    return rows, probabilities
