"""Embeddings in clusters, and generations of them in a store."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from alure.engine.store import EmbeddingStore, Generation


def vectors(n: int, d: int = 12, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(n // 40, 1), d))
    return (centres[generator.integers(0, len(centres), n)] + 0.5 * generator.normal(size=(n, d))).astype(np.float32)


def add_generation(store: EmbeddingStore, name: str, values: np.ndarray, as_of: int = 7, model: str = "m") -> None:
    """Users 0, 10, 20, …, the first third in BR and the others in US; `values` are two embeddings each."""
    n, width = values.shape
    rows = pa.table(
        {
            "user_id": np.arange(n) * 10,
            "country": ["BR"] * (n // 3) + ["US"] * (n - n // 3),
            "embedding": pa.array(values.tolist(), pa.list_(pa.float32())),
            "as_of": np.full(n, as_of),
            "model": [model] * n,
            "num_events": np.full(n, 3),
            "refreshed_at": pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * n, pa.timestamp("us", "UTC")),
        }
    )
    store.write_unit(name, "all", rows)
    store.publish(Generation(name, "embeddings", "", n, as_of, model, {"k": 2, "d": width // 2}))
