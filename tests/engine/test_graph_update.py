"""Incremental graphs: whatever changed, equal to the bit to a search of everybody in the same clusters."""

from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph import add_generation, vectors

from alure.engine.clusters import read_clusters
from alure.engine.config import GraphConfig
from alure.engine.errors import InputError
from alure.engine.graph import GraphReport, SimilarityGraph, build_graphs, similar
from alure.engine.graph.base import Base, digest, find_base, write_clusters
from alure.engine.graph.similar import Searched, search_countries
from alure.engine.store import EmbeddingMatrix, EmbeddingStore


def base_of(searched: Searched, values: np.ndarray) -> Base:
    graph = searched.graph
    return Base("then", EmbeddingMatrix(graph.user_ids, graph.countries, values), graph, searched.clusters)


@st.composite
def changes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids then, embeddings then, ids now, embeddings now): some coarse, so that similarities tie, some zero."""
    n, d = draw(st.integers(1, 60)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    coarse = draw(st.booleans())

    def some(count: int) -> np.ndarray:
        return (rng.integers(-2, 3, (count, d)) if coarse else rng.normal(size=(count, d))).astype(np.float32)

    ids, values = np.sort(rng.choice(100, n, replace=False)), some(n)
    share = draw(st.sampled_from([0.0, 0.05, 0.2, 0.45]))
    changed = rng.random(n) < share
    now = np.where(changed[:, None], some(n) if draw(st.booleans()) else values + np.float32(0.01) * some(n), values)
    stay = rng.random(n) >= draw(st.sampled_from([0.0, 0.1]))
    come = np.setdiff1d(rng.choice(100, draw(st.integers(0, 5)), replace=False), ids)
    all_ids, all_values = np.concatenate([ids[stay], come]), np.concatenate([now[stay], some(len(come))])
    order = np.argsort(all_ids)
    return ids, values, all_ids[order], all_values[order]


@settings(max_examples=150)
@given(change=changes(), k=st.integers(1, 6), nprobe=st.integers(1, 3), search=st.sampled_from(["grouped", "exact"]))
def test_an_update_is_a_search_of_everybody(change: Any, k: int, nprobe: int, search: str) -> None:
    then_ids, then, ids, now = change
    config = GraphConfig(k=k, nlist=5, nprobe=nprobe, search=search)
    with mock.patch.object(similar, "POINTS_PER_CLUSTER", 4), mock.patch.object(similar, "SEARCH_ROWS", 7):
        before = search_countries(then, ["A"] * len(then), config, user_ids=pa.array(then_ids))
        updated = search_countries(now, ["A"] * len(now), config, user_ids=pa.array(ids), base=base_of(before, then))
        clusters = updated.clusters.get("A")
        with mock.patch.object(similar, "train_clusters", return_value=clusters):
            whole = search_countries(now, ["A"] * len(now), config, user_ids=pa.array(ids))
    np.testing.assert_array_equal(updated.graph.offsets, whole.graph.offsets)
    np.testing.assert_array_equal(updated.graph.neighbors, whole.graph.neighbors)
    np.testing.assert_array_equal(updated.graph.similarities, whole.graph.similarities)
    updated.graph.check_integrity()


def test_few_changes_search_few_users() -> None:
    x = vectors(3000)
    config = GraphConfig(k=5, nlist=20, nprobe=4, search="grouped")
    before = search_countries(x, ["A"] * 3000, config)
    now = x.copy()
    now[::100] += np.float32(0.5)
    updated = search_countries(now, ["A"] * 3000, config, base=base_of(before, x))
    assert updated.clusters["A"].centroids.equal(before.clusters["A"].centroids)
    assert 30 <= updated.countries[0].searched < 300
    same = search_countries(x, ["A"] * 3000, config, base=base_of(before, x))
    assert same.countries[0].searched == 0
    assert (same.graph.neighbors == before.graph.neighbors).all()


def test_a_country_that_outgrew_its_clusters_begins_anew() -> None:
    x = vectors(900)
    config = GraphConfig(k=5, nlist=20, nprobe=4, search="grouped")
    ids = np.arange(900)
    before = search_countries(x[:300], ["A"] * 300, config, user_ids=pa.array(ids[:300]))
    grown = search_countries(x[:500], ["A"] * 500, config, user_ids=pa.array(ids[:500]), base=base_of(before, x[:300]))
    assert grown.countries[0].clusters == before.countries[0].clusters == 7
    assert grown.countries[0].searched < 500
    outgrown = search_countries(x, ["A"] * 900, config, user_ids=pa.array(ids), base=base_of(before, x[:300]))
    assert (outgrown.countries[0].clusters, outgrown.countries[0].searched) == (20, 900)
    other = search_countries(
        x[:300] * -1, ["A"] * 300, config, user_ids=pa.array(ids[:300]), base=base_of(before, x[:300])
    )
    assert other.countries[0].searched == 300


# ---- in a store


@pytest.fixture
def store(tmp_path: Any) -> EmbeddingStore:
    store = EmbeddingStore(tmp_path / "store", create=True)
    add_generation(store, "g1", vectors(600, 8))
    return store


CONFIG = GraphConfig(k=4, nlist=5, nprobe=2, search="grouped")


def test_build_goes_on_from_the_newest_graph(store: EmbeddingStore) -> None:
    build_graphs(store, CONFIG)
    now = vectors(600, 8)
    now[[3, 250, 599]] *= np.float32(-1)
    add_generation(store, "g2", now, as_of=8)
    report = build_graphs(store, CONFIG, incremental=True)
    assert report.base == "g1"
    assert 3 <= report.searched < 100
    assert report.notes == []
    updated = SimilarityGraph.load(store)
    clusters = read_clusters(store, store.latest("embeddings"))
    assert sorted(clusters) == ["BR", "US"]
    assert digest(clusters) == digest(read_clusters(store, store.published("g1", "embeddings")))
    with mock.patch.object(similar, "train_clusters", side_effect=[clusters["BR"], clusters["US"]]):
        build_graphs(store, CONFIG)
    whole = SimilarityGraph.load(store)
    assert (updated.neighbors == whole.neighbors).all()
    assert (updated.similarities == whole.similarities).all()
    again = build_graphs(store, CONFIG, incremental=True)
    assert again.base == "g1"  # a generation's own graph is not its base


def test_the_probes_that_were_measured_stay_with_the_clusters(store: EmbeddingStore) -> None:
    def nprobe(report: GraphReport) -> dict[str, int]:
        return {country.country: country.nprobe for country in report.countries}

    config = GraphConfig(nlist="auto", k=4, search="grouped")
    now = vectors(600, 8)
    now[:200] = np.random.default_rng(0).normal(size=(200, 8))  # BR has no structure
    add_generation(store, "g2", now, as_of=8)
    first = build_graphs(store, config)
    assert nprobe(first)["BR"] > nprobe(first)["US"]
    clusters = read_clusters(store, store.latest("embeddings"))
    assert {name: found.nprobe for name, found in clusters.items()} == nprobe(first)
    now[[3, 250, 599]] *= np.float32(-1)
    add_generation(store, "g3", now, as_of=9)
    updated = build_graphs(store, config, incremental=True)
    assert (updated.base, updated.notes, nprobe(updated)) == ("g2", [], nprobe(first))
    anew = build_graphs(store, config.model_copy(update={"recall_target": 0.8}), incremental=True)
    reason = "the graph of g2 was built with another recall_target"
    assert anew.notes == [f"not incremental: {reason}; every user was searched"]


@pytest.mark.parametrize(
    ("config", "model", "reason"),
    [
        (CONFIG.model_copy(update={"k": 3}), "m", "was built with another k"),
        (CONFIG.model_copy(update={"nprobe": 3, "nlist": 4}), "m", "another nlist, nprobe"),
        (CONFIG, "other", "is of another model"),
    ],
)
def test_what_does_not_fit_is_searched_anew_and_said(
    store: EmbeddingStore, config: GraphConfig, model: str, reason: str
) -> None:
    first = build_graphs(store, CONFIG, incremental=True)
    assert first.notes == ["not incremental: no earlier generation has a graph; every user was searched"]
    add_generation(store, "g2", vectors(600, 8), as_of=8, model=model)
    report = build_graphs(store, config, incremental=True)
    assert (report.base, report.searched) == (None, 600)
    assert any(reason in note for note in report.notes)


def test_clusters_that_are_not_the_graphs_are_not_used(store: EmbeddingStore) -> None:
    build_graphs(store, CONFIG)
    add_generation(store, "g2", vectors(600, 8), as_of=8)
    source = store.latest("embeddings")
    kept = {name: getattr(CONFIG, name) for name in ("k", "nlist", "nprobe", "search")}
    assert find_base(store, source, kept)[0] is not None
    then = store.published("g1", "embeddings")
    clusters = read_clusters(store, then)
    write_clusters(store, then, {"US": clusters["BR"], "BR": clusters["US"]})
    assert find_base(store, source, kept) == (None, "the clusters of g1 are not those of its graph")


def test_faiss_is_not_incremental(store: EmbeddingStore) -> None:
    with pytest.raises(InputError, match="incremental: FAISS searches everything"):
        build_graphs(store, CONFIG.model_copy(update={"search": "faiss"}), incremental=True)


def test_countries_without_clusters_keep_none(store: EmbeddingStore) -> None:
    build_graphs(store, CONFIG.model_copy(update={"search": "exact"}))
    assert store.read_clusters().num_rows == 0
    assert read_clusters(store, store.latest("embeddings")) == {}
