"""Personalized PageRank from every user over the follow graph."""

import numpy as np
import pyarrow as pa
import torch

from alure.engine.graph.follows import Follows
from alure.engine.graph.similarity import SimilarityGraph
from alure.engine.progress import track
from alure.kernels import personalized_pagerank

BLOCKS = 50  # of users, each one call: so often progress is shown and an interruption heard
LEAST_BLOCK = 1024


def ppr_graph(
    follows: Follows,
    user_ids: pa.Array,
    countries: pa.Array,
    k: int,
    *,
    alpha: float = 0.15,
    epsilon: float = 1e-4,
) -> tuple[SimilarityGraph, np.ndarray]:
    """Every user's k others of largest Personalized PageRank; similarity = probability ÷ the best one's, in (0, 1].

    alpha: the probability of a restart at each step; a walk that reaches a user without follows restarts too. epsilon:
    walks go on while they would bring a user at least so much of the k-th probability; 0: exact.
    Returns the graph and for every user the probability that walks which stopped earlier kept from others, float32 [n]:
    no probability is too small by more.
    """
    n = len(user_ids)
    offsets = torch.from_numpy(follows.adjacency.indptr.astype(np.int64))
    followed = torch.from_numpy(follows.adjacency.indices.astype(np.int32))
    scores, rows, lost = np.zeros((n, k), np.float32), np.full((n, k), -1), np.zeros(n, np.float32)
    with track("Walking the follow graph", n, "users") as bar:
        for sources in torch.arange(n).split(max(LEAST_BLOCK, n // BLOCKS)):
            if not len(sources):
                break  # nobody: split gives one empty part
            ranks = personalized_pagerank(offsets, followed, None, sources, k, alpha, epsilon)
            for whole, part in zip((scores, rows, lost), ranks):
                whole[sources[0] : sources[-1] + 1] = part.numpy()
            bar.advance(len(sources))
    best = np.where(rows[:, :1] >= 0, scores[:, :1], 1.0)
    similarities = np.where(rows >= 0, scores / best, -np.inf)
    return SimilarityGraph.from_topk(user_ids, countries, similarities, rows), lost
