"""Neighbours brought up to date: only users whose embedding changed, and those whose lists they enter or leave.

The lists of all others stay as they are. With the same clusters the result is that of a search for everybody, to the
bit: an unchanged user searches the same clusters, so whoever was not among its k best then is not better now, unless it
changed itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.graph.engines import Engine

NOBODY, LOST = -1, -2


@dataclass(frozen=True)
class Lists:
    """The neighbours of one country's users when its graph was built: rows of it, NOBODY where there are fewer."""

    user_ids: pa.Array
    embeddings: np.ndarray  # float32 [n, d]
    similarities: np.ndarray  # float32 [n, k]
    neighbors: np.ndarray  # int64 [n, k]


@dataclass(frozen=True)
class Before:
    """What today's rows had then: `neighbors` are rows of today, or LOST for a user who changed or left."""

    unchanged: np.ndarray  # bool [n]
    similarities: np.ndarray  # float32 [n, k]
    neighbors: np.ndarray  # int64 [n, k]


def compare(then: Lists, user_ids: pa.Array, embeddings: np.ndarray, rows: np.ndarray) -> Before:
    """`rows`: the places of today's rows among `user_ids`, whose order is that of then."""
    places = pc.fill_null(pc.index_in(user_ids.take(pa.array(rows)), value_set=then.user_ids), -1).to_numpy()
    known = np.flatnonzero(places >= 0)
    unchanged = np.zeros(len(rows), bool)
    for block in np.split(known, range(1 << 16, len(known), 1 << 16)):
        unchanged[block] = (embeddings[rows[block]] == then.embeddings[places[block]]).all(axis=1)
    kept = np.flatnonzero(unchanged)
    today = np.full(len(then.user_ids) + 1, LOST, np.int64)
    today[places[kept]] = kept
    today[NOBODY] = NOBODY  # the last: who is nobody stays nobody
    k = then.neighbors.shape[1]
    similarities = np.full((len(rows), k), -np.inf, np.float32)
    neighbors = np.full((len(rows), k), NOBODY, np.int64)
    similarities[kept] = then.similarities[places[kept]]
    neighbors[kept] = today[then.neighbors[places[kept]]]
    return Before(unchanged, similarities, neighbors)


def nothing_before(n: int, k: int) -> Before:
    return Before(np.zeros(n, bool), np.full((n, k), -np.inf, np.float32), np.full((n, k), NOBODY, np.int64))


def update(
    engine_of: Callable[[np.ndarray | None], Engine], before: Before, step: int, done: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(similarities [n, k], rows [n, k], users searched anew).

    engine_of(members) searches these rows only (None: all). step: rows searched at once; done(rows): so many are done.
    """
    similarities, neighbors = before.similarities.copy(), before.neighbors.copy()
    changed, same = np.flatnonzero(~before.unchanged), np.flatnonzero(before.unchanged)
    anew = [changed]
    among_changed = engine_of(changed) if len(changed) and len(same) else None
    for rows in np.split(same, range(step, len(same), step)):
        if among_changed is not None or (neighbors[rows] == LOST).any():
            doubtful = _merge(among_changed, rows, similarities, neighbors)
            anew.append(rows[doubtful])
            done(len(rows) - int(doubtful.sum()))
        else:
            done(len(rows))
    again = np.sort(np.concatenate(anew))
    if len(again):
        everybody = engine_of(None)
        for rows in np.split(again, range(step, len(again), step)):
            similarities[rows], neighbors[rows] = everybody.search(rows)
            done(len(rows))
    return similarities, neighbors, len(again)


def _merge(
    among_changed: Engine | None, rows: np.ndarray, similarities: np.ndarray, neighbors: np.ndarray
) -> np.ndarray:
    """Put what is found among the changed users into the lists of unchanged `rows`; whose lists may lack others.

    A list that lost users may lack one that was not among the k best then. It does not where its k-th is still as good
    as the k-th then. Cosines that were rounded to 1 have lost their order: such lists are searched anew when touched.
    """
    doubtful = np.zeros(len(rows), bool)
    k = similarities.shape[1]
    found, near = among_changed.search(rows) if among_changed else (similarities[rows, :0], neighbors[rows, :0])
    lost = (neighbors[rows] == LOST).any(axis=1)
    entered = (near[:, :1] >= 0).any(axis=1) & (found[:, :1] >= similarities[rows, -1:]).any(axis=1)
    touched = np.flatnonzero(lost | entered)
    rows, found, near, lost = rows[touched], found[touched], near[touched], lost[touched]
    D, I = similarities[rows], neighbors[rows]
    full, last = I[:, -1] != NOBODY, D[:, -1]
    all_D = np.concatenate([np.where(I >= 0, D, -np.inf), np.where(near >= 0, found, -np.inf)], axis=1)
    all_I = np.concatenate([np.where(I >= 0, I, NOBODY), near], axis=1)
    order = np.lexsort((all_I, -all_D), axis=1)[:, :k]
    similarities[rows] = np.take_along_axis(all_D, order, 1)
    neighbors[rows] = np.take_along_axis(all_I, order, 1)
    new_last = similarities[rows, -1]
    as_good = (new_last > last) | ((new_last == last) & (order[:, -1] < k))
    doubtful[touched] = (lost & full & ~as_good) | (D[:, 0] >= 1.0)
    return doubtful
