"""One user online: its embedding moved by its new events, its neighbours, its candidates; latency by stage.

Beside it what a request costs where no model is at hand, and the nightly answer out of the store's tables.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from alure.bench.clock import Clock
from alure.bench.race import Contest, Entry
from alure.bench.refresh import DAY, SPAN, START, new_model, write_log
from alure.engine.clusters import compute_device
from alure.engine.config import GraphConfig
from alure.engine.graph import build_graphs
from alure.engine.model import model_digest
from alure.engine.model.checkpoint import CheckpointConfig, save_checkpoint
from alure.engine.refresh.embedder import resolve_precision
from alure.engine.retrieval import CandidateRetriever, OnlineRetriever
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.vectors import Vectors

SNAPSHOT, NOW = START + SPAN * DAY, START + SPAN * DAY + DAY // 2
REQUESTS = 50  # a lap
NEWS, ACTIVE = 5, 0.2  # new events of each active user, and these users' share
STAGES = ("read", "embed", "search", "join")  # what is left makes the table


class World:
    """A log of 64 events a user, a generation of drawn embeddings in clusters, its graph of 15 neighbours, and news."""

    def __init__(self, folder: Path, users: int) -> None:
        self.events = write_log(folder, users, mean=64)
        self.model, self.users = folder / "model", users
        model = new_model(self.events, "small")
        save_checkpoint(self.model, model, CheckpointConfig(model=model.config, events=model.schema, sha256=""), {})
        rng = np.random.default_rng(0)
        shape = (model.config.num_embeddings, model.config.width)
        centres = rng.standard_normal((500, shape[0] * shape[1]))
        values = centres[rng.integers(0, 500, users)] + rng.standard_normal((users, shape[0] * shape[1]))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        self.store = EmbeddingStore(folder / "store", create=True)
        self._publish(values.astype(np.float32), shape)
        self.graph = build_graphs(self.store, GraphConfig())
        self.retriever = CandidateRetriever(self.store, self.events)
        active = rng.permutation(users)[: round(ACTIVE * users)]
        self.active = self.events.users["user_id"].take(pa.array(active)).to_pylist()
        count = NEWS * len(active)
        self.news = pa.table(
            {
                "user_id": np.repeat(self.active, NEWS),
                "timestamp": SNAPSHOT + rng.integers(1, DAY // 2, count),
                "item_id": self.events.items.item_ids.take(
                    pa.array((len(self.events.items) * rng.random(count) ** 3).astype(np.int64))
                ),
            }
        )

    def _publish(self, values: np.ndarray, shape: tuple[int, int]) -> None:
        digest, users = model_digest(self.model), self.events.users
        rows = {
            "user_id": users["user_id"],
            "country": users["country"].cast(pa.string()),
            **Vectors(values).columns(np.ones(len(values), bool)),
            "as_of": np.full(len(users), SNAPSHOT),
            "model": pa.repeat(digest, len(users)),
            "num_events": users["num_events"],
            "refreshed_at": pa.repeat(pa.scalar(0, pa.timestamp("us", "UTC")), len(users)),
        }
        self.store.write_unit("g", "all", pa.table(rows))
        precision = resolve_precision("auto", compute_device())
        properties = {"k": shape[0], "d": shape[1], "precision": precision, "max_events": None}
        self.store.publish(Generation("g", "embeddings", "", len(users), SNAPSHOT, digest, properties))

    def online(self, model: bool) -> OnlineRetriever:
        found = OnlineRetriever(self.retriever, self.model if model else None)
        found.add(self.news)
        return found


class Requests:
    """Laps of REQUESTS users who have news; `facts` has the quantiles of every request and stage so far, in ms."""

    def __init__(self, world: World, answer: Callable[[Any], pa.Table], seconds: Callable[[], float]) -> None:
        self.answer, self.seconds, self.users = answer, seconds, world.active
        self.rng = np.random.default_rng(0)
        self.taken: dict[str, list[float]] = {}
        self.facts: dict[str, Any] = {"requests_a_lap": REQUESTS, "quantiles_ms": {}}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = self.seconds()
            found = call(*arguments)
            self.taken.setdefault(name, []).append(1e3 * (self.seconds() - started))
            return found

        return run

    def __call__(self) -> list[pa.Table]:
        answer = self.timed("request", self.answer)
        found = [answer(self.users[i]) for i in self.rng.integers(0, len(self.users), REQUESTS)]
        self.facts["quantiles_ms"].update(
            {
                name: dict(zip(("p50", "p99"), np.percentile(all_, (50, 99)).tolist()))
                for name, all_ in self.taken.items()
            }
        )
        return found


@pytest.fixture(scope="module")
def world(quick: bool, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world") / "log", 5_000 if quick else 100_000)


def bench_request(race: Callable[[Contest], None], world: World, clock: Clock) -> None:
    def entry(name: str, requests: Requests, graphs: set[str]) -> Entry:
        def check(found: list[pa.Table]) -> str:
            rows = [row for table in found for row in table.to_pylist()]
            brought = {graph for row in rows for sets in row["graphs"] for graph in sets.split("+")}
            if brought != graphs:
                return f"ads of {', '.join(brought)}"
            return "" if all(row["item_ids"] for row in rows) else "an empty list"

        return Entry(name, lambda: (requests, check), requests.facts)

    moved, still = world.online(model=True), world.online(model=False)
    online = Requests(world, lambda user: moved.retrieve(user, NOW), clock.seconds)
    for stage in STAGES:
        setattr(moved, stage, online.timed(stage, getattr(moved, stage)))
    without = Requests(world, lambda user: still.retrieve(user, NOW), clock.seconds)
    nightly = Requests(world, lambda user: world.retriever.retrieve([user]), clock.seconds)
    entries = [
        entry("alure online", online, {"alure", "online"}),
        entry("alure online, no model", without, {"alure"}),
        entry("alure nightly, from Delta", nightly, {"alure"}),
    ]
    facts = {"users": world.users, "events": world.events.manifest.num_events, "new_events": len(world.news)}
    name = f"{REQUESTS} requests, {world.users:,} users, {len(world.news):,} new events"
    race(Contest("online", name, entries, facts=facts))
