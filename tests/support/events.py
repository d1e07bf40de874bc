"""Small event logs for tests: `make_events` from rows, `random_events` from a seed. Both go through the real ingest."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alure.engine.config import EventsConfig
from alure.engine.events import Events, ingest

DAY = 86_400
START = 1_700_000_000  # unix seconds: no time of a random log is earlier


def write_rows(path: Path, rows: Iterable[dict[str, Any]] | pa.Table) -> Path:
    """Rows (dicts; a missing key is null) or a table to Parquet."""
    if not isinstance(rows, pa.Table):
        rows = list(rows)
        columns = dict.fromkeys(key for row in rows for key in row)
        rows = pa.table({key: [row.get(key) for row in rows] for key in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path)
    return path


def make_events(
    tmp_path: Path,
    rows: Iterable[dict[str, Any]] | pa.Table,
    items: Iterable[dict[str, Any]] | pa.Table | None = None,
    name: str = "events",
    **options: Any,
) -> Events:
    """Ingest `rows` (and `items`) into tmp_path/name and open the log. `options`: of EventsConfig.

    rows: user_id, timestamp, item_id and what else INTERFACE's event log has.
    """
    inputs = write_rows(tmp_path / f"{name}-input" / "events.parquet", rows)
    if items is not None:
        options["items"] = write_rows(tmp_path / f"{name}-input" / "items.parquet", items)
    config = EventsConfig(inputs=[inputs], **{"latest": 10 * START, "max_quarantine_share": 1.0, **options})
    ingest(config, tmp_path / name)
    return Events.open(tmp_path / name)


def random_table(
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1_000,
    seed: int = 0,
    sources: tuple[str, ...] = ("ad_click", "comment", "video_view"),
    countries: tuple[str, ...] = ("DE", "US"),
) -> pa.Table:
    """Events of 30 days: accounts, categories, countries, event types, values and UTC offsets."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, num_users, num_events), rng.integers(0, num_items, num_events)
    return pa.table(
        {
            "user_id": 1_000 + user,
            "timestamp": START + rng.integers(0, 30 * DAY, num_events),
            "source": np.array(sources)[rng.integers(0, len(sources), num_events)],
            "item_id": 5_000 + item,
            "account_id": item % 7,
            "category_id": np.array([f"category {c}" for c in range(4)])[item % 4],
            "country": np.array(countries)[user % len(countries)],
            "event_type": np.array(["view", "click", "conversion"])[rng.choice(3, num_events, p=[0.6, 0.3, 0.1])],
            "value": rng.random(num_events, dtype=np.float32),
            "utc_offset": 3_600 * (user % 3 - 1),
        }
    )


def random_items(num_items: int = 60, dense_dim: int = 8, seed: int = 0) -> pa.Table:
    """The items of `random_table`, with titles and dense vectors."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((num_items, dense_dim)).astype(np.float32)
    return pa.table(
        {
            "item_id": 5_000 + np.arange(num_items),
            "title": [f"item {i}" for i in range(num_items)],
            "dense": pa.array(list(dense), pa.list_(pa.float32())),
        }
    )


def random_events(tmp_path: Path, dense_dim: int = 0, **shape: Any) -> Events:
    """The log of `random_table(**shape)`; with `dense_dim`, the items have dense vectors and titles."""
    items = random_items(shape.get("num_items", 60), dense_dim, shape.get("seed", 0)) if dense_dim else None
    return make_events(tmp_path, random_table(**shape), items)
