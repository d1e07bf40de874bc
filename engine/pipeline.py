"""The whole chain, stage by stage: event logs in; embeddings, graphs, candidates and a report out.

Every stage leaves a stamp that names what it was made from, so a second run reuses what has not changed.
"""

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from alure.engine.config import Config, EvaluationConfig, EventsConfig, GraphConfig, RetrievalConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.evaluation import evaluate, gather_report_data, summary, write_figure, write_report
from alure.engine.events import Events, ingest
from alure.engine.events.manifest import MANIFEST_FILE, Manifest
from alure.engine.graph import build_graphs
from alure.engine.progress import say
from alure.engine.refresh import RefreshJob
from alure.engine.results import to_dict
from alure.engine.retrieval import retrieve
from alure.engine.store import EmbeddingStore
from alure.engine.training import train
from alure.engine.world import build_world

STAMP_VERSION = 1
HOLDOUT_SAMPLE = 10_000_000  # events whose times are sorted to find the hold-out


@dataclass
class Chain:
    """One run: where its things lie, and what each stage said."""

    config: Config
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.config.output / name

    def stage(
        self,
        name: str,
        made_from: list[Any],
        work: Callable[[], Any],
        is_there: Callable[[dict[str, Any]], bool] = lambda report: True,
    ) -> dict[str, Any]:
        """Do `work` unless a stamp says that it was done from the same things and what it made `is_there`, asked with
        its report; returns the stage's report.
        """
        key = fingerprint([STAMP_VERSION, name, *made_from])
        stamp = self.path("stages") / f"{name}.json"
        if stamp.exists():
            saved = json.loads(stamp.read_text())
            if saved["key"] == key and is_there(saved["report"]):
                say(f"{name}: unchanged, reused ({saved['seconds']:.1f} s when it was made)")
                self.stages[name] = saved
                return saved["report"]
        started = time.monotonic()
        report = to_dict(work())
        saved = {"key": key, "seconds": time.monotonic() - started, "report": report, "peak_rss_bytes": peak_rss()}
        stamp.parent.mkdir(parents=True, exist_ok=True)
        temporary = stamp.with_suffix(".tmp")
        temporary.write_text(json.dumps(saved))
        temporary.replace(stamp)
        say(f"{name}: done in {saved['seconds']:.1f} s")
        self.stages[name] = saved
        return report

    def key(self, name: str) -> str:
        return self.stages[name]["key"]


def run_pipeline(config: Config, world: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run every stage of `config`, write report.html and summary.json in its output folder, return the summary."""
    if not config.events.inputs:
        raise InputError("configuration: events.inputs is empty; name at least one Parquet file, folder or Delta table")
    check_files(config)
    chain = Chain(config)
    config.output.mkdir(parents=True, exist_ok=True)
    events_path, model, store_path = chain.path("events"), chain.path("model"), chain.path("store")

    chain.stage(
        "ingest",
        [config.events, identities(config.events)],
        lambda: ingest(config.events, events_path),
        lambda _: (events_path / MANIFEST_FILE).is_file() and not Manifest.read(events_path).is_due(),
    )
    events = Events.open(events_path)
    as_of = snapshot_time(config, events)
    chain.stage(
        "train",
        [
            chain.key("ingest"),
            events.manifest.fingerprint,
            as_of,
            config.model,
            config.training.model_copy(update={"tensorboard": None}),
            config.seed,
        ],
        lambda: train(events, config.model, config.training, model, as_of=as_of, seed=config.seed),
        lambda _: model.is_dir(),
    )
    store = EmbeddingStore(store_path, create=True)
    generation = chain.stage(
        "refresh",
        [chain.key("train"), as_of, config.refresh],
        lambda: RefreshJob(model, events_path, store, as_of=as_of, config=config.refresh).run(),
        lambda report: report["generation"] in names_of(store, "embeddings"),
    )["generation"]
    newest = store.latest("embeddings").generation
    if newest != generation:
        say(f"refresh: readers see generation {newest}; `alure rollback {store_path} --to {generation}` makes this it")
    chain.stage(
        "graph",
        [chain.key("refresh"), config.graph, identity(config.events.social), config.seed],
        lambda: build_graphs(store, config.graph, social=config.events.social, generation=generation, seed=config.seed),
        lambda report: {graph["name"] for graph in report["graphs"]} <= names_of(store, "graph", generation),
    )
    candidate_sets = blends(config, store, generation)
    chain.stage(
        "retrieve",
        [chain.key("graph"), config.retrieval, identity(config.retrieval.eligible), candidate_sets],
        lambda: {
            "+".join(graphs): to_dict(retrieve(store, events, config.retrieval, graphs=graphs, generation=generation))
            for graphs in candidate_sets
        },
        lambda report: set(report) <= names_of(store, "candidates", generation),
    )
    truth = config.evaluation.truth or write_holdout(events, as_of, chain.path("truth.parquet"))
    chain.stage(
        "evaluate",
        [chain.key("retrieve"), config.evaluation, identity(truth), config.seed],
        lambda: evaluate(store, truth, config.evaluation, events=events, generation=generation, seed=config.seed),
    )
    return publish_report(chain, events, store, truth, world, generation)


def check_files(config: Config) -> None:
    """InputError where a later stage would miss a file: before the first one runs, not hours after."""
    files = {
        "events.items": config.events.items,
        "events.social": config.events.social,
        "retrieval.eligible": config.retrieval.eligible,
        "evaluation.truth": config.evaluation.truth,
    }
    for name, path in files.items():
        if path is not None and not path.exists():
            raise InputError(f"configuration: {name}: {path} does not exist")
    if config.graph.ppr and config.events.social is None:
        raise InputError("configuration: graph.ppr: PageRank walks over the follows; name them in events.social")


def run_demo(out: Path, num_users: int, seed: int, training: TrainingConfig) -> dict[str, Any]:
    """The chain on a synthetic ads world (see alure.engine.world for what is planted in it)."""
    world_path = out / "world"
    stamp = world_path / "world.json"
    made = json.loads(stamp.read_text()) if stamp.exists() else {}
    if (made.get("num_users"), made.get("seed")) != (num_users, seed):
        shutil.rmtree(world_path, ignore_errors=True)
        say(f"world: making {num_users:,} users")
        build_world(world_path, num_users, seed)
    world = json.loads(stamp.read_text())
    config = Config(
        output=out,
        name="Synthetic ads world",
        seed=seed,
        as_of=world["as_of"],
        events=EventsConfig(
            inputs=[world_path / "events.parquet"],
            items=world_path / "items.parquet",
            social=world_path / "social.parquet",
            ad_sources=world["ad_sources"],
        ),
        training=training,
        graph=GraphConfig(ppr=True),
        evaluation=EvaluationConfig(truth=world_path / "truth.parquet"),
    )
    return run_pipeline(config, world)


def run_evaluation(
    store: str | Path, truth: Path, config: EvaluationConfig, *, events: Path | None, out: Path | None, seed: int
) -> dict[str, Any]:
    """Evaluate a store against a truth file, and write a report of that alone (out: default beside the store)."""
    log = Events.open(events) if events else None
    opened = EmbeddingStore(store)
    beside = opened.path.parent
    if out is None and not isinstance(beside, Path):
        raise InputError(f"evaluate: {opened.path} is not on this machine; give --out, a folder for the report")
    name = f"Evaluation of {opened.path.name}"
    chain = Chain(Config(output=out or beside, name=name, seed=seed, evaluation=config))
    started = time.monotonic()
    report = to_dict(evaluate(opened, truth, config, events=log, seed=seed))
    chain.stages["evaluate"] = {"seconds": time.monotonic() - started, "report": report}
    return publish_report(chain, log, opened, truth)


def publish_report(
    chain: Chain,
    events: Events | None,
    store: EmbeddingStore,
    truth: Path,
    world: dict[str, Any] | None = None,
    generation: str | None = None,
) -> dict[str, Any]:
    """Write report.html and summary.json of a generation (None: the newest) into the output folder; returns the
    summary.
    """
    started = time.monotonic()
    data = gather_report_data(
        chain.config,
        chain.stages,
        events=events,
        store=store,
        world=world,
        planted=chain.path("world/users.parquet") if world else None,
        truth=truth,
        generation=generation,
    )
    report = write_report(chain.config.output, data)
    evaluated = data.report("evaluate")
    if evaluated.get("sets") and "recall" not in evaluated.get("reasons", {}):
        write_figure(chain.path("overview.svg"), data)
    found = summary(data)
    found["seconds"]["report"] = round(time.monotonic() - started, 2)
    found |= {"peak_rss_bytes": peak_rss(), "report": str(report)}
    chain.path("summary.json").write_text(json.dumps(found, indent=2) + "\n")
    say(f"report: {report}")
    return found


def snapshot_time(config: Config, events: Events) -> int:
    """T: as configured, or the last event, or, where the truth is held out of the log, the start of the hold-out.

    The hold-out is a share of the events and not of the time: a few stray late events must not be all of it.
    """
    manifest = events.manifest
    if config.as_of is not None:
        return config.as_of
    if config.evaluation.truth is not None or not manifest.num_events:
        return manifest.last_timestamp
    step = max(1, manifest.num_events // HOLDOUT_SAMPLE)
    times = np.concatenate([events.source(name).timestamp[::step] for name in manifest.sources])
    return int(np.quantile(times, 1 - config.evaluation.holdout, method="lower"))


def write_holdout(events: Events, as_of: int, path: Path) -> Path:
    """The events after the snapshot, as a truth file."""
    temporary = path.with_suffix(".tmp")
    pq.write_table(events.after(as_of), temporary)
    temporary.replace(path)
    return path


def names_of(store: EmbeddingStore, table: str, generation: str | None = None) -> set[str]:
    """What is published of a table: the generations, or the names of what one generation has."""
    if generation is None:
        return {published.generation for published in store.generations(table)}
    return {published.name for published in store.generations(table) if published.generation == generation}


def blends(config: Config, store: EmbeddingStore, generation: str) -> list[list[str]]:
    """The candidate sets that are compared: each graph alone, the other graphs together, and all of them."""
    published = names_of(store, "graph", generation)
    present = [name for name in config.retrieval.graphs if name in published]
    unknown = config.retrieval.graphs.keys() - published - RetrievalConfig().graphs.keys()
    if unknown or not present:
        raise InputError(
            f"configuration: retrieval.graphs: expected graphs that {generation} has, {', '.join(sorted(published))}, "
            f"got {', '.join(sorted(unknown or config.retrieval.graphs))}"
        )
    others = [name for name in present if name != "alure"]
    sets = [[name] for name in present]
    if len(others) > 1:
        sets.append(others)
    if others and len(present) > 1:
        sets.append(present)
    return sets


def fingerprint(parts: list[Any]) -> str:
    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    return hashlib.sha256(json.dumps(parts, default=plain, sort_keys=True).encode()).hexdigest()[:16]


def identity(path: Path | None) -> list[Any]:
    """What tells one state of a file or folder from another: names, sizes and modification times."""
    if path is None:
        return []
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.exists()]


def identities(events: EventsConfig) -> list[Any]:
    return [identity(path) for path in [*events.inputs, events.items]]


def peak_rss() -> int:
    """Largest resident set of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
