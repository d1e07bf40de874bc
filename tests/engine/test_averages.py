"""Embeddings averaged over generations when they are read, and graphs of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph import vectors
from support.store import unit

from alure.engine.config import GraphConfig
from alure.engine.errors import InputError
from alure.engine.graph import SimilarityGraph, build_graphs
from alure.engine.graph.faiss_files import write_faiss
from alure.engine.retrieval.nearest import NearestUsers
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.averages import last_generations, read_average
from alure.engine.store.upkeep import vacuum

K, D = 2, 6


def units(values: np.ndarray) -> np.ndarray:
    each = values.reshape(len(values), K, -1)
    return (each / np.linalg.norm(each, axis=2, keepdims=True)).reshape(values.shape).astype(np.float32)


def add(store: EmbeddingStore, name: str, ids: Any, values: np.ndarray, as_of: int, **properties: Any) -> Generation:
    """One country; `values` [n, K · D]."""
    rows = unit(np.asarray(ids), as_of=as_of, width=K * D)
    column = rows.schema.get_field_index("embedding")
    rows = rows.set_column(column, "embedding", pa.array(values.tolist(), pa.list_(pa.float32())))
    store.write_unit(name, "0", rows)
    return store.publish(Generation(name, "embeddings", "", len(ids), as_of, "m", {"k": K, "d": D, **properties}))


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_it_is_the_direction_of_the_mean(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int) -> None:
    """Users come and go, and about half of them are carried forward each night, which counts once."""
    generator = np.random.default_rng(seed)
    store = EmbeddingStore(tmp_path_factory.mktemp("store"), create=True)
    now = units(generator.standard_normal((30, K * D)))
    seen: list[dict[int, np.ndarray]] = []
    for night in range(4):
        renewed = generator.random(30) < 0.5
        now = np.where(renewed[:, None], units(generator.standard_normal(now.shape)), now)
        ids = np.flatnonzero(generator.random(30) < 0.8)
        add(store, f"g{night}", ids, now[ids], night)
        seen.append({int(user): now[user] for user in ids})
    chosen = last_generations(store, store.latest("embeddings"), count)
    assert [g.generation for g in chosen] == [f"g{night}" for night in (3, 2, 1, 0)[:count]]
    found = read_average(store, chosen)
    assert found.user_ids.to_pylist() == sorted(seen[3])
    for user, value in zip(found.user_ids.to_pylist(), found.values):
        mine = [night[user] for night in seen[::-1][:count] if user in night]
        distinct = [v for i, v in enumerate(mine) if i == 0 or not np.array_equal(v, mine[i - 1])]
        if len(distinct) == 1:
            assert np.array_equal(value, distinct[0])
        else:
            np.testing.assert_allclose(value, units(np.sum(distinct, 0, np.float64)[None])[0], atol=1e-6)


def three_nights(folder: Path) -> tuple[EmbeddingStore, np.ndarray, list[np.ndarray]]:
    """400 users around a truth that no night shows without noise."""
    store, generator = EmbeddingStore(folder, create=True), np.random.default_rng(0)
    truth = units(vectors(400, K * D))
    nights = [units(truth + 0.1 * generator.standard_normal(truth.shape)) for _ in range(3)]
    for night, values in enumerate(nights):
        add(store, f"g{night}", np.arange(400), values, night)
    return store, truth, nights


def test_a_graph_of_averages_is_nearer_to_the_truth(tmp_path: Path) -> None:
    store, truth, nights = three_nights(tmp_path)

    def right() -> float:
        neighbors = SimilarityGraph.load(store).neighbors.reshape(400, 5)
        products = truth @ truth.T - 9 * np.eye(400)
        best = np.argsort(-products, axis=1)[:, :5]
        return float(np.mean([len(np.intersect1d(a, b)) / 5 for a, b in zip(neighbors, best)]))

    build_graphs(store, GraphConfig(k=5))
    alone = right()
    report = build_graphs(store, GraphConfig(k=5, average=3))
    assert report.averaged == ["g2", "g1", "g0"]
    assert right() > alone + 0.1
    mean = units(np.sum(nights, 0))
    similarities, rows = NearestUsers(store, store.latest("embeddings"), 5).search(mean[7], "BR", exclude=7)
    graph = SimilarityGraph.load(store)
    assert rows.tolist() == graph.neighbors[35:40].tolist()
    np.testing.assert_allclose(similarities, graph.similarities[35:40], atol=1e-6)
    assert np.array_equal(store.read_matrix().values, nights[2])  # what is stored is the night's own


def test_a_graph_of_averages_is_brought_up_to_date(tmp_path: Path) -> None:
    """Equal to a graph built anew; where an averaged generation is gone, it is built anew."""
    store, _, nights = three_nights(tmp_path)
    config = GraphConfig(k=5, average=2, search="exact")
    build_graphs(store, config)
    add(store, "g3", np.arange(400), nights[2], 3)  # nobody has news: averages of g3 and g2 are those of g2 alone
    changed = nights[2].copy()
    changed[:9] = nights[0][:9]
    add(store, "g4", np.arange(400), changed, 4)
    build_graphs(store, config, generation="g3")
    report = build_graphs(store, config, incremental=True)
    assert (report.base, report.averaged) == ("g3", ["g4", "g3"])
    assert 9 <= report.searched < 400
    updated = SimilarityGraph.load(store)
    build_graphs(store, config)
    whole = SimilarityGraph.load(store)
    assert np.array_equal(updated.neighbors, whole.neighbors)
    assert np.array_equal(updated.similarities, whole.similarities)
    add(store, "g5", np.arange(400), changed, 5)
    vacuum(store, keep=2, grace_hours=0)
    report = build_graphs(store, config, incremental=True)
    assert report.base is None
    assert "not all published any more" in report.notes[0]


def test_faiss_gets_what_the_graph_was_searched_in(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    store, _, nights = three_nights(tmp_path / "store")
    build_graphs(store, GraphConfig(k=5, average=3))
    (tmp_path / "out").mkdir()
    write_faiss(store, "g2", tmp_path / "out")
    index = faiss.read_index(str(tmp_path / "out" / "BR.faiss"))
    mean = units(np.sum(nights, 0))
    found = index.search(mean[:20] / np.sqrt(K), 6)[1][:, 1:]
    assert np.array_equal(found, SimilarityGraph.load(store).neighbors.reshape(400, 5)[:20])


def test_spaces_and_moments_are_not_mixed(tmp_path: Path) -> None:
    store, values = EmbeddingStore(tmp_path, create=True), units(vectors(10, K * D))
    ids = np.arange(10)
    add(store, "a", ids, values, 1)
    add(store, "b", ids, values[::-1].copy(), 2, space="other")
    aligned = add(store, "c", ids, values, 3, space="other")
    late = add(store, "late", ids, values, 9, space="other")
    early = add(store, "early", ids, values, 4, space="other")
    assert [g.generation for g in last_generations(store, aligned, 2)] == ["c", "b"]
    assert [g.generation for g in last_generations(store, early, 2)] == ["early", "c"]
    assert [g.generation for g in last_generations(store, late, 3)] == ["late", "c", "b"]
    with pytest.raises(
        InputError, match=r"generation a is in the space of model m, c in that of other.*average 2 at most"
    ):
        build_graphs(store, GraphConfig(k=2, average=3), generation="c")
    assert store.generations("graph") == []
