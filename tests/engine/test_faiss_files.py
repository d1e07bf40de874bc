"""Exported index files: FAISS alone finds the neighbours of the graph in them."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.graph import add_generation, vectors

from alure.engine.config import GraphConfig
from alure.engine.export import export_store
from alure.engine.graph import SimilarityGraph, build_graphs
from alure.engine.graph.base import cluster_rows, read_clusters
from alure.engine.store import EmbeddingStore

faiss = pytest.importorskip("faiss")
CONFIG = GraphConfig(k=4, nlist=5, nprobe=2, search="grouped")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore(tmp_path / "store", create=True)
    values = vectors(600, 8)
    values[[7, 300]] = 0
    add_generation(store, "g1", values)
    return store


def found_by_faiss(folder: Path, k: int) -> tuple[np.ndarray, list[list[int]]]:
    """Similarities [n, k] and rows of the neighbours of all who are in an index, by FAISS's own reader and search."""
    users = pq.read_table(folder / "user_ids.parquet")
    similarities, rows = np.full((len(users), k), -np.inf, np.float32), [[] for _ in range(len(users))]
    for path in folder.glob("*.faiss"):
        index = faiss.read_index(str(path))
        ids = faiss.vector_to_array(index.id_map) if hasattr(index, "id_map") else _ids_of(index)
        countries = set(users["country"].take(ids).to_pylist())
        assert countries == {path.stem}
        x = index.index.reconstruct_n(0, index.ntotal) if hasattr(index, "id_map") else _vectors_of(index, ids)
        D, I = index.search(x, k + 1)
        for row, d, near in zip(ids.tolist(), D, I):
            others = near != row
            similarities[row], rows[row] = d[others][:k], near[others][:k].tolist()
    return similarities, rows


def _ids_of(index: object) -> np.ndarray:
    lists = index.invlists
    parts = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)) for i in range(index.nlist) if lists.list_size(i)]
    return np.concatenate(parts)


def _vectors_of(index: object, ids: np.ndarray) -> np.ndarray:
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    return np.stack([index.reconstruct(int(i)) for i in ids])


@pytest.mark.parametrize("search", ["grouped", "exact"])
def test_faiss_finds_the_graph_in_the_exported_files(store: EmbeddingStore, tmp_path: Path, search: str) -> None:
    build_graphs(store, CONFIG.model_copy(update={"search": search}))
    written = export_store(store.path, "faiss", tmp_path / "out")["files"]
    assert written == {"user_ids.parquet": 600, "BR.faiss": 199, "US.faiss": 399}
    graph = SimilarityGraph.load(store)
    similarities, rows = found_by_faiss(tmp_path / "out", CONFIG.k)
    for user in range(600):
        part = slice(graph.offsets[user], graph.offsets[user + 1])
        np.testing.assert_allclose(similarities[user, : part.stop - part.start], graph.similarities[part], atol=2e-6)
        assert rows[user] == graph.neighbors[part].tolist()
    if search == "grouped":
        index = faiss.read_index(str(tmp_path / "out" / "US.faiss"))
        assert (index.nlist, index.nprobe) == (5, 2)


def test_without_a_graph_or_its_clusters_the_index_is_exact(store: EmbeddingStore, tmp_path: Path) -> None:
    written = export_store(store.path, "faiss", tmp_path / "flat")["files"]
    assert written == {"user_ids.parquet": 600, "embeddings.faiss": 598}
    build_graphs(store, CONFIG)
    clusters = read_clusters(store, store.latest("graph", "alure"), CONFIG.nprobe)
    store.write_clusters("g1", cluster_rows({"US": clusters["BR"]}), {})
    export_store(store.path, "faiss", tmp_path / "other")
    assert isinstance(faiss.read_index(str(tmp_path / "other" / "US.faiss")), faiss.IndexIDMap2)
