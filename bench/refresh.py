"""The refresh: the user model beside plain PyTorch with padded batches, the half of it that a refresh runs beside the
full forward pass, an incremental job beside a full one, one with cached keys and values, and the store.
"""

import math
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from alure.bench.padded import PaddedUserModel
from alure.bench.race import Contest, Entry
from alure.engine.config import EventsConfig, ModelConfig, RefreshConfig
from alure.engine.events import Events, ingest
from alure.engine.model import AlureModel, EventSchema, UserModel
from alure.engine.model.checkpoint import CheckpointConfig, save_checkpoint
from alure.engine.model.towers import Exposures, two_tower_scores
from alure.engine.refresh import RefreshJob
from alure.engine.refresh.embedder import Embedder, Snapshot, Work
from alure.engine.refresh.report import RefreshReport
from alure.engine.store import EmbeddingStore, Generation

DAY = 86_400
START = 1_760_000_000
SPAN = 90  # days of history
ITEMS = 20_000
EXPOSURES = (4, 128)  # candidate ads a user in the full forward pass: as in training, and as a ranker is asked
PADDED_USERS = {"cpu": 8, "cuda": 32}  # users a padded batch
USERS = {"cpu": {"small": 160, "base": 64}, "cuda": {"small": 2048, "base": 1024}}  # on a GPU, two batches and one
CHANGED = 0.1  # of the users have an event on the last day


def write_log(folder: Path, users: int, mean: float, changed_share: float = CHANGED) -> Events:
    """Lognormal lengths (σ 1) of the given mean, at least 1, over SPAN days, and an event of some on a last one."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(math.log(mean) - 0.5, 1.0, users)).astype(int)
    changed = rng.permutation(users)[: round(changed_share * users)]
    user = np.concatenate([np.repeat(np.arange(users), lengths), changed])
    total = len(user)
    time = START + rng.integers(0, SPAN * DAY, total)
    time[total - len(changed) :] = START + SPAN * DAY + DAY // 2
    item = (ITEMS * rng.random(total) ** 3).astype(np.int64)
    events = {"user_id": user, "timestamp": time, "item_id": item, "account_id": item // 8, "category_id": item % 50}
    folder.mkdir(parents=True)
    pq.write_table(pa.table(events), folder / "events.parquet")
    ingest(EventsConfig(inputs=[folder / "events.parquet"]), folder / "log")
    return Events.open(folder / "log")


def new_model(events: Events, preset: str, **changes: Any) -> AlureModel:
    """Untrained: the speed does not depend on the weights."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"preset": preset, **changes})
    return AlureModel(config, EventSchema.of(events.manifest), ("ctr", "cvr")).eval().requires_grad_(False)


class Embedding:
    """A log, a model, and what embeds all its users: from the log to one array."""

    def __init__(self, folder: Path, preset: str, users: int, device: torch.device) -> None:
        self.events = write_log(folder, users, mean=256)
        self.model, self.device = new_model(self.events, preset), device
        self.users = np.arange(self.events.num_users)
        self.tokens = self.events.num_events()
        self.as_of = self.events.manifest.last_timestamp
        self.name = f"{users:,} users, {self.tokens.sum():,} events, lognormal, {preset} preset"

    def ours(self, precision: str) -> Callable[[], np.ndarray]:
        config = RefreshConfig.model_validate({"precision": precision})
        embedder = Embedder(self.model.user, self.events, Snapshot("g", self.as_of, "m", None, config), self.device)
        return lambda: embedder.embed(self.users, self.tokens, Work().add)[0].values

    def padded(self, dtype: torch.dtype, by_length: bool) -> Callable[[], np.ndarray]:
        user_model = UserModel(self.model.config, self.model.schema)
        user_model.load_state_dict(self.model.user.state_dict())
        model = PaddedUserModel(user_model.to(self.device, dtype), dtype)
        catalog = user_model.catalog(self.events)
        order = np.argsort(self.tokens) if by_length else self.users
        (source,) = self.events.manifest.sources

        @torch.inference_mode()
        def run() -> np.ndarray:
            found = np.empty((len(order), self.model.config.num_embeddings * self.model.config.width), np.float32)
            at_once = PADDED_USERS[self.device.type]
            for start in range(0, len(order), at_once):
                chosen = order[start : start + at_once]
                batch = self.events.batch(chosen, self.as_of).to(self.device)
                found[chosen] = model(batch.sequences[source], batch.as_of, catalog).flatten(1).float().cpu().numpy()
            return found

        return run


def alike(expected: np.ndarray, least: float) -> Callable[[np.ndarray], str]:
    """Whether the embeddings, of length 1 each, are those of the float32 model."""

    def check(found: np.ndarray) -> str:
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        return "" if cosine.min() >= least else f"cosine {cosine.min():.5f} with float32, at least {least} is expected"

    return check


@pytest.mark.parametrize("preset", ["small", "base"])
def bench_embed(
    race: Callable[[Contest], None], preset: str, quick: bool, device: torch.device, tmp_path: Path
) -> None:
    users = USERS[device.type][preset] // (4 if quick else 1)
    case = Embedding(tmp_path / preset, preset, users, device)
    exact = case.ours("float32")
    expected = exact()

    def entry(name: str, run: Callable[[], np.ndarray], least: float) -> Entry:
        return Entry(name, lambda: (run, alike(expected, least)))

    entries = [
        entry("alure", case.ours("auto"), 0.99),
        entry("alure, float32", exact, 0.99999),
        entry("PyTorch, padded, as they come", case.padded(torch.float32, by_length=False), 0.99999),
        entry("PyTorch, padded, by length", case.padded(torch.float32, by_length=True), 0.99999),
        entry("PyTorch, padded, by length, bfloat16", case.padded(torch.bfloat16, by_length=True), 0.99),
    ]
    race(Contest("refresh", case.name, entries, facts={"users": users}))


@pytest.mark.parametrize("exposed", EXPOSURES)
def bench_pruned(
    race: Callable[[Contest], None], exposed: int, quick: bool, device: torch.device, tmp_path: Path
) -> None:
    """What the refresh runs, and the whole model: candidate ads, context queries, heads, two towers."""
    users = 40 if quick else 400
    events = write_log(tmp_path / "log", users, mean=64)
    model = new_model(events, "small").to(device)
    catalog = model.user.catalog(events)
    batch = events.batch(range(users), events.manifest.last_timestamp).to(device)
    rng = np.random.default_rng(0)
    shown = torch.arange(users).repeat_interleave(exposed)
    exposures = Exposures(
        torch.from_numpy(rng.integers(0, events.manifest.num_items, len(shown))).to(device),
        (torch.arange(users + 1) * exposed).to(device),
        shown.to(device),
        torch.full((len(shown),), events.manifest.last_timestamp).to(device),
    )
    candidates = torch.from_numpy(rng.permutation(events.manifest.num_items)[:512]).to(device)

    @torch.inference_mode()
    def pruned() -> torch.Tensor:
        return model.user(batch, catalog)

    @torch.inference_mode()
    def full() -> torch.Tensor:
        state = model(batch, catalog)
        model.rank(state, exposures, catalog)
        two_tower_scores(state.embeddings, model.embed_ads(candidates, catalog))
        return state.embeddings

    def finite(embeddings: torch.Tensor) -> str:
        return "" if torch.isfinite(embeddings).all() else "not finite"

    entries = [
        Entry("alure, user half", lambda: (pruned, finite)), Entry("alure, all of it", lambda: (full, finite))
    ]  # fmt: skip
    race(Contest("refresh", f"{users:,} users, {batch.total:,} events, {exposed} ads each, forward", entries))


def bench_incremental(race: Callable[[Contest], None], quick: bool, tmp_path: Path) -> None:
    """Whole jobs, from opening the checkpoint to the publication, each into a copy of yesterday's store."""
    users = 100 if quick else 3_000
    events = write_log(tmp_path / "log", users, mean=256)
    model = new_model(events, "small")
    config = CheckpointConfig(model=model.config, events=model.schema, sha256="")
    save_checkpoint(tmp_path / "model", model, config, {})
    number = count()

    def job(store: Path, as_of: int, incremental: bool) -> Any:
        return RefreshJob(tmp_path / "model", events, store, as_of=as_of, incremental=incremental).run()

    yesterday, today = START + SPAN * DAY, events.manifest.last_timestamp
    job(tmp_path / "yesterday", yesterday, incremental=False)

    def run(incremental: bool) -> Callable[[], Any]:
        def once() -> Any:
            store = tmp_path / f"store{next(number)}"
            shutil.copytree(tmp_path / "yesterday", store, copy_function=os.link)  # a store's files never change
            report = job(store, today, incremental)
            shutil.rmtree(store)
            return report

        return once

    def embedded(expected: int) -> Callable[[Any], str]:
        return lambda report: "" if report.embedded == expected else f"{report.embedded} users embedded"

    entries = [
        Entry("alure, incremental", lambda: (run(True), embedded(round(CHANGED * users)))),
        Entry("alure, in full", lambda: (run(False), embedded(users))),
    ]
    race(Contest("refresh", f"{users:,} users, {CHANGED:.0%} changed", entries))


@pytest.mark.parametrize("preset", ["small", "base"])
def bench_kv_cache(race: Callable[[Contest], None], preset: str, quick: bool, tmp_path: Path) -> None:
    """Whole jobs on a day on which everybody has one event more, with yesterday's keys and values and without."""
    users = {"small": 800, "base": 160}[preset] // (8 if quick else 1)
    events = write_log(tmp_path / "log", users, mean=256, changed_share=1.0)
    model = new_model(events, preset, causal=True, encoders=["frequency", "gap", "cyclic"])
    save_checkpoint(tmp_path / "model", model, CheckpointConfig(model=model.config, events=model.schema, sha256=""), {})
    yesterday, today, number = START + SPAN * DAY, events.manifest.last_timestamp, count()

    def job(store: Path, as_of: int, config: RefreshConfig) -> RefreshReport:
        return RefreshJob(tmp_path / "model", events, store, as_of=as_of, incremental=True, config=config).run()

    def entry(name: str, kv_cache: bool, reused: int) -> Entry:
        config, before = RefreshConfig(kv_cache=kv_cache), tmp_path / f"yesterday {kv_cache}"

        def once() -> RefreshReport:
            store = tmp_path / f"store{next(number)}"
            shutil.copytree(before, store, copy_function=os.link)
            report = job(store, today, config)
            shutil.rmtree(store)
            return report

        def prepare() -> tuple[Callable[[], RefreshReport], Callable[[RefreshReport], str]]:
            job(before, yesterday, config)
            return (
                once,
                lambda report: "" if report.tokens_reused == reused else f"{report.tokens_reused} events reused",
            )

        return Entry(name, prepare)

    old = int(events.num_events(yesterday).sum())
    entries = [
        entry("alure, new events only", kv_cache=True, reused=old),
        entry("alure, all events", kv_cache=False, reused=0),
    ]
    race(Contest("refresh", f"{users:,} users, {old:,} events and one more each, {preset} preset, causal", entries))


class Stored:
    """A store with a generation of 96-d embeddings, and the rows of another."""

    def __init__(self, folder: Path, users: int) -> None:
        self.folder, self.users, self.number = folder, users, count()
        values = np.random.default_rng(0).standard_normal((users, 96)).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        offsets = pa.array(np.arange(users + 1) * 96, pa.int32())
        self.rows = pa.table(
            {
                "user_id": np.arange(users),
                "country": pa.array(np.repeat(["AR", "BR"], [users // 2, users - users // 2])),
                "embedding": pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1))),
                "as_of": np.full(users, START),
                "model": pa.repeat("0123456789abcdef" * 4, users),
                "num_events": np.arange(users) % 300,
                "refreshed_at": pa.repeat(pa.scalar(0, pa.timestamp("us", "UTC")), users),
            }
        )
        self.store = EmbeddingStore(folder / "store", create=True)
        for start in range(0, users, 32_768):
            self.store.write_unit("g", f"{start}", self.rows.slice(start, 32_768))
        model = self.rows["model"][0].as_py()
        properties = {"k": 1, "d": 96}
        self.published = self.store.publish(Generation("g", "embeddings", "", users, START, model, properties))

    def write(self) -> int:
        """One unit of a generation that is never published."""
        self.store.write_unit("h", str(next(self.number)), self.rows.slice(0, 32_768))
        return len(self.rows.slice(0, 32_768))

    def plain(self) -> int:
        rows = self.rows.slice(0, 32_768)
        pq.write_table(
            rows, self.folder / "plain.parquet", compression="zstd", compression_level=1, use_dictionary=False
        )
        return len(rows)

    def cold(self) -> dict[str, Any]:
        return EmbeddingStore(self.folder / "store").read_user(self.users // 3)

    def open(self) -> dict[str, Any]:
        return self.store.read_user(self.users // 3, self.published)


@pytest.fixture(scope="module")
def stored(quick: bool, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("store"), 40_000 if quick else 400_000)


def bench_store_write(race: Callable[[Contest], None], stored: Stored) -> None:
    rows = min(stored.users, 32_768)

    def all_of(found: int) -> str:
        return "" if found == rows else f"{found} rows"

    entries = [
        Entry("alure, a unit committed to Delta", lambda: (stored.write, all_of)),
        Entry("PyArrow, a Parquet file", lambda: (stored.plain, all_of)),
    ]
    race(Contest("refresh", f"write {rows:,} embeddings of 96", entries, facts={"rows": rows}))


def bench_store_read(race: Callable[[Contest], None], stored: Stored) -> None:
    def right(row: dict[str, Any]) -> str:
        return "" if row["user_id"] == stored.users // 3 else f"user {row['user_id']}"

    entries = [
        Entry("alure, the generation known", lambda: (stored.open, right)),
        Entry("alure, opening the store", lambda: (stored.cold, right)),
    ]
    race(Contest("refresh", f"read one of {stored.users:,} users", entries))
