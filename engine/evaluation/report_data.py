"""What a report is made of: plain JSON-able pieces, gathered from the stages' reports, the store and the log.

Every piece may be missing (a stage was not run, a log has no such column); the report then says so in its place.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alure.engine.config import Config
from alure.engine.evaluation.layout import neighbour_layout
from alure.engine.evaluation.stories import tell_stories
from alure.engine.evaluation.truth import indices
from alure.engine.events import Events
from alure.engine.store import EmbeddingStore, Generation

MAP_POINTS = 3_000
SIMILARITY_BINS = 60
PACKAGES = ("alure", "torch", "numpy", "pyarrow", "duckdb", "deltalake", "faiss-cpu", "faiss-gpu", "triton")


@dataclass(frozen=True)
class ReportData:
    """stages: {name: {seconds, report, …}} of ingest, train, refresh, graph, retrieve, evaluate, as far as they ran.

    log: figures of the event log's manifest. embedding_map: {points [[x, y]], labels, kind}. graphs: {name: {users,
    edges, similarity_edges, similarity_counts, similarity_median, in_degree_counts}}. stories: see stories.py.
    """

    name: str
    seed: int
    as_of: int | None
    config: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    log: Mapping[str, Any] | None = None
    embeddings: Mapping[str, Any] | None = None  # users, k, d, generation, model
    embedding_map: Mapping[str, Any] | None = None
    graphs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stories: list[Mapping[str, Any]] = field(default_factory=list)
    world: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    created_at: str = ""

    def report(self, stage: str) -> Mapping[str, Any]:
        """What a stage said; empty where it did not run."""
        return self.stages.get(stage, {}).get("report") or {}


def gather_report_data(
    config: Config,
    stages: Mapping[str, Mapping[str, Any]],
    *,
    events: Events | None = None,
    store: EmbeddingStore | None = None,
    world: Mapping[str, Any] | None = None,
    planted: Path | None = None,
    truth: Path | None = None,
    generation: str | None = None,
) -> ReportData:
    """Collect a run's figures. `planted`: a world's users.parquet (user_id, topic), which colours the map. generation:
    which of the store's (None: the newest).
    """
    generations = store.generations("embeddings") if store else []
    chosen = next((g for g in reversed(generations) if generation in (None, g.generation)), None)
    pieces: dict[str, Any] = {}
    if events is not None:
        pieces["log"] = events.manifest.model_dump(mode="json", exclude={"fingerprint"})
    if store is not None and chosen is not None:
        matrix = store.read_matrix(chosen.generation)
        pieces["embeddings"] = {
            "users": chosen.rows,
            "k": chosen.properties.get("k"),
            "d": chosen.properties.get("d"),
            "generation": chosen.generation,
            "model": chosen.model,
        }
        pieces["embedding_map"] = _embedding_map(matrix.values, matrix.user_ids, matrix.countries, planted, config.seed)
        pieces["graphs"] = {
            g.name: _graph_figures(store, g) for g in store.generations("graph") if g.generation == chosen.generation
        }
        if events is not None:
            pieces["stories"] = tell_stories(store, events, chosen, config, truth, planted)
    return ReportData(
        name=config.name or "alure",
        seed=config.seed,
        as_of=chosen.as_of if chosen else config.as_of,
        config=config.model_dump(mode="json"),
        stages=stages,
        world=world,
        versions=versions(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        created_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **pieces,
    )


def versions() -> dict[str, str]:
    """Installed versions of what the figures depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def summary(data: ReportData) -> dict[str, Any]:
    """The run at a glance, for summary.json and the command line: counts, seconds, and the figures that matter."""
    evaluated = data.report("evaluate")
    recall = {s["name"]: _rounded(s["metrics"]["recall"]) for s in evaluated.get("sets", [])}
    slices = {
        f"{s['name']}, {f'{part} users' if kind == 'users' else f'popularity {part}'}": _rounded(found["recall"])
        for s in evaluated.get("sets", [])
        for kind, parts in s["slices"].items()
        for part, found in parts.items()
    }
    gains = {
        f"{d['set']} − {d['baseline']}, recall@{d['k']}": {
            **{name: round(d[name], 5) for name in ("value", "low", "high")},
            "significant": d["significant"],
        }
        for d in evaluated.get("differences", [])
        if d["metric"] == "recall"
    }
    return {
        "name": data.name,
        "seed": data.seed,
        "as_of": data.as_of,
        "generation": (data.embeddings or {}).get("generation"),
        "users": (data.log or {}).get("num_users"),
        "events": (data.log or {}).get("num_events"),
        "embeddings": (data.embeddings or {}).get("users"),
        "edges": {name: graph["edges"] for name, graph in data.graphs.items()},
        "candidates": {name: r.get("candidates") for name, r in data.report("retrieve").items()},
        "users_evaluated": evaluated.get("users"),
        "recall": recall,
        "not_measured": evaluated.get("reasons", {}),
        "recall_by_slice": slices,
        "gains": gains,
        "ne": {
            task: _ne_gain(found) if "gain" in found else {"reason": found.get("reason")}
            for task, found in evaluated.get("ne", {}).items()
        },
        "auc": {
            task: {name: round(found[f"auc_{name}"]["value"], 5) for name in ("without", "with")}
            for task, found in evaluated.get("ne", {}).items()
            if "auc_with" in found
        },
        "seconds": {name: round(stage.get("seconds", 0.0), 2) for name, stage in data.stages.items()},
        "quarantine": (data.log or {}).get("quarantine", {}),
        "versions": dict(data.versions),
    }


def _ne_gain(found: Mapping[str, Any]) -> dict[str, float]:
    """NE of the ranker without and with the embeddings, and the share of it that they save with its 95 % interval."""
    gain = found["gain"]
    both = {name: round(found[f"ne_{name}"]["value"], 5) for name in ("without", "with")}
    return {**both, "gain": gain["value"], "low": gain["low"], "high": gain["high"], "value": gain["value"]}  # as gain


def _rounded(intervals: Mapping[str, Any]) -> dict[str, Any]:
    """{K: value} of {K: interval or None}."""
    return {k: found and round(found["value"], 5) for k, found in intervals.items()}


def _embedding_map(
    values: np.ndarray, user_ids: pa.Array, countries: pa.Array, planted: Path | None, seed: int
) -> dict[str, Any] | None:
    """A sample of users in the plane, labelled by planted topic where there is one, else by country."""
    if len(values) < 3:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(len(values))[:MAP_POINTS])
    labels, kind = countries.take(pa.array(rows)).to_pylist(), "country"
    if planted is not None and planted.exists():
        known = pq.read_table(planted, columns=["user_id", "topic"])
        place = indices(user_ids.take(pa.array(rows)), known["user_id"])
        topics = known["topic"].to_pylist()
        labels, kind = [topics[p] if p >= 0 else "unknown" for p in place], "strongest planted interest"
    placed = neighbour_layout(values[rows], seed)
    return {"points": np.round(placed, 3).tolist(), "labels": labels, "kind": kind, "of": len(values)}


def _graph_figures(store: EmbeddingStore, graph: Generation) -> dict[str, Any]:
    """Similarity and in-degree distribution of one graph."""
    similarities: list[np.ndarray] = []
    neighbors: list[pa.Array] = []
    users, linked = 0, 0
    for batch in store.iter_graph(graph.generation, graph.name):
        lengths = pc.list_value_length(batch["neighbor_ids"])
        users += batch.num_rows
        linked += int(pc.sum(pc.greater(lengths, 0)).as_py() or 0)
        similarities.append(pc.list_flatten(batch["similarities"]).to_numpy(zero_copy_only=False))
        neighbors.append(pc.list_flatten(batch["neighbor_ids"]))
    values = np.concatenate([np.empty(0, np.float32), *similarities])
    counts, edges = (
        np.histogram(values, bins=SIMILARITY_BINS) if len(values) else (np.zeros(1, int), np.array([0.0, 1.0]))
    )
    pointed = pc.value_counts(pa.chunked_array(neighbors)).field("counts") if neighbors else pa.array([], pa.int64())
    degrees = np.bincount(pointed.to_numpy(zero_copy_only=False), minlength=1)
    degrees[0] = max(users - int(degrees[1:].sum()), 0)  # nobody's neighbour
    return {
        "users": users,
        "users_with_neighbors": linked,
        "edges": len(values),
        "similarity_counts": counts.tolist(),
        "similarity_edges": np.round(edges, 6).tolist(),
        "similarity_median": float(np.median(values)) if len(values) else 0.0,
        "in_degree_counts": degrees.tolist(),
    }
