"""Evaluates a generation's candidate sets on future engagements: recall, NDCG, hit rate, coverage, each with its
confidence interval over users, and paired differences against the baselines.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.config import EvaluationConfig
from alure.engine.evaluation import metrics
from alure.engine.evaluation.ranking import measure_ranking
from alure.engine.evaluation.slices import Slice, by_history, by_popularity, describe, measure_slice
from alure.engine.evaluation.truth import NO_ENGAGEMENT, Relevance, engagements, indices, read_truth, relevance
from alure.engine.events import Events
from alure.engine.progress import say
from alure.engine.store import EmbeddingMatrix, EmbeddingStore, Generation

POPULARITY = "popularity"
METRICS = {"recall": metrics.recall, "ndcg": metrics.ndcg, "hit_rate": metrics.hit_rate}


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured (JSON-able). What could not be measured says why in `reasons`, and is None where it would be.

    sets: one dict a candidate set: name, rows, users_with_candidates, mean_candidates,
        metrics {recall | ndcg | hit_rate: {K: {value, low, high} | None}}, coverage {K: …}, p90_coverage {K: …},
        slices {users: {cold | warm: metrics}, popularity: {1 … 10: metrics}}
    slices: the same keys, with users, pairs and what tells them apart; popularity 1 is the least popular tenth of the
        items to be recalled, by their engagements before the snapshot
    differences: set, baseline, metric, k, value, low, high (paired over the same users), significant
    ne: {task: figures of ranking.measure_ranking | {"reason": …}}
    """

    generation: str
    as_of: int
    k: list[int]
    truth: dict[str, int]
    users: int
    sets: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    ne: dict[str, Any]
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    bootstrap: int = 0


@dataclass
class _Tally:
    """What one pass over a candidate set finds."""

    name: str
    hit_pairs: list[np.ndarray] = field(default_factory=list)
    hit_ranks: list[np.ndarray] = field(default_factory=list)
    slots: dict[int, np.ndarray] = field(default_factory=dict)  # K: list entries of each item of the catalogue
    rows: int = 0
    entries: int = 0
    evaluated_with_candidates: int = 0

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """(position among `Relevance.keys`, rank) of every hit."""
        nothing = np.empty(0, np.int64)
        return np.concatenate([nothing, *self.hit_pairs]), np.concatenate([nothing, *self.hit_ranks])


def evaluate(
    store: EmbeddingStore,
    truth: Path,
    config: EvaluationConfig,
    *,
    events: Events | None = None,
    generation: str | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Measure every candidate set of a generation (None: the newest) and the popularity baseline on `truth`.

    `events` (the log the generation was made from) lets items unknown to the log be counted, coverage be a share of
    all ads, and NE be measured. Raises InputError where the truth cannot be read.
    """
    chosen = store.published(generation, "embeddings")
    embeddings = store.read_matrix(chosen.generation)
    ad_sources = events.manifest.ad_sources if events else None
    rows = read_truth(truth, chosen.as_of, ad_sources)
    wanted = relevance(
        engagements(rows, config.truth_types), embeddings.user_ids, events.items.item_ids if events else None
    )
    ks = sorted(set(config.k))
    names = [g.name for g in store.generations("candidates") if g.generation == chosen.generation]
    catalogue = _catalogue(store, chosen.generation, names, events, chosen.as_of)

    tallies = []
    for name in names:
        say(f"evaluate: {name}")
        tally = _Tally(name)
        for batch in store.iter_candidates(chosen.generation, name, ["user_id", "item_ids"]):
            users = indices(batch["user_id"], embeddings.user_ids)
            _count(tally, users, batch["item_ids"], wanted, catalogue, ks)
        tallies.append(tally)
    popularity = _popularity_tally(store, chosen.generation, embeddings, wanted, catalogue, ks)
    if popularity is not None:
        tallies.append(popularity)

    reasons = {}
    if not tallies:
        reasons["recall"] = f"generation {chosen.generation} has no candidates yet; run `alure retrieve`"
    elif not len(wanted.users):
        reasons["recall"] = _why_nobody(rows.counts, wanted.counts)
    if "recall" in reasons:
        say(f"evaluate: no recall: {reasons['recall']}")
    sets = [_set_figures(tally, len(catalogue), ks) for tally in tallies]
    differences, slices = [], []
    if "recall" not in reasons:
        differences = _measure(tallies, sets, wanted, ks, config.bootstrap, seed)
        slices = _slices(store, chosen, embeddings, wanted, events, config)
        for tally, figures in zip(tallies, sets):
            for part in slices:
                found = measure_slice(part, tally.hits(), wanted, METRICS, ks, config.bootstrap, seed)
                figures["slices"].setdefault(part.kind, {})[part.name] = found
        if events is None:
            reasons["slices by popularity"] = "needs the event log, whose engagements are counted; pass events"
    ne = measure_ranking(rows.table, store, chosen, embeddings, events, config.bootstrap, seed)
    return EvaluationReport(
        generation=chosen.generation,
        as_of=chosen.as_of,
        k=ks,
        truth={**rows.counts, **wanted.counts},
        users=len(wanted.users),
        sets=sets,
        differences=differences,
        ne=ne,
        slices=describe(slices, wanted),
        reasons=reasons,
        bootstrap=config.bootstrap,
    )


def _why_nobody(rows: dict[str, int], matched: dict[str, int]) -> str:
    if not rows["rows"]:
        return "the truth has no rows"
    if not matched["engagements"]:
        left = ", ".join(f"{count:,} {reason}" for reason, count in rows.items() if count and reason != "rows")
        return f"the truth's {rows['rows']:,} rows hold no engagement after the snapshot" + (
            f" ({left})" if left else ""
        )
    return f"none of the truth's {matched['unknown_users']:,} users is in the generation"


def _catalogue(store: EmbeddingStore, generation: str, names: list[str], events: Events | None, as_of: int) -> pa.Array:
    """The ads that coverage is a share of: all with an ad event up to `as_of`; without a log, all of any set."""
    if events is not None:
        return events.items.item_ids.take(pa.array(np.unique(events.engagements(as_of).items))).combine_chunks()
    seen: list[pa.Array] = []
    for name in names:
        batches = store.iter_candidates(generation, name, ["item_ids"])
        seen.extend(pc.unique(pc.list_flatten(batch["item_ids"])) for batch in batches)
    if _has_popularity(store, generation):
        seen.append(pc.unique(pc.list_flatten(store.read_popularity(generation)["item_ids"])))
    return pc.unique(pa.chunked_array(seen)) if seen else pa.array([], pa.int64())


def _count(
    tally: _Tally, users: np.ndarray, lists: pa.Array, wanted: Relevance, catalogue: pa.Array, ks: list[int]
) -> None:
    """Add the lists of a batch of users (rows of the generation, −1 unknown) to the tally."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    tally.rows += len(lengths)
    tally.entries += int(lengths.sum())
    top = pc.list_slice(lists, 0, max(ks))
    lengths = np.minimum(lengths, max(ks))
    items = pc.list_flatten(top)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ranks = np.arange(len(items)) - np.repeat(starts[:-1], lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)

    place = np.searchsorted(wanted.users, users)
    place = np.minimum(place, max(len(wanted.users) - 1, 0))
    evaluated = wanted.users[place] == users if len(wanted.users) else np.zeros(len(users), bool)
    tally.evaluated_with_candidates += int((evaluated & (lengths > 0)).sum())
    mine = evaluated[row]
    if mine.any():
        codes = indices(items.filter(pa.array(mine)), wanted.items)
        hits = metrics.hits_of_lists(place[row[mine]], codes, ranks[mine], wanted.keys, max(len(wanted.items), 1))
        tally.hit_pairs.append(hits[0])
        tally.hit_ranks.append(hits[1])
    if len(catalogue):
        codes = indices(items, catalogue)
        for k in ks:
            shown = np.bincount(codes[(ranks < k) & (codes >= 0)], minlength=len(catalogue))
            tally.slots[k] = tally.slots.get(k, 0) + shown


def _slices(
    store: EmbeddingStore,
    chosen: Generation,
    embeddings: EmbeddingMatrix,
    wanted: Relevance,
    events: Events | None,
    config: EvaluationConfig,
) -> list[Slice]:
    """Of the users' and, where the log is there, the items' past up to the snapshot."""
    users = embeddings.user_ids.take(pa.array(wanted.users))
    rows = store.read_written(chosen.generation, users.to_pylist(), ["user_id", "num_events"])
    num_events = rows["num_events"].to_numpy()[indices(users, rows["user_id"])]
    slices = by_history(num_events, wanted, config.cold_events)
    if events is not None:
        history = events.engagements(chosen.as_of)
        types = np.array([*events.manifest.event_types, ""])[history.event_types]  # −1: none
        counted = ~np.isin(types, NO_ENGAGEMENT) if config.truth_types is None else np.isin(types, config.truth_types)
        engaged = np.bincount(history.items[counted], minlength=len(events.items))
        place = events.item_indices(wanted.items)
        slices += by_popularity(np.where(place >= 0, engaged[place], 0), wanted)
    return slices


def _has_popularity(store: EmbeddingStore, generation: str) -> bool:
    return any(g.generation == generation for g in store.generations("popularity"))


def _popularity_tally(
    store: EmbeddingStore,
    generation: str,
    embeddings: EmbeddingMatrix,
    wanted: Relevance,
    catalogue: pa.Array,
    ks: list[int],
) -> _Tally | None:
    """Popularity as a candidate set: every user's list is that of the user's country."""
    if not _has_popularity(store, generation):
        return None
    table = store.read_popularity(generation)
    of_country = indices(embeddings.countries, table["country"])
    lists = table["item_ids"].combine_chunks()
    tally = _Tally(POPULARITY)
    for country in range(len(lists)):
        members = np.flatnonzero(of_country == country)
        evaluated = members[np.isin(members, wanted.users)]
        one = lists.slice(country, 1)
        for part in np.array_split(evaluated, -(-len(evaluated) // 1024) or 1):
            repeated = one.take(pa.array(np.zeros(len(part), np.int64)))
            _count(tally, part, repeated, wanted, catalogue[:0], ks)
        shown = pc.list_flatten(one)
        codes = indices(shown, catalogue) if len(catalogue) else np.full(len(shown), -1)
        for k in ks:
            counts = np.bincount(codes[:k][codes[:k] >= 0], minlength=len(catalogue)) * len(members)
            tally.slots[k] = tally.slots.get(k, 0) + counts
        tally.rows += len(members) - len(evaluated)
        tally.entries += (len(members) - len(evaluated)) * len(shown)
    return tally


def _set_figures(tally: _Tally, num_ads: int, ks: list[int]) -> dict[str, Any]:
    """What needs no truth; the metrics are filled in by `_measure`."""
    slots = tally.slots if num_ads else {}
    return {
        "name": tally.name,
        "rows": tally.rows,
        "users_with_candidates": tally.evaluated_with_candidates,
        "mean_candidates": tally.entries / tally.rows if tally.rows else 0.0,
        "metrics": {name: {str(k): None for k in ks} for name in METRICS},
        "slices": {},
        "coverage": {str(k): metrics.coverage(slots[k]) if k in slots else None for k in ks},
        "p90_coverage": {str(k): metrics.p90_coverage(slots[k]) if k in slots else None for k in ks},
    }


def _measure(
    tallies: list[_Tally],
    sets: list[dict[str, Any]],
    wanted: Relevance,
    ks: list[int],
    bootstrap: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Fill in every set's metrics with intervals; returns the paired differences. All share the bootstrap samples."""
    columns: dict[tuple[str, str, int], int] = {}
    values: list[np.ndarray] = []
    num_relevant, pair_users = wanted.num_relevant, wanted.pair_users
    for tally in tallies:
        pairs, ranks = tally.hits()
        users = pair_users[pairs]
        for metric, compute in METRICS.items():
            for k in ks:
                columns[tally.name, metric, k] = len(values)
                values.append(compute(users, ranks, num_relevant, k))
    matrix = np.stack(values, axis=1)  # [users, sets × metrics × K]
    means = matrix.mean(0)
    samples = metrics.bootstrap_means(matrix, bootstrap, seed)
    for figures in sets:
        for metric in METRICS:
            for k in ks:
                column = columns[figures["name"], metric, k]
                figures["metrics"][metric][str(k)] = asdict(metrics.interval(means[column], samples[:, column]))
    differences = []
    for name, baseline in _pairs([tally.name for tally in tallies]):
        for metric in METRICS:
            for k in ks:
                a, b = columns[name, metric, k], columns[baseline, metric, k]
                found = metrics.interval(means[a] - means[b], samples[:, a] - samples[:, b])
                apart = found.low > 0 or found.high < 0
                differences.append(
                    {"set": name, "baseline": baseline, "metric": metric, "k": k, **asdict(found), "significant": apart}
                )
    return differences


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """Every set against popularity, and the sets with ALURE against the largest one without."""
    pairs = [(name, POPULARITY) for name in names if name != POPULARITY and POPULARITY in names]
    graphs = [name for name in names if name != POPULARITY]
    without = [name for name in graphs if "alure" not in name.split("+")]
    if without:
        rival = max(without, key=lambda name: len(name.split("+")))
        pairs += [(name, rival) for name in graphs if "alure" in name.split("+")]
    return pairs
