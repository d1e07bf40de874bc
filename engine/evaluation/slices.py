"""The same metrics over parts of the truth: users of short and of long histories, and ads by how popular they were.

A slice is some of the (user, item) pairs to be recalled, measured as if no others were wanted: a mean over the users
that have one, with the ranks of the whole lists.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from alure.engine.evaluation import metrics
from alure.engine.evaluation.truth import Relevance

DECILES = 10


@dataclass(frozen=True)
class Slice:
    """mask: bool [pairs], those of `Relevance.keys` that it holds. facts: what tells it from the others."""

    kind: str  # users or popularity
    name: str
    mask: np.ndarray
    facts: dict[str, int] = field(default_factory=dict)


def by_history(num_events: np.ndarray, wanted: Relevance, cold_events: int) -> list[Slice]:
    """Cold users, of at most `cold_events` events before the snapshot, and warm ones. num_events: int64 [n]."""
    cold = (num_events <= cold_events)[wanted.pair_users]
    facts = {"cold": {"most_events": cold_events}, "warm": {"least_events": cold_events + 1}}
    return [Slice("users", name, mask, facts[name]) for name, mask in (("cold", cold), ("warm", ~cold))]


def by_popularity(popularity: np.ndarray, wanted: Relevance) -> list[Slice]:
    """The items to be recalled in ten parts, least popular first; as many items a part, but that equals are together.

    popularity: int64 [m], engagements before the snapshot.
    """
    decile = deciles(popularity)
    found = []
    for part in range(DECILES):
        items = popularity[decile == part]
        facts = {"items": len(items)}
        if len(items):
            facts |= {"least_engagements": int(items.min()), "most_engagements": int(items.max())}
        found.append(Slice("popularity", str(part + 1), (decile == part)[wanted.pair_items], facts))
    return found


def deciles(values: np.ndarray) -> np.ndarray:
    """int64 [n], 0 to 9: of the mean rank of each value, so that equals share one."""
    ordered = np.sort(values)
    ranks = (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2
    return (DECILES * ranks / max(len(values), 1)).astype(np.int64)


def describe(slices: list[Slice], wanted: Relevance) -> dict[str, dict[str, Any]]:
    """{kind: {name: users, pairs and facts}}."""
    found: dict[str, dict[str, Any]] = {}
    for each in slices:
        users = len(np.unique(wanted.pair_users[each.mask]))
        found.setdefault(each.kind, {})[each.name] = {"users": users, "pairs": int(each.mask.sum()), **each.facts}
    return found


def measure_slice(
    part: Slice,
    hits: tuple[np.ndarray, np.ndarray],
    wanted: Relevance,
    compute: dict[str, Callable[..., np.ndarray]],
    ks: list[int],
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """{metric: {K: {value, low, high} | None}} of one candidate set. hits: (pair, rank) of each, int64 [h]."""
    pairs, ranks = (column[part.mask[hits[0]]] for column in hits)
    users, row = np.unique(wanted.pair_users[part.mask], return_inverse=True)
    if not len(users):
        return {metric: {str(k): None for k in ks} for metric in compute}
    relevant = np.bincount(row)
    rows = np.searchsorted(users, wanted.pair_users[pairs])
    columns = [(metric, k, each(rows, ranks, relevant, k)) for metric, each in compute.items() for k in ks]
    values = np.stack([column for *_, column in columns], axis=1)
    samples = metrics.bootstrap_means(values, bootstrap, seed)
    found: dict[str, dict[str, Any]] = {metric: {} for metric in compute}
    for place, (metric, k, column) in enumerate(columns):
        found[metric][str(k)] = asdict(metrics.interval(column.mean(), samples[:, place]))
    return found
