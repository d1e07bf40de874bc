"""Exported index files: FAISS alone finds the neighbours of the graph in them."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph import add_generation, vectors

from alure.engine.clusters import read_clusters
from alure.engine.config import GraphConfig
from alure.engine.errors import InputError
from alure.engine.export import export_store
from alure.engine.graph import SimilarityGraph, build_graphs
from alure.engine.graph.base import digest, write_clusters
from alure.engine.graph.faiss_files import read_clusters_of_files
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
    clusters = read_clusters(store, store.latest("graph", "alure"))
    write_clusters(store, store.latest("embeddings"), {"US": clusters["BR"]})
    export_store(store.path, "faiss", tmp_path / "other")
    assert isinstance(faiss.read_index(str(tmp_path / "other" / "US.faiss")), faiss.IndexIDMap2)


# ---- files in


def test_a_graph_in_the_clusters_of_index_files(store: EmbeddingStore, tmp_path: Path) -> None:
    build_graphs(store, CONFIG, seed=3)
    mine, then = SimilarityGraph.load(store), read_clusters(store, store.latest("graph", "alure"))
    export_store(store.path, "faiss", tmp_path / "out")
    given = read_clusters_of_files(tmp_path / "out", 8, CONFIG.nprobe)
    assert digest(given) == digest(then)
    build_graphs(store, CONFIG, clusters=tmp_path / "out", seed=4)  # the seed would train others
    again = SimilarityGraph.load(store)
    assert (again.neighbors == mine.neighbors).all()
    assert digest(read_clusters(store, store.latest("graph", "alure"))) == digest(then)
    auto = GraphConfig(nprobe="auto", recall_target=0.6, k=4, search="grouped")
    report = build_graphs(store, auto, clusters=tmp_path / "out")
    assert [(country.clusters, country.nprobe) for country in report.countries] == [(5, 1), (5, 1)]
    (tmp_path / "out" / "US.faiss").unlink()
    report = build_graphs(store, GraphConfig(nlist=3, k=4, exact_below=250), clusters=tmp_path / "out")
    assert [(country.engine, country.clusters) for country in report.countries] == [("exact", 0), ("grouped", 3)]
    assert "BR: clusters: 5 given and not used; searched exactly" in report.notes
    with pytest.raises(InputError, match="leave out one of the two"):
        build_graphs(store, CONFIG, clusters=tmp_path / "out", incremental=True)


def index_file(folder: Path, factory: str = "IVF4,Flat", d: int = 8, metric: int = faiss.METRIC_INNER_PRODUCT) -> Path:
    index = faiss.index_factory(d, factory, metric)
    x = np.random.default_rng(0).normal(size=(400, d)).astype(np.float32)
    index.train(x)
    index.add(x)
    faiss.write_index(index, str(folder / "BR.faiss"))
    return folder / "BR.faiss"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"factory": "Flat"}, "expected an IndexIVFFlat .* got 'IxFI'; refused"),
        ({"factory": "IVF4,PQ4x4"}, "got 'IwPQ'"),
        ({"factory": "IVF4_HNSW,Flat"}, "expected a flat quantizer .* got 'IHNf'"),
        ({"factory": "PCA4,IVF4,Flat"}, "got 'IxPT'"),
        ({"d": 6}, "of width 8, .* got width 6, trained, metric 0"),
        ({"metric": faiss.METRIC_L2}, "got width 8, trained, metric 1"),
    ],
)
def test_other_indexes_are_refused(tmp_path: Path, made: dict, message: str) -> None:
    index_file(tmp_path, **made)
    with pytest.raises(InputError, match=message):
        read_clusters_of_files(tmp_path, 8, 2)


# places in the file: nlist; the quantizer's kind, its number of vectors, its number of floats, its floats
NLIST, KIND, STORED, FLOATS, DATA = 37, 53, 61, 90, 98


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"\x80\x04\x95.", "an IndexIVFFlat"),  # a pickle
        (NLIST, struct.pack("<Q", 2**62), "a centroid of 8 floats a list"),
        (NLIST, struct.pack("<Q", 0), "a centroid of 8 floats a list"),
        (KIND, b"IxPQ", "a flat quantizer"),
        (STORED, struct.pack("<q", -4), "a centroid of 8 floats a list"),
        (FLOATS, struct.pack("<Q", 2**61), "a centroid of 8 floats a list"),
        (DATA, struct.pack("<f", float("nan")), "finite centroids, got NaN"),
    ],
)
def test_files_that_lie_are_refused(tmp_path: Path, place: int, value: bytes, message: str) -> None:
    path = index_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_clusters_of_files(tmp_path, 8, 2)


def test_a_file_of_more_lists_than_it_holds(tmp_path: Path) -> None:
    content = bytearray(index_file(tmp_path).read_bytes())
    for place, value in ((NLIST, 2**50), (STORED, 2**50), (FLOATS, 2**53)):
        content[place : place + 8] = struct.pack("<Q", value)
    (tmp_path / "BR.faiss").write_bytes(content)
    with pytest.raises(InputError, match="9007199254740992 floats, got a file that ends early"):
        read_clusters_of_files(tmp_path, 8, 2)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        read_clusters_of_files(tmp_path / "none", 8, 2)
    with pytest.raises(InputError, match="expected a folder"):
        read_clusters_of_files(tmp_path / "BR.faiss", 8, 2)


@settings(max_examples=50)
@given(st.binary(max_size=80), st.integers(0, 300))
def test_any_bytes_are_clusters_or_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes, place: int) -> None:
    folder = tmp_path_factory.mktemp("index")
    content = index_file(folder).read_bytes()
    for broken in (content[:place], content[:place] + junk + content[place + len(junk) :]):
        (folder / "BR.faiss").write_bytes(broken)
        with contextlib.suppress(InputError):
            assert read_clusters_of_files(folder, 8, 2)["BR"].centroids.shape[1] == 8
