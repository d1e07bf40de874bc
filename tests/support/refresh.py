"""A small log with countries, a checkpoint that reads it, and what a store holds in a form that compares."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alure.engine.events import Country, Events, Manifest
from alure.engine.model import AlureModel, EventSchema
from alure.engine.model.checkpoint import CheckpointConfig, save_checkpoint
from alure.engine.store import EmbeddingStore
from support.model import DAY, START, LogParts, SourceRows, tiny_model, write_log


def name_countries(folder: Path, shares: dict[str, float]) -> Events:
    """Give the users of a log countries, in shares of their number, as ranges in their order."""
    users = pq.read_table(folder / "users.parquet")
    bounds = np.round(np.cumsum([0, *shares.values()]) / sum(shares.values()) * len(users)).astype(int)
    names = np.repeat(list(shares), np.diff(bounds))
    if "country" in users.schema.names:
        users = users.drop_columns("country")
    pq.write_table(users.append_column("country", pa.array(names, pa.string())), folder / "users.parquet")
    countries = [
        Country(name=name, first_user=int(first), num_users=int(last - first))
        for name, first, last in zip(shares, bounds, bounds[1:])
    ]
    Manifest.read(folder).model_copy(update={"countries": countries}).write(folder)
    return Events.open(folder)


def jagged_log(folder: Path, seed: int = 0, num_users: int = 60, late: np.ndarray | None = None) -> Events:
    """Users of 1 to 200 events, two of none, in two sources over 10 days; `late` users have one more event on day 9."""
    generator = np.random.default_rng(seed)
    sizes = generator.geometric(0.1, num_users)
    sizes[[3, 17]], sizes[5] = 0, 200
    user = np.repeat(np.arange(num_users), sizes)
    time = START + generator.integers(0, 8 * DAY, len(user))
    extra = np.arange(0) if late is None else late
    user, time = np.append(user, extra), np.append(time, np.full(len(extra), START + 9 * DAY))
    item = (user * 7 + time) % 40
    first = user % 2 == 0
    sources = {
        "click": SourceRows(user[first], time[first], item[first]),
        "view": SourceRows(user[~first], time[~first], item[~first]),
    }
    write_log(folder, LogParts(num_users, 40, sources, item_accounts=np.arange(40) // 4))
    return name_countries(folder, {"AR": 0.4, "BR": 0.6})


def rename_log(folder: Path, fingerprint: str) -> Events:
    Manifest.read(folder).model_copy(update={"fingerprint": fingerprint}).write(folder)
    return Events.open(folder)


def save_model(folder: Path, events: Events, seed: int = 0, **changes: Any) -> Path:
    """An untrained checkpoint for `events`."""
    torch.manual_seed(seed)
    config, schema = tiny_model(**changes), EventSchema.of(events.manifest)
    save_checkpoint(folder, AlureModel(config, schema), CheckpointConfig(model=config, events=schema, sha256=""), {})
    return folder


def rows_of(store: EmbeddingStore, generation: str | None = None) -> dict[Any, tuple[Any, ...]]:
    """user: everything of its row but the moment of writing."""
    columns = ["country", "generation", "embedding", "as_of", "model", "num_events"]
    return {
        row["user_id"]: tuple(map(str, (row[c] for c in columns)))
        for row in store.read_embeddings(generation).to_pylist()
    }
