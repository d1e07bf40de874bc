"""The social graph (BFF): a user's neighbours are those it follows."""

import numpy as np
import pyarrow as pa

from alure.engine.graph.follows import Follows
from alure.engine.graph.similarity import SimilarityGraph

COMPARED = 1 << 23  # followed users held at once when follow sets are compared


def social_graph(follows: Follows, user_ids: pa.Array, countries: pa.Array, k: int) -> SimilarityGraph:
    """Every user's k most similar followed users; a user who follows nobody has none.

    similarity(u, v) = (1 + [v follows u] + |F(u) ∩ F(v)| / |F(u) ∪ F(v)|) / 3 for v in F(u), the users u follows:
    from 1/3 for a one-sided follow of a stranger, towards 1 for mutual follows in the same circle. Equal similarities:
    the lower row first.
    """
    adjacency = follows.adjacency
    n = len(user_ids)
    degree = np.diff(adjacency.indptr)
    source = np.repeat(np.arange(n, dtype=np.int64), degree)
    target = adjacency.indices.astype(np.int64)
    edges = source * n + target  # ascending, as the rows and their columns are
    place = np.minimum(np.searchsorted(edges, target * n + source), max(len(edges) - 1, 0))
    mutual = edges[place] == target * n + source
    common = _common(follows, source, target)
    jaccard = common / np.maximum(degree[source] + degree[target] - common, 1)
    similarity = ((1.0 + mutual + jaccard) / 3.0).astype(np.float32)

    order = np.lexsort((target, -similarity, source))
    rank = np.arange(len(order)) - np.repeat(adjacency.indptr[:-1], degree)
    kept = order[rank < k]
    offsets = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.minimum(degree, k), out=offsets[1:])
    return SimilarityGraph(user_ids, countries, offsets, target[kept].astype(np.int32), similarity[kept])


def _common(follows: Follows, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """|F(u) ∩ F(v)| of every edge, in blocks of bounded total degree."""
    adjacency = follows.adjacency
    degree = np.diff(adjacency.indptr)
    work = np.cumsum(degree[source] + degree[target], dtype=np.int64)
    common = np.zeros(len(source))
    first = 0
    while first < len(source):
        done = work[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(work, done + COMPARED, side="right")))
        both = adjacency[source[first:last]].multiply(adjacency[target[first:last]])
        common[first:last] = both.sum(axis=1)
        first = last
    return common
