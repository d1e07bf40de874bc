"""The similarity graph of user embeddings: per country, every user's k nearest others by cosine (paper, section 3)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from alure.engine.clusters import Clusters, blocks, unit_vectors
from alure.engine.config import GraphConfig
from alure.engine.errors import InputError
from alure.engine.graph.auto import auto_nlist, auto_nprobe
from alure.engine.graph.base import Base
from alure.engine.graph.engines import (
    Engine,
    ExactSearch,
    FaissSearch,
    GroupedSearch,
    faiss_gpus,
    import_faiss,
    train_clusters,
)
from alure.engine.graph.similarity import SimilarityGraph
from alure.engine.graph.update import Before, Lists, compare, nothing_before, update
from alure.engine.progress import Track, track

POINTS_PER_CLUSTER = 39  # fewer points than this a centroid make poor clusters (FAISS warns at the same number)
RECALL_SAMPLE = 1000  # users a country whose neighbours are compared with an exact search
TIE = 1e-6  # cosines closer than this are one similarity when recall is counted
SEARCH_ROWS = 16_384  # users between two steps of the progress bar
LEAST_UNCHANGED = 0.5  # of a country's users for an incremental build; with fewer, one anew costs no more
SEARCH_SHARES = 16  # at most this many steps for a large country: each search prepares the database anew

Countries: TypeAlias = Sequence[str] | np.ndarray | pa.Array | pa.ChunkedArray | Sequence[tuple[str, int, int]]


@dataclass(frozen=True)
class CountryReport:
    """How one country was searched. recall: share of the true k nearest that were found, over `recall_sample` users."""

    country: str
    users: int
    zero_vectors: int  # users whose embedding is zero: they have no direction, hence no neighbours
    engine: str
    clusters: int
    nprobe: int
    edges: int
    searched: int  # users searched: all, or in an incremental build those whose list could not be brought up to date
    short: int  # users with fewer than k neighbours
    recall: float
    recall_sample: int
    cluster_seconds: float
    seconds: float
    notes: list[str] = field(default_factory=list)  # where the search differs from what was asked


@dataclass(frozen=True)
class Searched:
    """A graph, how each country was searched, and the clusters of those that were not searched exactly."""

    graph: SimilarityGraph
    countries: list[CountryReport]
    clusters: dict[str, Clusters]


@dataclass(frozen=True)
class _Plan:
    engine: str
    nlist: int
    nprobe: int
    notes: list[str]


@dataclass(frozen=True)
class _Country:
    """One country's users, and what an earlier graph knows of them."""

    name: str
    user_ids: pa.Array
    embeddings: np.ndarray  # float32 [n, d]
    then: Lists | None
    clusters: Clusters | None  # of that graph, or given


def build_similarity_graph(
    embeddings: np.ndarray,
    countries: Countries,
    config: GraphConfig,
    seed: int = 0,
    *,
    user_ids: pa.Array | None = None,
) -> tuple[SimilarityGraph, list[CountryReport]]:
    """Link every user to its config.k nearest others of the same country, and say how each country was searched.

    The arguments and errors are those of `search_countries`.
    """
    searched = search_countries(embeddings, countries, config, seed, user_ids=user_ids)
    return searched.graph, searched.countries


def search_countries(
    embeddings: np.ndarray,
    countries: Countries,
    config: GraphConfig,
    seed: int = 0,
    *,
    user_ids: pa.Array | None = None,
    base: Base | None = None,
    clusters: Mapping[str, Clusters] | None = None,
) -> Searched:
    """Every user's config.k nearest others of the same country.

    embeddings: float32 [n, k·d], the embeddings of a user end to end (normalised here as a whole); countries: a label a
    user, or (name, first row, rows) ranges that tile the users; user_ids: int64 or string [n] (default: the row).
    base: an earlier graph with the same settings, of users in the same order; only what changed since is searched, in
    its clusters, and the result is that of a search of everything in these.
    clusters: by country, instead of clusters trained here.
    The result depends on the arguments and the engine only, not on the order of countries.
    Raises InputError for NaN or infinity (naming users), shapes that do not fit, and an engine that is not installed.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise InputError(f"embeddings: expected floats [n, k·d], got {embeddings.dtype} {list(embeddings.shape)}")
    n = len(embeddings)
    ids = pa.array(np.arange(n)) if user_ids is None else user_ids
    if len(ids) != n:
        raise InputError(f"user_ids: expected one for each of the {n:,} embeddings, got {len(ids):,}")
    if config.search == "faiss":
        import_faiss()  # fail before the work, not after
    labels, parts = by_country(countries, n)
    _check_finite(embeddings, ids)
    similarities = np.full((n, config.k), -np.inf, dtype=np.float32)
    neighbors = np.full((n, config.k), -1, dtype=np.int64)
    reports, kept = [], {}
    given = base.clusters if base else clusters or {}
    with track("Searching neighbours", n, "users") as bar:
        for name, rows in parts:
            then = base.lists(name, config.k) if base else None
            country = _Country(name, ids.take(pa.array(rows)), embeddings[rows], then, given.get(name))
            D, I, report, own = _search_country(country, config, seed, bar)
            if own is not None:
                kept[name] = own
            found = I >= 0
            similarities[rows] = np.where(found, np.clip(D, -1.0, 1.0), -np.inf)
            neighbors[rows] = np.where(found, rows[I], -1)
            reports.append(report)
    return Searched(SimilarityGraph.from_topk(ids, labels, similarities, neighbors), reports, kept)


def by_country(countries: Countries, n: int) -> tuple[pa.Array, list[tuple[str, np.ndarray]]]:
    """(a label a user, [(country, its rows ascending)] by name)."""
    if isinstance(countries, Sequence) and len(countries) and isinstance(countries[0], tuple):
        ranges = [(str(each[0]), int(each[1]), int(each[2])) for each in countries]
        ends = [0, *(first + count for _, first, count in ranges)]
        if [first for _, first, _ in ranges] != ends[:-1] or ends[-1] != n or any(count < 0 for *_, count in ranges):
            raise InputError(f"countries: expected ranges that tile the {n:,} users in order, got {ranges[:5]}")
        labels = pa.array(np.repeat([name for name, *_ in ranges], [count for *_, count in ranges]), pa.string())
    else:
        labels = countries.combine_chunks() if isinstance(countries, pa.ChunkedArray) else pa.array(countries)
        labels = labels.cast(pa.string())
    if len(labels) != n:
        raise InputError(f"countries: expected one for each of the {n:,} embeddings, got {len(labels):,}")
    if labels.null_count:
        raise InputError(f"countries: expected one for every user, got {labels.null_count:,} nulls")
    codes = labels.dictionary_encode()
    index = codes.indices.to_numpy()
    names = codes.dictionary.to_pylist()
    order = np.argsort(index, kind="stable")
    bounds = np.cumsum(np.bincount(index, minlength=len(names)))[:-1]
    return labels, sorted(zip(names, np.split(order, bounds))) if n else []


def _check_finite(embeddings: np.ndarray, ids: pa.Array) -> None:
    bad = np.concatenate([~np.isfinite(block).all(axis=1) for block in blocks(embeddings)]).nonzero()[0]
    if len(bad):
        shown = ", ".join(repr(ids[int(row)].as_py()) for row in bad[:5])
        raise InputError(
            f"embeddings: expected finite values, got NaN or infinity for {len(bad):,} users ({shown}"
            f"{', …' if len(bad) > 5 else ''}); refresh them again with a sound model"
        )


def _search_country(
    country: _Country, config: GraphConfig, seed: int, bar: Track
) -> tuple[np.ndarray, np.ndarray, CountryReport, Clusters | None]:
    """(similarities, rows within the country, report, clusters); [users, k], row −1 where there are fewer."""
    started = time.monotonic()
    name, users, k = country.name, len(country.embeddings), config.k
    rows, vectors = unit_vectors(country.embeddings)
    D = np.full((users, k), -np.inf, dtype=np.float32)
    I = np.full((users, k), -1, dtype=np.int64)
    plan = _plan(config, len(rows))
    before = _before(country, plan, rows)
    clusters = country.clusters if before or not country.then else None
    if clusters is not None and plan.engine != "exact":
        engine = "grouped" if before else plan.engine  # what was found then is merged to the bit with what it finds
        plan = replace(plan, engine=engine, notes=[])
    notes = list(plan.notes)
    if len(rows) <= k:
        notes.append(f"k: {k} neighbours asked, a user here has at most {max(len(rows) - 1, 0)} others")
    if users > len(rows):
        notes.append(f"{users - len(rows):,} users have a zero embedding and no neighbours")
    bar.advance(users - len(rows), note=name)
    if plan.engine == "exact":
        if clusters is not None:
            notes.append(f"clusters: {clusters.nlist} given and not used; searched exactly")
        clusters = None
    elif clusters is None:
        clusters = train_clusters(vectors, plan.nlist, plan.nprobe, seed)
    if clusters is not None and config.nprobe == "auto" and not before:
        clusters = replace(clusters, nprobe=auto_nprobe(vectors, clusters, config, seed))
    clustered = time.monotonic() - started
    step = max(SEARCH_ROWS, -(-len(rows) // SEARCH_SHARES))
    found, near, searched = update(
        lambda members: _engine(plan.engine, vectors, k, clusters, members),
        before or nothing_before(len(rows), k),
        step,
        lambda count: bar.advance(count, note=f"{name}, {plan.engine}"),
    )
    D[rows] = found
    I[rows] = np.where(near >= 0, rows[near], -1)
    recall, sample = _recall(plan.engine, vectors, k, D[rows], seed)
    counts = (I >= 0).sum(axis=1)
    report = CountryReport(
        country=name, users=users, zero_vectors=users - len(rows), engine=plan.engine,
        clusters=clusters.nlist if clusters else 0, nprobe=clusters.nprobe if clusters else 0,
        edges=int(counts.sum()), searched=searched, short=int((counts < k).sum()),
        recall=recall, recall_sample=sample, cluster_seconds=round(clustered, 3),
        seconds=round(time.monotonic() - started, 3), notes=notes,
    )  # fmt: skip
    return D, I, report, clusters


def _before(country: _Country, plan: _Plan, rows: np.ndarray) -> Before | None:
    """What is known of the country's users from an earlier graph; None to begin anew.

    Anew where the country was searched otherwise then, has grown or shrunk out of its clusters, or has mostly changed.
    """
    then, clusters = country.then, country.clusters
    if then is None or not len(rows) or (clusters is None) != (plan.engine == "exact"):
        return None
    if clusters is not None and not clusters.nlist / 2 <= plan.nlist <= clusters.nlist * 2:
        return None
    before = compare(then, country.user_ids, country.embeddings, rows)
    return before if before.unchanged.mean() >= LEAST_UNCHANGED else None


def _plan(config: GraphConfig, users: int) -> _Plan:
    """The engine and clusters for a country of `users` users with a direction; every departure is noted."""
    engine, notes = config.search, []
    if engine == "auto":
        # same clusters and neighbours; by AVX2 3.9 times as fast as FAISS on CPUs, 50k × 64, 400/50/15 (bench/NOTES.md)
        engine = "exact" if users < config.exact_below else "faiss" if faiss_gpus() else "grouped"
    asked = auto_nlist(users) if config.nlist == "auto" else config.nlist
    nlist = min(asked, users // POINTS_PER_CLUSTER)
    if engine != "exact" and nlist < 2:
        notes.append(f"{engine}: {users:,} users are too few for clusters; searched exactly")
        engine = "exact"
    if engine == "exact":
        return _Plan("exact", 0, 0, notes)
    if nlist < asked and config.nlist != "auto":
        notes.append(f"nlist: {asked} clusters asked, {nlist} used for {users:,} users ({POINTS_PER_CLUSTER} each)")
    if config.nprobe == "auto":
        return _Plan(engine, nlist, nlist, notes)  # all, until it is measured
    nprobe = min(config.nprobe, nlist)
    if nprobe < config.nprobe:
        notes.append(f"nprobe: {config.nprobe} clusters asked, there are {nlist}")
    return _Plan(engine, nlist, nprobe, notes)


def _engine(name: str, vectors: np.ndarray, k: int, clusters: Clusters | None, members: np.ndarray | None) -> Engine:
    if clusters is None:
        return ExactSearch(vectors, k, members)
    if name == "faiss":
        return FaissSearch(vectors, k, clusters)
    return GroupedSearch(vectors, k, clusters, members)


def _recall(engine: str, vectors: np.ndarray, k: int, found: np.ndarray, seed: int) -> tuple[float, int]:
    """(share of the true k nearest whose similarity was reached, users compared); equals count whichever was found."""
    if engine == "exact" or len(vectors) < 2:
        return 1.0, 0
    generator = np.random.default_rng(seed)
    sample = np.sort(generator.choice(len(vectors), min(RECALL_SAMPLE, len(vectors)), replace=False))
    truth, rows = ExactSearch(vectors, k).search(sample)
    expected = (rows >= 0).sum(axis=1)
    least = np.take_along_axis(truth, np.maximum(expected - 1, 0)[:, None], axis=1)
    hits = np.minimum((found[sample] >= least - TIE).sum(axis=1), expected)
    return float(hits.sum() / max(expected.sum(), 1)), len(sample)
