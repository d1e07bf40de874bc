"""`alure inspect`: what is in a store, a model or an event log."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.store import EmbeddingStore
from alure.engine.store.location import Location, locate, size_of
from alure.engine.store.s3 import S3Location

STORY_LENGTH = 20


def inspect_path(place: str | Path, user: str | None = None) -> dict[str, Any]:
    """A summary of whatever alure wrote at `place`; with `user`, that user's story."""
    path = locate(place)
    if isinstance(path, S3Location):
        return inspect_store(path, user)
    if not path.exists():
        raise InputError(f"inspect: {path} does not exist")
    if (path / "events.json").exists():
        return inspect_events(path, user)
    if (path / "model.safetensors").exists():
        if user is not None:
            raise InputError("--user: a model holds no users; give a store or an event log")
        return inspect_model(path)
    if (path / "generations").exists():
        return inspect_store(path, user)
    inside = [str(path / name) for name in ("store", "model", "events") if (path / name).is_dir()]
    tip = f"; the output of a run has them inside: {', '.join(inside)}" if inside else ""
    raise InputError(f"inspect: {path} is neither a store, nor a model, nor an event log that alure wrote{tip}")


def inspect_events(path: Path, user: str | None) -> dict[str, Any]:
    events = Events.open(path)
    if user is not None:
        return {"user": user, "history": events.story(typed_id(events.users["user_id"].type, user), STORY_LENGTH)}
    return {"kind": "events", "path": str(path), "size_bytes": size_of(path), **events.manifest.model_dump(mode="json")}


def inspect_model(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text())
    metrics_path = path / "metrics.json"
    metrics = json.loads(metrics_path.read_text()) if metrics_path.exists() else {}
    return {"kind": "model", "path": str(path), "size_bytes": size_of(path), **config, "metrics": metrics}


def inspect_store(path: Location, user: str | None) -> dict[str, Any]:
    store = EmbeddingStore(path)
    published = [
        {"table": table, "name": g.name, "generation": g.generation, "rows": g.rows, "as_of": g.as_of,
         "model": g.model[:12], "published_at": f"{g.published_at:%Y-%m-%d %H:%M:%S}", "properties": dict(g.properties)}
        for table in TABLES for g in store.generations(table)
    ]  # fmt: skip
    if user is not None:
        return {"user": user, **user_in_store(store, user)}
    newest = store.latest("embeddings").generation
    return {
        "kind": "store",
        "path": str(path),
        "size_bytes": size_of(path),
        "newest": newest,
        "embedding_quality": embedding_quality(store, newest),
        "published": published,
    }


TABLES = ("embeddings", "graph", "candidates", "popularity", "clusters")


def embedding_quality(store: EmbeddingStore, generation: str, sample: int = 2000) -> dict[str, float]:
    """How far the vectors spread: the mean cosine of random pairs (1 = collapsed) and the effective dimension."""
    values = store.read_matrix(generation).values
    if len(values) < 2:
        return {}
    rows = np.random.default_rng(0).permutation(len(values))[:sample]
    vectors = values[rows].astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    half = len(vectors) // 2
    spectrum = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False) ** 2
    return {
        "mean_cosine_of_random_pairs": float((vectors[:half] * vectors[half : 2 * half]).sum(1).mean()),
        "effective_dimension": float(spectrum.sum() ** 2 / max((spectrum**2).sum(), 1e-12)),
    }


def user_in_store(store: EmbeddingStore, user: str) -> dict[str, Any]:
    """Neighbours and best candidates of one user in the newest generation."""
    generation = store.latest("embeddings").generation
    key = typed_id(store.user_id_type(), user)
    story: dict[str, Any] = store.read_user(key, generation)
    del story["embedding"]
    for kind, read in (("graph", store.read_graph), ("candidates", store.read_candidates)):
        for published in store.generations(kind):
            if published.generation == generation:
                rows = read(generation, published.name, users=[key]).to_pylist()
                lists = {name: v[:STORY_LENGTH] for row in rows for name, v in row.items() if isinstance(v, list)}
                story.setdefault(kind, {})[published.name] = lists
    return story


def typed_id(kind: pa.DataType, text: str) -> int | str:
    """A user id typed at the command line, as the type the tables hold."""
    if not pa.types.is_integer(kind):
        return text
    try:
        return int(np.int64(int(text)))
    except (ValueError, OverflowError):
        raise InputError(f"--user: user ids here are integers of 64 bits, got {text!r}") from None
