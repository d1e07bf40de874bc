"""Small event logs, written straight in the log's format, with structure planted in them for models to find."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alure.engine.config import ModelConfig
from alure.engine.events import Country, Events, Manifest, stable_keys

START = 1_767_225_600  # 2026-01-01
DAY = 86_400


@dataclass
class SourceRows:
    """Events of one source in any order."""

    user: np.ndarray
    timestamp: np.ndarray
    item: np.ndarray
    event_type: np.ndarray | None = None
    dense: np.ndarray | None = None
    semantic_ids: np.ndarray | None = None
    utc_offset: np.ndarray | None = None


@dataclass
class LogParts:
    num_users: int
    num_items: int
    sources: dict[str, SourceRows]
    event_types: list[str] = field(default_factory=list)
    item_accounts: np.ndarray | None = None
    item_categories: np.ndarray | None = None
    dense: np.ndarray | None = None
    semantic_ids: np.ndarray | None = None


def write_log(folder: Path, parts: LogParts) -> Events:
    """An event log of `parts`; user and item ids are their indexes."""
    times = np.concatenate([rows.timestamp for rows in parts.sources.values()])
    folder.mkdir(parents=True, exist_ok=True)
    _write_ids(folder / "users.parquet", {"user_id": np.arange(parts.num_users)})
    accounts = parts.item_accounts if parts.item_accounts is not None else np.full(parts.num_items, -1)
    categories = parts.item_categories if parts.item_categories is not None else np.full(parts.num_items, -1)
    num_accounts, num_categories = int(accounts.max(initial=-1)) + 1, int(categories.max(initial=-1)) + 1
    _write_ids(folder / "accounts.parquet", {"account_id": np.arange(num_accounts)}, key="account_id")
    _write_ids(folder / "categories.parquet", {"category_id": np.arange(num_categories)}, key="category_id")
    items = {
        "item_id": np.arange(parts.num_items),
        "account": accounts.astype(np.int32),
        "category": categories.astype(np.int32),
    }
    _write_ids(folder / "items.parquet", items)
    columns = {
        "key": stable_keys(pa.array(np.arange(parts.num_items))),
        "account_key": stable_keys(pa.array(accounts, mask=accounts < 0)),
        "category_key": stable_keys(pa.array(categories, mask=categories < 0)),
        "dense": parts.dense,
        "semantic_ids": parts.semantic_ids,
    }
    _save(folder / "items", columns)
    for name, rows in parts.sources.items():
        _write_source(folder / "sources" / name, rows, parts.num_users, accounts, categories)
    Manifest(
        sources=list(parts.sources),
        ad_sources=list(parts.sources),
        event_types=parts.event_types,
        num_users=parts.num_users,
        num_items=parts.num_items,
        num_accounts=num_accounts,
        num_categories=num_categories,
        num_events=len(times),
        first_timestamp=int(times.min()),
        last_timestamp=int(times.max()),
        dense_dim=0 if parts.dense is None else parts.dense.shape[1],
        semantic_levels=0 if parts.semantic_ids is None else parts.semantic_ids.shape[1],
        event_dense_dims={n: r.dense.shape[1] for n, r in parts.sources.items() if r.dense is not None},
        event_semantic_levels={
            n: r.semantic_ids.shape[1] for n, r in parts.sources.items() if r.semantic_ids is not None
        },
        countries=[Country(name="all", first_user=0, num_users=parts.num_users)],
        source_counts={n: len(r.timestamp) for n, r in parts.sources.items()},
        user_id_type="int64",
        item_id_type="int64",
        fingerprint="test",
    ).write(folder)
    return Events.open(folder)


def planted_log(
    folder: Path, num_users: int = 200, num_items: int = 60, groups: int = 4, events: int = 12, seed: int = 0
) -> Events:
    """Users of one interest group view and click items of that group; each item is clicked at about the same rate.

    Sources "view" and "click" with event types view, click; accounts are groups of items, categories the groups.
    Views of a group's own items are clicked more often, so tasks have something to learn too.
    """
    generator = np.random.default_rng(seed)
    group = generator.integers(0, groups, num_users)
    user = np.repeat(np.arange(num_users), events)
    own = generator.random(len(user)) < 0.9
    item_group = np.where(own, group[user], generator.integers(0, groups, len(user)))
    item = item_group + groups * generator.integers(0, num_items // groups, len(user))
    time = START + generator.integers(0, 30 * DAY, len(user))
    clicked = generator.random(len(user)) < np.where(item_group == group[user], 0.6, 0.05)
    view = SourceRows(user, time, item, np.zeros(len(user), int))
    click = SourceRows(user[clicked], time[clicked] + 60, item[clicked], np.ones(clicked.sum(), int))
    index = np.arange(num_items)
    parts = LogParts(
        num_users=num_users,
        num_items=num_items,
        sources={"view": view, "click": click},
        event_types=["view", "click"],
        item_accounts=index // 2,
        item_categories=index % groups,
    )
    return write_log(folder, parts)


def tiny_model(**changes: object) -> ModelConfig:
    """A model small enough for tests."""
    size = {"width": 16, "layers": 2, "heads": 2, "seeds": 2, "attribute_width": 8, "hash_rows": 1 << 10}
    return ModelConfig.model_validate({**size, "max_position": 64, **changes})


def _write_source(folder: Path, rows: SourceRows, num_users: int, accounts: np.ndarray, categories: np.ndarray) -> None:
    order = np.lexsort((rows.timestamp, rows.user))
    user, item = rows.user[order], rows.item[order]
    offsets = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(user, minlength=num_users), out=offsets[1:])
    seen: dict[tuple[int, int], int] = {}
    count = np.zeros(len(user), np.int32)
    for row, pair in enumerate(zip(user.tolist(), accounts[item].tolist())):
        count[row] = seen[pair] = seen.get(pair, 0) + 1
    columns = {
        "offsets": offsets,
        "timestamp": rows.timestamp[order].astype(np.int64),
        "item": item.astype(np.int32),
        "count": count,
        "account": accounts[item].astype(np.int32),
        "category": categories[item].astype(np.int32),
        "event_type": None if rows.event_type is None else rows.event_type[order].astype(np.int16),
        "utc_offset": None if rows.utc_offset is None else rows.utc_offset[order].astype(np.int32),
        "dense": None if rows.dense is None else rows.dense[order].astype(np.float32),
        "semantic_ids": None if rows.semantic_ids is None else rows.semantic_ids[order].astype(np.int32),
    }
    _save(folder, columns)


def _save(folder: Path, columns: dict[str, np.ndarray | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, column in columns.items():
        if column is not None:
            np.save(folder / f"{name}.npy", column, allow_pickle=False)


def _write_ids(path: Path, columns: dict[str, np.ndarray], key: str | None = None) -> None:
    table = pa.table(columns)
    if key is not None:
        table = table.append_column("key", pa.array(stable_keys(table.column(key))))
    pq.write_table(table, path)
