"""How far a generation lies from the one before it, measured on users of both before it is published.

Norms are not measured: embeddings are of length 1. What a rotation of the whole space moves is the cosine alone; the
overlap of neighbours is what a graph or a search over the embeddings would notice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.config import DriftConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.progress import say
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.vectors import flat

LOOKED_UP = 4  # users an anchor: not all have a row in both generations, and those without news come first
TIE = 1e-6  # cosines closer than this are one
BLOCK = 1_024  # anchors whose neighbours are found at once
LOW = 0.05


@dataclass(frozen=True)
class Drift:
    """A new generation beside an earlier one. cosine: of a user's embedding with its earlier one, mean over slots."""

    earlier: str  # generation
    anchors: int
    unchanged: int  # of them have as many events as then
    mean_cosine: float
    low_cosine: float  # the 5 % quantile
    neighbor_overlap: float  # share of an anchor's k nearest anchors that were among its k nearest then


def check_drift(
    store: EmbeddingStore, new: Generation, users: Sequence[int | str], config: DriftConfig
) -> Drift | None:
    """Measure `new`, whose rows are written and not published, against the newest generation up to its as_of.

    users: of whom anchors are taken, in this order, those without news first. None where there is nothing to compare.
    Raises AlureError where a threshold is missed, InputError where one is set and the two cannot be compared.
    """
    earlier = [g for g in store.generations("embeddings") if g.as_of <= new.as_of and g.generation != new.generation]
    if not config.anchors or not earlier:
        return None
    then, gated = earlier[-1], config.min_cosine is not None or config.min_overlap is not None
    problem, drift = _incomparable(then, new), None
    if not problem:
        drift = measure_drift(store, then, new, users, config)
        problem = "" if drift else "no two users have an embedding in both"
    if problem:
        said = f"refresh: generation {new.generation} cannot be compared with {then.generation}: {problem}"
        if gated:
            raise InputError(f"{said}; nothing was published. --allow-drift publishes it as it is")
        say(said)
    if drift:
        _refuse(drift, then, new, config)
    return drift


def measure_drift(
    store: EmbeddingStore, then: Generation, new: Generation, users: Sequence[int | str], config: DriftConfig
) -> Drift | None:
    """The figures, or None where fewer than two of the users have a row in both generations."""
    columns = ["user_id", "num_events", "embedding"]
    before, after = (store.read_written(g.generation, users, columns) for g in (then, new))
    place = pc.index_in(after["user_id"], value_set=before["user_id"].combine_chunks())
    after, before = after.filter(place.is_valid()), before.take(place.drop_null())
    unchanged = pc.equal(before["num_events"], after["num_events"]).to_numpy()
    order = pc.index_in(after["user_id"], value_set=pa.array(users, after["user_id"].type)).to_numpy()
    anchors = np.lexsort((order, ~unchanged))[: config.anchors]
    if len(anchors) < 2:
        return None
    shape = (len(anchors), int(new.properties["k"]), int(new.properties["d"]))
    a, b = (_units(flat(rows["embedding"].take(pa.array(anchors)).combine_chunks()), shape) for rows in (before, after))
    cosines = (a * b).sum(-1).mean(-1)
    return Drift(
        earlier=then.generation,
        anchors=len(anchors),
        unchanged=int(unchanged[anchors].sum()),
        mean_cosine=float(cosines.mean()),
        low_cosine=float(np.quantile(cosines, LOW)),
        neighbor_overlap=neighbor_overlap(a.reshape(len(a), -1), b.reshape(len(b), -1), config.k),
    )


def neighbor_overlap(before: np.ndarray, after: np.ndarray, k: int) -> float:
    """Mean share of a row's k nearest rows by `after` that are among its k nearest by `before`, as similar ones are.

    before, after: [n >= 2, d], compared by inner products in float32, whose errors are below TIE; k is cut to n − 1.
    """
    n, kept = len(before), 0.0
    before, after = before.astype(np.float32), after.astype(np.float32)
    k = min(k, n - 1)
    for first in range(0, n, BLOCK):
        rows = np.arange(first, min(first + BLOCK, n))
        then, now = before[rows] @ before.T, after[rows] @ after.T
        then[rows - first, rows] = now[rows - first, rows] = -np.inf
        least = np.partition(then, n - k, axis=1)[:, n - k, None]
        nearest = np.argpartition(now, n - k, axis=1)[:, n - k :]
        kept += (np.take_along_axis(then, nearest, 1) >= least - TIE).sum() / k
    return float(kept / n)


def _units(values: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """float64 [n, k, d], each of length 1 or 0: stored as float16 or int8 they are a little off."""
    each = values.astype(np.float64).reshape(shape)
    return each / np.maximum(np.linalg.norm(each, axis=-1, keepdims=True), 1e-12)


def _incomparable(then: Generation, new: Generation) -> str:
    shapes = [tuple(g.properties[name] for name in ("k", "d")) for g in (then, new)]
    return (
        ""
        if shapes[0] == shapes[1]
        else "it has {} × {} values a user, this one {} × {}".format(*shapes[0], *shapes[1])
    )


def _refuse(drift: Drift, then: Generation, new: Generation, config: DriftConfig) -> None:
    """Raise AlureError where a threshold is missed."""
    limits = {"mean_cosine": ("min_cosine", config.min_cosine), "neighbor_overlap": ("min_overlap", config.min_overlap)}
    missed = [
        f"{name} {getattr(drift, name):.4g}, expected at least {limit:g} (refresh.drift.{option})"
        for name, (option, limit) in limits.items()
        if limit is not None and getattr(drift, name) < limit
    ]
    if not missed:
        return
    remedy = "--allow-drift publishes it as it is"
    if new.space != then.space:
        remedy = (
            f"Its model is not in that space: `alure align MODEL EVENTS --to EARLIER_MODEL --out …` first, or {remedy}"
        )
    raise AlureError(
        f"refresh: generation {new.generation} has drifted from {then.generation} on {drift.anchors:,} users: "
        f"{'; '.join(missed)}. Nothing was published, what was written stays for another run. {remedy}"
    )
