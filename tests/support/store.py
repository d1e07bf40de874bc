"""Rows as a refresh and a graph build would hand them to the store."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from alure.engine.store import Generation

WIDTH = 4
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def unit(ids: Any, country: Any = "BR", model: str = "m", as_of: int = 7, width: int = WIDTH) -> pa.Table:
    count = len(ids)
    countries = [country] * count if isinstance(country, str) else country
    values = np.arange(count * width, dtype=np.float32).reshape(count, width)
    return pa.table(
        {
            "user_id": ids,
            "country": pa.array(countries, pa.string()),
            "embedding": pa.array(values.tolist(), pa.list_(pa.float32())),
            "as_of": pa.array([as_of] * count, pa.int64()),
            "model": pa.array([model] * count, pa.string()),
            "num_events": pa.array([1] * count, pa.int64()),
            "refreshed_at": pa.array([NOW] * count, pa.timestamp("us", "UTC")),
        }
    )


def generation(rows: int, name: str = "g", model: str = "m", as_of: int = 7, **properties: Any) -> Generation:
    return Generation(name, "embeddings", "", rows, as_of, model, {"k": 2, "d": 2, **properties})


def graph(ids: list[Any], similarity: float = 0.5) -> pa.Table:
    count = len(ids)
    neighbors = [[ids[(i + 1) % count]] for i in range(count)]
    similarities = pa.array([[similarity]] * count, pa.list_(pa.float32()))
    return pa.table(
        {"user_id": ids, "country": ["BR"] * count, "neighbor_ids": neighbors, "similarities": similarities}
    )
