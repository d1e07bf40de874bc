"""Embeddings averaged over the last generations, when they are read; what is stored stays each generation's own.

A mean over the last few (SUM serves one, arXiv 2311.09544) lets readers follow a retrained model slowly, and it takes
out noise, where a night has any. An average that was stored would be averaged again by the next, a mean of means
without an end, and a user carried forward could no longer be told from one whose embedding was made anew.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc

from alure.engine.errors import InputError
from alure.engine.store.embedding_store import EmbeddingMatrix, EmbeddingStore
from alure.engine.store.generations import Generation


def last_generations(store: EmbeddingStore, newest: Generation, count: int) -> list[Generation]:
    """`newest` and at most count − 1 generations that were published before it, newest first; none of a later as_of.

    Raises InputError where they do not lie in one space.
    """
    published = [g for g in store.generations("embeddings") if g.as_of <= newest.as_of]
    end = [g.generation for g in published].index(newest.generation) + 1
    chosen = published[max(0, end - count) : end][::-1]
    other = next((g for g in chosen if g.space != newest.space), None)
    if other is not None:
        raise InputError(
            f"average: generation {other.generation} is in the space of model {other.space[:12]}, {newest.generation} "
            f"in that of {newest.space[:12]}; only one space is averaged. Turn the new model onto the old one's "
            f"(`alure align`) and refresh, or average {chosen.index(other)} at most"
        )
    return chosen


def read_average(store: EmbeddingStore, generations: Sequence[Generation]) -> EmbeddingMatrix:
    """The users of generations[0], and the directions of their embeddings' means over all, newest first.

    An embedding that was carried forward, to the bit, counts once; a user who has but one keeps its bits.
    """
    newest, *earlier = generations
    matrix = store.read_matrix(newest)
    last, total, several = matrix.values, matrix.values.copy(), np.zeros(len(matrix.values), bool)
    for generation in earlier:
        before = store.read_matrix(generation)
        place = pc.fill_null(pc.index_in(matrix.user_ids, value_set=before.user_ids), -1).to_numpy()
        known = np.flatnonzero(place >= 0)
        values = before.values[place[known]]
        other = (values != last[known]).any(axis=1)
        total[known[other]] += values[other]
        several[known[other]] = True
        last[known] = values
    k, d = (int(newest.properties[name]) for name in ("k", "d"))
    sums = total[several].reshape(-1, k, d)
    total[several] = (sums / np.maximum(np.linalg.norm(sums, axis=-1, keepdims=True), 1e-12)).reshape(-1, k * d)
    return EmbeddingMatrix(matrix.user_ids, matrix.countries, total)


def graph_generations(store: EmbeddingStore, generation: str) -> list[str]:
    """The generations whose embeddings the graph `alure` of a generation is of, newest first."""
    graph = store.log.find(generation, "graph", "alure")
    return [generation] if graph is None else graph.properties.get("averaged", [generation])


def graph_vectors(store: EmbeddingStore, generation: str) -> EmbeddingMatrix:
    """What that graph was searched in. InputError where a generation that it averages is not published any more."""
    return read_average(store, [store.published(name, "embeddings") for name in graph_generations(store, generation)])
