"""`alure graph`: read a generation's embeddings, build its graphs, publish each, and report."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from alure.engine.config import GraphConfig
from alure.engine.errors import InputError
from alure.engine.graph.base import Base, digest, find_base, write_clusters
from alure.engine.graph.faiss_files import read_clusters_of_files
from alure.engine.graph.follows import Follows, read_follows
from alure.engine.graph.ppr import ppr_graph
from alure.engine.graph.similar import CountryReport, search_countries
from alure.engine.graph.similarity import DegreeStatistics, SimilarityGraph
from alure.engine.graph.social import social_graph
from alure.engine.progress import say
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.averages import last_generations, read_average


@dataclass(frozen=True)
class BuiltGraph:
    """One published graph. similarity_histogram: counts of edges in bins between `edges`."""

    name: str
    seconds: float
    statistics: DegreeStatistics
    similarity_histogram: dict[str, list[float]]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphReport:
    """What `build_graphs` did; JSON-able through dataclasses.asdict."""

    generation: str
    averaged: list[str]  # the generations whose embeddings are averaged, newest first
    base: str | None  # whose graph was brought up to date; None: every user was searched
    users: int
    searched: int  # users whose neighbours were searched
    edges: int  # of the graph alure
    recall: float  # of the graph alure, over countries by users
    zero_vectors: int
    seconds: float
    countries: list[CountryReport]
    graphs: list[BuiltGraph]
    follows: dict[str, int] | None  # counts of the follow rows: kept, unknown_users, self_follows, duplicates, nulls
    notes: list[str]


def build_graphs(
    store: EmbeddingStore,
    config: GraphConfig,
    *,
    social: Path | None = None,
    generation: str | None = None,
    incremental: bool = False,
    clusters: Path | None = None,
    seed: int = 0,
) -> GraphReport:
    """Build and publish `alure`, and from the follows in `social` the graphs `social` and, where config.ppr, `ppr`.

    generation: whose embeddings (None: the newest published). A graph that is there already is replaced.
    incremental: `alure` from the newest graph of an earlier generation, in its clusters: only users whose embedding
    changed since are searched, and those whose neighbours they enter or leave. Where no such graph fits, all are.
    clusters: a folder of FAISS index files COUNTRY.faiss whose centroids are used; other countries train their own.
    """
    started = time.monotonic()
    if config.ppr and social is None:
        raise InputError(
            "ppr: Personalized PageRank walks the follow graph; give it with --social FOLLOWS, or events.social"
        )
    if incremental and clusters:
        raise InputError("clusters: an incremental graph keeps those of the earlier one; leave out one of the two")
    source = store.published(generation, "embeddings")
    averaged = last_generations(store, source, config.average)
    matrix = read_average(store, averaged)
    nprobe = None if config.nprobe == "auto" else config.nprobe
    given = read_clusters_of_files(clusters, matrix.values.shape[1], nprobe) if clusters else None
    follows = read_follows(social, matrix.user_ids) if social is not None else None

    begun = time.monotonic()
    settings = config.model_dump() | {"seed": seed}
    base, reason = _base(store, source, config, settings) if incremental else (None, "")
    searched = search_countries(
        matrix.values, matrix.countries, config, seed, user_ids=matrix.user_ids, base=base, clusters=given
    )
    graph, countries = searched.graph, searched.countries
    recall = _weighted_recall(countries)
    write_clusters(store, source, searched.clusters)
    settings["averaged"] = [each.generation for each in averaged]
    settings |= {"clusters": digest(searched.clusters), "engines": sorted({report.engine for report in countries})}
    graphs = [_publish(store, source, "alure", graph, begun, {"recall": recall}, settings)]
    if follows is not None:
        graphs += _follow_graphs(store, source, follows, matrix.user_ids, matrix.countries, config)
    notes = [f"{report.country}: {note}" for report in countries for note in report.notes]
    if reason:
        notes.insert(0, f"not incremental: {reason}; every user was searched")
    for note in notes:
        say(f"graph: {note}")
    return GraphReport(
        generation=source.generation,
        averaged=settings["averaged"],
        base=base.generation if base else None,
        users=graph.num_users,
        searched=sum(report.searched for report in countries),
        edges=graph.num_edges,
        recall=recall,
        zero_vectors=sum(report.zero_vectors for report in countries),
        seconds=round(time.monotonic() - started, 3),
        countries=countries,
        graphs=graphs,
        follows=_counts(follows) if follows is not None else None,
        notes=notes,
    )


def _base(
    store: EmbeddingStore, source: Generation, config: GraphConfig, settings: dict[str, Any]
) -> tuple[Base | None, str]:
    if config.search == "faiss":
        raise InputError("incremental: FAISS searches everything; use --search grouped, exact or auto")
    kept = ("nlist", "nprobe", "recall_target", "k", "search", "exact_below", "seed")
    return find_base(store, source, {name: settings[name] for name in kept})


def _follow_graphs(
    store: EmbeddingStore,
    source: Generation,
    follows: Follows,
    user_ids: pa.Array,
    countries: pa.Array,
    config: GraphConfig,
) -> list[BuiltGraph]:
    counts: dict[str, Any] = _counts(follows)
    dropped = follows.rows - follows.kept
    if dropped:
        say(
            f"graph: {dropped:,} of {follows.rows:,} follows dropped: {follows.unknown_users:,} of unknown users, "
            f"{follows.self_follows:,} of oneself, {follows.duplicates:,} repeated, {follows.nulls:,} with a null"
        )
    begun = time.monotonic()
    followed = social_graph(follows, user_ids, countries, config.k)
    built = [_publish(store, source, "social", followed, begun, counts, {"k": config.k})]
    if config.ppr:
        begun = time.monotonic()
        walked, lost = ppr_graph(
            follows, user_ids, countries, config.k, alpha=config.ppr_alpha, epsilon=config.ppr_epsilon
        )
        figures = {
            "lost_mass": float(lost.max(initial=0.0)),
            "mean_lost_mass": float(lost.mean()) if len(lost) else 0.0,
        }
        settings = {"k": config.k, "alpha": config.ppr_alpha, "epsilon": config.ppr_epsilon}
        built.append(_publish(store, source, "ppr", walked, begun, figures, settings))
    return built


def _publish(
    store: EmbeddingStore,
    source: Generation,
    name: str,
    graph: SimilarityGraph,
    begun: float,
    figures: dict[str, Any],
    settings: dict[str, Any],
) -> BuiltGraph:
    graph.check_integrity()
    graph.save(store, source, name, {**settings, **figures})
    seconds = round(time.monotonic() - begun, 3)
    return BuiltGraph(name, seconds, graph.degree_statistics(), graph.similarity_histogram(), dict(figures))


def _weighted_recall(countries: list[CountryReport]) -> float:
    users = sum(report.users for report in countries)
    return sum(report.recall * report.users for report in countries) / users if users else 1.0


def _counts(follows: Follows) -> dict[str, int]:
    counts = {name: value for name, value in asdict(follows).items() if name != "adjacency"}
    return {**counts, "kept": follows.kept}
