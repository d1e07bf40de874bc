"""Personalized PageRank from every user over the follow graph (Jeh and Widom 2003), by sparse power iteration."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array, diags_array, eye_array

from alure.engine.graph.follows import Follows
from alure.engine.graph.similarity import SimilarityGraph
from alure.engine.progress import track

WALKERS = 1 << 22  # entries of a block of sources × reached users: about 50 MiB each for a few of them
TOLERANCE = 1e-6  # probability mass still walking when the iteration stops


@dataclass(frozen=True)
class PageRanks:
    """rows [n, k] (−1 = none) and probabilities [n, k], best first. lost_mass: the largest share of probability that a
    source lost to pruning; no probability is off by more.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    lost_mass: float
    mean_lost_mass: float


def ppr_graph(
    follows: Follows, user_ids: pa.Array, countries: pa.Array, k: int, *, alpha: float = 0.15, prune: float = 1e-5
) -> tuple[SimilarityGraph, PageRanks]:
    """Every user's k others of largest Personalized PageRank; similarity = probability ÷ the best one's, in (0, 1].

    alpha: the probability of a restart at each step. prune: a walk with less probability than this is abandoned.
    """
    ranks = personalized_pagerank(follows.adjacency, k, alpha=alpha, prune=prune)
    best = np.where(ranks.rows[:, :1] >= 0, ranks.probabilities[:, :1], 1.0)
    similarities = np.where(ranks.rows >= 0, ranks.probabilities / best, -np.inf)
    return SimilarityGraph.from_topk(user_ids, countries, similarities, ranks.rows), ranks


def personalized_pagerank(adjacency: csr_array, k: int, *, alpha: float = 0.15, prune: float = 1e-5) -> PageRanks:
    """Top k of p = α Σ_t (1 − α)^t e_s P^t for every source s, the source itself left out; ties to the lower row.

    P: `adjacency` with rows divided by their sums. A walk that reaches a user without follows restarts at its source,
    as in networkx. Memory is bounded: sources go in blocks, and a walk never holds more than 1 ÷ prune users.
    """
    n = adjacency.shape[0]
    degree = np.diff(adjacency.indptr)
    transition = (diags_array(1.0 / np.maximum(degree, 1)) @ adjacency).tocsr() if n else adjacency
    rows = np.full((n, k), -1, dtype=np.int64)
    probabilities = np.zeros((n, k))
    lost = np.zeros(n)
    block = max(1, int(WALKERS / max(1.0, min(n, 1.0 / max(prune, 1e-12)))))
    with track("Walking the follow graph", n, "users") as bar:
        for first in range(0, n, block):
            sources = np.arange(first, min(first + block, n))
            reached, lost[sources] = _walk(transition, degree == 0, sources, alpha, prune)
            rows[sources], probabilities[sources] = _best(reached, sources, k)
            bar.advance(len(sources))
    return PageRanks(rows, probabilities, float(lost.max(initial=0.0)), float(lost.mean()) if n else 0.0)


def _walk(
    transition: csr_array, dangling: np.ndarray, sources: np.ndarray, alpha: float, prune: float
) -> tuple[csr_array, np.ndarray]:
    """(probabilities [sources, n], probability lost to pruning [sources])."""
    n = transition.shape[0]
    home = eye_array(n, format="csr")[sources]
    walking = home.copy()
    reached = alpha * walking
    lost = np.zeros(len(sources))
    while walking.nnz and walking.sum(axis=1).max() > TOLERANCE:
        stranded = walking @ dangling.astype(np.float64)
        walking = (1 - alpha) * (walking @ transition + diags_array(stranded) @ home).tocsr()
        faint = walking.data < prune
        if faint.any():
            owner = np.repeat(np.arange(len(sources)), np.diff(walking.indptr))
            lost += np.bincount(owner[faint], weights=walking.data[faint], minlength=len(sources))
            walking.data[faint] = 0.0
            walking.eliminate_zeros()
        reached = reached + alpha * walking
    return reached.tocsr(), lost


def _best(reached: csr_array, sources: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of every row, its source left out."""
    owner = np.repeat(np.arange(len(sources)), np.diff(reached.indptr))
    other = (reached.indices != sources[owner]) & (reached.data > 0)
    owner, column, value = owner[other], reached.indices[other], reached.data[other]
    order = np.lexsort((column, -value, owner))
    counts = np.bincount(owner, minlength=len(sources))
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = place < k
    rows = np.full((len(sources), k), -1, dtype=np.int64)
    probabilities = np.zeros((len(sources), k))
    rows[owner[order[kept]], place[kept]] = column[order[kept]]
    probabilities[owner[order[kept]], place[kept]] = value[order[kept]]
    return rows, probabilities
