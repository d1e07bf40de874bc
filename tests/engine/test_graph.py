"""Similarity, social and PageRank graphs: against brute force in float64, FAISS and networkx; and every bad input."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph import add_generation, vectors

from alure.engine.config import GraphConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.graph import (
    SimilarityGraph,
    build_graphs,
    build_similarity_graph,
    engines,
    ppr_graph,
    read_follows,
    similar,
    social_graph,
)
from alure.engine.graph.follows import follows_of
from alure.engine.store import EmbeddingStore

has_faiss = pytest.mark.skipif(not engines.has_faiss(), reason="needs faiss")
SEARCHES = ["exact", "grouped", pytest.param("faiss", marks=has_faiss)]
CLUSTERED = GraphConfig(nlist=8, nprobe=8, k=5)  # every cluster is searched: exact whatever the engine


def brute_force(x: np.ndarray, countries: list[str], k: int) -> list[list[tuple[int, float]]]:
    """Cosine in float64; ties to the lower row; zero vectors have and are no neighbours."""
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    unit = x / np.where(norms == 0, 1.0, norms)[:, None]
    cosines = unit @ unit.T
    rows = []
    for u in range(len(x)):
        others = [v for v in range(len(x)) if v != u and countries[v] == countries[u] and norms[u] and norms[v]]
        rows.append(sorted(((v, cosines[u, v]) for v in others), key=lambda pair: -pair[1])[:k])
    return rows


def neighbors(graph: SimilarityGraph) -> list[list[int]]:
    return [part.tolist() for part in np.split(graph.neighbors, graph.offsets[1:-1])] if graph.num_users else []


def check(graph: SimilarityGraph, expected: list[list[tuple[int, float]]]) -> None:
    """Similarities as expected, and neighbours too up to scores that float32 cannot part."""
    graph.check_integrity()
    for u, row in enumerate(expected):
        part = slice(graph.offsets[u], graph.offsets[u + 1])
        assert graph.offsets[u + 1] - graph.offsets[u] == len(row)
        wanted = dict(row)
        np.testing.assert_allclose(graph.similarities[part], list(wanted.values()), atol=2e-6)
        for v in set(graph.neighbors[part].tolist()) ^ set(wanted):
            here = wanted.get(v, row[-1][1])
            assert abs(here - row[-1][1]) < 2e-6, f"user {u}: {v} is not a tie at the boundary"


# ---- the similarity graph


@pytest.mark.parametrize("search", SEARCHES)
def test_equals_brute_force(search: Any) -> None:
    x = vectors(700)
    x[10:30] = x[5]
    x[40:42] = 0
    countries = ["BR"] * 400 + ["US"] * 300
    graph, reports = build_similarity_graph(x, countries, CLUSTERED.model_copy(update={"search": search}))
    check(graph, brute_force(x, countries, 5))
    assert [report.engine for report in reports] == [search, search]
    assert [report.recall for report in reports] == [1.0, 1.0]
    assert reports[0].zero_vectors == 2
    assert graph.offsets[42] == graph.offsets[40]


@has_faiss
def test_grouped_finds_what_faiss_finds() -> None:
    x = vectors(2000)
    config = GraphConfig(nlist=20, nprobe=4, k=10, exact_below=0)
    mine, mine_report = build_similarity_graph(x, ["A"] * 2000, config.model_copy(update={"search": "grouped"}))
    theirs, their_report = build_similarity_graph(x, ["A"] * 2000, config.model_copy(update={"search": "faiss"}))
    np.testing.assert_allclose(mine.similarities, theirs.similarities, atol=2e-6)
    assert (mine.neighbors == theirs.neighbors).mean() > 0.999
    assert 0.5 < mine_report[0].recall <= 1.0
    assert mine_report[0].recall == pytest.approx(their_report[0].recall, abs=1e-3)
    assert mine_report[0].recall_sample == 1000


@settings(max_examples=15)
@given(st.integers(0, 99), st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_auto_takes_the_fewest_clusters_that_reach_the_recall(seed: int, spread: float, target: float) -> None:
    """Fewer than 1,000 users, so that the sample is everybody and the recall is exact."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 6))[rng.integers(0, 12, 600)] + spread * rng.standard_normal((600, 6))
    config = GraphConfig(nlist="auto", k=5, search="grouped", recall_target=target)
    graph, [report] = build_similarity_graph(x, ["A"] * 600, config, seed)
    assert report.clusters == 15  # √600 would be 24 with fewer than 39 users each
    assert report.recall >= target
    assert report.notes == []
    chosen = GraphConfig(nlist=15, nprobe=report.nprobe, k=5, search="grouped")
    same, _ = build_similarity_graph(x, ["A"] * 600, chosen, seed)
    assert (same.neighbors == graph.neighbors).all()
    if report.nprobe > 1:
        fewer = chosen.model_copy(update={"nprobe": report.nprobe - 1})
        assert build_similarity_graph(x, ["A"] * 600, fewer, seed)[1][0].recall < target


def test_auto_chooses_by_country() -> None:
    """A country of far apart groups needs few of its clusters, one without structure many."""
    rng = np.random.default_rng(0)
    grouped = rng.standard_normal((40, 8))[rng.integers(0, 40, 1700)] + 0.01 * rng.standard_normal((1700, 8))
    x = np.concatenate([grouped, rng.standard_normal((2500, 8)), rng.standard_normal((50, 8))])
    labels = np.repeat(["BR", "US", "NZ"], [1700, 2500, 50])
    config = GraphConfig(nlist="auto", search="grouped")
    _, reports = build_similarity_graph(x, labels, config)
    assert [(report.country, report.clusters) for report in reports] == [("BR", 41), ("NZ", 0), ("US", 50)]
    nprobe = [report.nprobe for report in reports]
    assert nprobe[0] <= 2 < 6 <= nprobe[2]
    assert all(report.recall >= 0.93 for report in reports)
    assert [report.nprobe for report in build_similarity_graph(x, labels, config)[1]] == nprobe


@settings(max_examples=40)
@given(data=st.data())
def test_small_populations(data: st.DataObject) -> None:
    n, d, k = data.draw(st.integers(0, 25)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=n * d, max_size=n * d))
    x = np.array(values, dtype=np.float32).reshape(n, d)
    countries = data.draw(st.lists(st.sampled_from(["BR", "NZ", "US"]), min_size=n, max_size=n))
    graph, reports = build_similarity_graph(x, countries, GraphConfig(k=k))
    check(graph, brute_force(x, countries, k))
    assert sum(report.users for report in reports) == n
    assert sum(report.edges for report in reports) == graph.num_edges
    directed = {(u, v) for u, row in enumerate(neighbors(graph)) for v in row}
    if k >= n:
        assert directed == {(v, u) for u, v in directed}  # whoever sees all others is seen by all
    json.dumps([asdict(report) for report in reports])


@pytest.mark.parametrize("search", SEARCHES)
def test_countries_never_mix_and_do_not_matter_to_each_other(search: Any) -> None:
    x = vectors(600)
    countries = np.where(np.arange(600) % 3 == 0, "BR", "US")  # not contiguous
    config = GraphConfig(nlist=4, nprobe=2, k=5, search=search)
    graph, _ = build_similarity_graph(x, countries, config)
    source = np.repeat(np.arange(600), np.diff(graph.offsets))
    assert (countries[source] == countries[graph.neighbors]).all()
    other = x.copy()
    other[countries == "US"] = vectors(400, seed=9)
    changed, _ = build_similarity_graph(other, countries, config)
    mine = countries[source] == "BR"
    assert (graph.neighbors[mine] == changed.neighbors[mine]).all()
    assert (graph.similarities[mine] == changed.similarities[mine]).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_same_input_same_graph(search: Any) -> None:
    x, config = vectors(500), GraphConfig(nlist=8, nprobe=2, k=5, search=search)
    first, _ = build_similarity_graph(x, ["A"] * 500, config, seed=1)
    again, _ = build_similarity_graph(x.copy(), ["A"] * 500, config, seed=1)
    assert (first.neighbors == again.neighbors).all()
    assert (first.similarities == again.similarities).all()


@pytest.mark.parametrize("search", SEARCHES)
def test_a_user_with_many_copies_is_not_its_own_neighbour(search: Any) -> None:
    x = np.repeat(vectors(1), 200, axis=0)
    graph, _ = build_similarity_graph(x, ["A"] * 200, GraphConfig(nlist=3, nprobe=3, k=4, search=search))
    graph.check_integrity()
    assert (np.diff(graph.offsets) == 4).all()
    np.testing.assert_allclose(graph.similarities, 1.0, atol=1e-6)
    assert graph.similarities.max() <= 1.0


def test_scale_of_embeddings_does_not_matter() -> None:
    x = vectors(100)
    graph, _ = build_similarity_graph(x, ["A"] * 100, CLUSTERED)
    scaled = x * (2.0 ** np.random.default_rng(0).integers(-20, 20, 100))[:, None].astype(np.float32)
    assert (graph.neighbors == build_similarity_graph(scaled, ["A"] * 100, CLUSTERED)[0].neighbors).all()


def test_ranges_and_labels_mean_the_same() -> None:
    x = vectors(60)
    labels, _ = build_similarity_graph(x, ["BR"] * 20 + ["US"] * 40, CLUSTERED)
    ranges, _ = build_similarity_graph(x, [("BR", 0, 20), ("NZ", 20, 0), ("US", 20, 40)], CLUSTERED)
    assert (labels.neighbors == ranges.neighbors).all()
    assert labels.countries.equals(ranges.countries)
    with pytest.raises(InputError, match="ranges that tile the 60 users"):
        build_similarity_graph(x, [("BR", 0, 20), ("US", 30, 30)], CLUSTERED)


@pytest.mark.parametrize("search", ["grouped", pytest.param("faiss", marks=has_faiss)])
def test_departures_from_what_was_asked_are_reported(search: Any) -> None:
    config = GraphConfig(nlist=400, nprobe=50, k=15, search=search)
    _, reports = build_similarity_graph(vectors(500), ["big"] * 430 + ["few"] * 60 + ["lone"] * 10, config)
    big, few, lone = reports
    assert (big.engine, big.clusters, big.nprobe) == (search, 11, 11)
    assert any("400 clusters asked, 11 used" in note for note in big.notes)
    assert any("50 clusters asked, there are 11" in note for note in big.notes)
    assert few.engine == lone.engine == "exact"
    assert any("too few for clusters; searched exactly" in note for note in few.notes)
    assert any("k: 15 neighbours asked, a user here has at most 9 others" in note for note in lone.notes)
    assert lone.short == 10
    assert lone.edges == 90


def test_auto_takes_exact_then_grouped_and_faiss_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GraphConfig(nlist=4, nprobe=2, k=3, exact_below=200)
    monkeypatch.setattr(similar, "faiss_gpus", lambda: 0)
    _, reports = build_similarity_graph(vectors(500), ["A"] * 300 + ["B"] * 200, config)
    assert [report.engine for report in reports] == ["grouped", "grouped"]
    _, reports = build_similarity_graph(vectors(500), ["A"] * 301 + ["B"] * 199, config)
    assert [report.engine for report in reports] == ["grouped", "exact"]
    monkeypatch.setattr(similar, "faiss_gpus", lambda: 1)
    assert similar._plan(config, 300).engine == "faiss"


def test_faiss_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_faiss", lambda: False)
    with pytest.raises(InputError, match=r"pip install alure\[cpu\]"):
        build_similarity_graph(vectors(10), ["A"] * 10, GraphConfig(search="faiss"))


def test_embeddings_that_are_not_finite_name_their_users() -> None:
    x = vectors(10)
    x[3, 2], x[7, 0] = np.nan, np.inf
    ids = pa.array([f"user{i}" for i in range(10)])
    with pytest.raises(InputError, match=r"NaN or infinity for 2 users \('user3', 'user7'\)"):
        build_similarity_graph(x, ["A"] * 10, CLUSTERED, user_ids=ids)


@pytest.mark.parametrize(
    ("embeddings", "countries", "ids", "message"),
    [
        (np.zeros((3, 2), dtype=np.float32), ["A"] * 2, None, "countries: expected one for each of the 3"),
        (np.zeros((3, 2), dtype=np.float32), ["A", None, "B"], None, "1 nulls"),
        (np.zeros((3, 2), dtype=np.int64), ["A"] * 3, None, "embeddings: expected floats"),
        (np.zeros(3, dtype=np.float32), ["A"] * 3, None, "embeddings: expected floats"),
        (np.zeros((3, 2), dtype=np.float32), ["A"] * 3, pa.array([1, 2]), "user_ids: expected one for each of the 3"),
    ],
)
def test_bad_arguments_are_named(embeddings: np.ndarray, countries: Any, ids: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_similarity_graph(embeddings, countries, CLUSTERED, user_ids=ids)


def test_nobody_and_nothing_but_zeros() -> None:
    graph, reports = build_similarity_graph(np.zeros((0, 4), dtype=np.float32), [], CLUSTERED)
    assert (graph.num_users, graph.num_edges, reports) == (0, 0, [])
    graph.check_integrity()
    assert graph.degree_statistics().edges == 0
    graph, reports = build_similarity_graph(np.zeros((50, 4), dtype=np.float32), ["A"] * 50, CLUSTERED)
    assert graph.num_edges == 0
    assert (reports[0].zero_vectors, reports[0].short) == (50, 50)


# ---- the graph's own arrays


def small_graph() -> SimilarityGraph:
    return SimilarityGraph(
        pa.array(["a", "b", "c"]), pa.array(["BR"] * 3), np.array([0, 2, 2, 3]),
        np.array([1, 2, 0], dtype=np.int32), np.array([0.9, 0.5, 0.7], dtype=np.float32),
    )  # fmt: skip


def test_neighbors_and_statistics() -> None:
    graph = small_graph()
    assert [(v, round(s, 3)) for v, s in graph.neighbors_of("a")] == [("b", 0.9), ("c", 0.5)]
    assert graph.neighbors_of("b") == []
    with pytest.raises(InputError, match="user 'z': not among the 3 users"):
        graph.neighbors_of("z")
    with pytest.raises(InputError, match="user 5: not among"):
        graph.neighbors_of(5)
    statistics = graph.degree_statistics()
    assert (statistics.without_neighbors, statistics.never_neighbors, statistics.max_in_degree) == (1, 0, 1)
    assert statistics.mutual_share == pytest.approx(2 / 3)
    assert statistics.in_degree_histogram == [0, 3]
    assert sum(graph.similarity_histogram()["counts"]) == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offsets", np.array([0, 2, 1, 3]), "tile the edges"),
        ("offsets", np.array([0, 2, 3]), "tile the edges"),
        ("neighbors", np.array([1, 3, 0], dtype=np.int32), "neighbours among the users"),
        ("neighbors", np.array([0, 2, 0], dtype=np.int32), "its own neighbour"),
        ("neighbors", np.array([2, 2, 0], dtype=np.int32), "every neighbour once"),
        ("similarities", np.array([0.5, 0.9, 0.7], dtype=np.float32), "best first"),
        ("similarities", np.array([0.9, np.nan, 0.7], dtype=np.float32), "finite"),
        ("user_ids", pa.array(["a", "a", "c"]), "every user once"),
        ("countries", pa.array(["BR"]), "a country for every user"),
    ],
)
def test_a_damaged_graph_is_noticed(field: str, value: Any, message: str) -> None:
    graph = small_graph()
    graph.check_integrity()
    damaged = SimilarityGraph(**{**{name: getattr(graph, name) for name in graph.__dataclass_fields__}, field: value})
    with pytest.raises(AlureError, match=message):
        damaged.check_integrity()


# ---- follows


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_follows_are_matched_and_what_is_dropped_is_counted(tmp_path: Path) -> None:
    ids = pa.array([10, 20, 30])
    path = write(
        tmp_path / "f.parquet", user_id=[10, 10, 20, 30, 99, 10, None], followed_id=[20, 20, 20, 10, 10, 77, 10]
    )
    follows = read_follows(path, ids)
    assert follows.adjacency.toarray().tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert (follows.rows, follows.kept, follows.duplicates, follows.self_follows) == (7, 2, 1, 1)
    assert (follows.unknown_users, follows.nulls) == (2, 1)


def test_follows_come_from_folders_delta_and_other_encodings(tmp_path: Path) -> None:
    table = pa.table({"followed_id": ["b", "c"], "user_id": pa.array(["a", "b"]).dictionary_encode(), "since": [1, 2]})
    ids = pa.array(["a", "b", "c"])
    (tmp_path / "folder").mkdir()
    pq.write_table(table, tmp_path / "folder" / "one.parquet")
    write_deltalake(
        str(tmp_path / "delta"), table.select(["followed_id"]).append_column("user_id", pa.array(["a", "b"]))
    )
    for path in (tmp_path / "folder", tmp_path / "folder" / "one.parquet", tmp_path / "delta"):
        assert read_follows(path, ids).adjacency.toarray().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_bad_follows_are_named(tmp_path: Path) -> None:
    ids = pa.array([1, 2])
    with pytest.raises(InputError, match="does not exist"):
        read_follows(tmp_path / "none.parquet", ids)
    path = write(tmp_path / "a.parquet", user_id=[1], followed_ids=[2])
    with pytest.raises(
        InputError, match="expected a column followed_id, got user_id, followed_ids; the nearest is 'followed_ids'"
    ):
        read_follows(path, ids)
    path = write(tmp_path / "b.parquet", user_id=["1"], followed_id=["2"])
    with pytest.raises(
        InputError, match="column user_id: expected ids of type int64 as the users of the store, got string"
    ):
        read_follows(path, ids)
    path = write(tmp_path / "c.parquet", user_id=[1], followed_id=[2])
    with pytest.raises(InputError, match=r"expected ids of type string .* got int64"):
        read_follows(path, pa.array(["1"]))
    path = write(tmp_path / "e.parquet", user_id=[1.5], followed_id=[2])
    with pytest.raises(InputError, match="got double"):
        read_follows(path, ids)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_follows(tmp_path / "d.parquet", ids)


def test_no_follows_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", user_id=pa.array([], pa.int64()), followed_id=pa.array([], pa.int64()))
    ids, countries = pa.array([1, 2]), pa.array(["A", "A"])
    follows = read_follows(path, ids)
    for graph in (social_graph(follows, ids, countries, 3), ppr_graph(follows, ids, countries, 3)[0]):
        graph.check_integrity()
        assert graph.num_edges == 0


# ---- the social graph


def random_follows(n: int, edges: int, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return follows_of(generator.integers(0, n, edges), generator.integers(0, n, edges), n)


@settings(max_examples=40)
@given(st.integers(1, 15), st.integers(0, 60), st.integers(1, 20), st.integers(0, 50))
def test_social_similarity_is_as_documented(n: int, edges: int, k: int, seed: int) -> None:
    follows = random_follows(n, edges, seed)
    graph = social_graph(follows, pa.array(range(n)), pa.array(["A"] * n, pa.string()), k)
    graph.check_integrity()
    sets = [set(row.nonzero()[0].tolist()) for row in follows.adjacency.toarray()]
    for u in range(n):
        scores = {v: (1 + (u in sets[v]) + len(sets[u] & sets[v]) / len(sets[u] | sets[v])) / 3 for v in sets[u]}
        expected = sorted(scores.items(), key=lambda pair: (-np.float32(pair[1]), pair[0]))[:k]
        found = graph.neighbors_of(u)
        assert [v for v, _ in found] == [v for v, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-6)
        assert all(1 / 3 - 1e-6 <= s <= 1 for _, s in found)


def test_social_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from alure.engine.graph import social

    follows, ids, countries = random_follows(40, 300), pa.array(range(40)), pa.array(["A"] * 40)
    whole = social_graph(follows, ids, countries, 6)
    monkeypatch.setattr(social, "COMPARED", 20)
    parts = social_graph(follows, ids, countries, 6)
    assert (whole.neighbors == parts.neighbors).all()
    assert (whole.similarities == parts.similarities).all()


# ---- Personalized PageRank


FOLLOWS = {
    "random": random_follows(60, 240),
    "sparse, with users who follow nobody": random_follows(50, 45, seed=3),
    "two sides that only follow each other": follows_of(
        np.repeat(np.arange(20), 3), 10 * (np.repeat(np.arange(20), 3) < 10) + np.arange(60) % 10, 20
    ),
    "a ring": follows_of(np.arange(12), (np.arange(12) + 1) % 12, 12),
    "nobody": follows_of(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 4),
}


@pytest.mark.parametrize("name", FOLLOWS)
@pytest.mark.parametrize("alpha", [0.15, 0.5])
def test_ppr_graph_is_networkx_scaled_to_its_best(name: str, alpha: float) -> None:
    follows = FOLLOWS[name]
    n = follows.adjacency.shape[0]
    graph, lost = ppr_graph(follows, pa.array(range(n)), pa.array(["A"] * n), n, alpha=alpha, epsilon=0.0)
    graph.check_integrity()
    assert lost.shape == (n,)
    assert lost.max() < 1e-6
    directed = nx.DiGraph()
    directed.add_nodes_from(range(n))
    directed.add_edges_from(zip(*(part.tolist() for part in follows.adjacency.nonzero())))
    for u in range(n):
        exact = nx.pagerank(directed, 1 - alpha, personalization={u: 1.0}, max_iter=2000, tol=1e-12)
        others = {v: p for v, p in exact.items() if v != u and p > 1e-9}
        best = max(others.values(), default=1.0)
        assert dict(graph.neighbors_of(u)) == pytest.approx({v: p / best for v, p in others.items()}, abs=1e-6)


def test_ppr_graph_in_blocks_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    from alure.engine.graph import ppr

    follows, ids, countries = random_follows(300, 3000), pa.array(range(300)), pa.array(["A"] * 300)
    whole, lost = ppr_graph(follows, ids, countries, 5, epsilon=0.01)
    assert 0 < lost.mean() <= lost.max() < 1
    monkeypatch.setattr(ppr, "LEAST_BLOCK", 7)
    parts, lost_of_parts = ppr_graph(follows, ids, countries, 5, epsilon=0.01)
    assert (whole.offsets == parts.offsets).all()
    assert (whole.neighbors == parts.neighbors).all()
    assert (whole.similarities == parts.similarities).all()
    assert (lost == lost_of_parts).all()


# ---- build_graphs


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore(tmp_path / "store", create=True)
    add_generation(store, "g1", vectors(90, 8))
    return store


def test_build_writes_and_publishes_every_graph(store: EmbeddingStore, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = write(
        tmp_path / "follows.parquet",
        user_id=generator.integers(0, 95, 500) * 10, followed_id=generator.integers(0, 95, 500) * 10,
    )  # fmt: skip
    report = build_graphs(store, GraphConfig(k=4, ppr=True), social=path)
    assert [graph.name for graph in report.graphs] == ["alure", "social", "ppr"]
    assert {(g.name, g.rows) for g in store.generations("graph")} == {("alure", 90), ("social", 90), ("ppr", 90)}
    assert report.users == 90
    assert report.edges == 360
    assert report.follows is not None
    assert sum(report.follows[name] for name in ("kept", "unknown_users", "self_follows", "duplicates", "nulls")) == 500
    assert report.follows["unknown_users"] > 0
    json.dumps(asdict(report))
    matrix = store.read_matrix()
    expected, _ = build_similarity_graph(matrix.values, matrix.countries, GraphConfig(k=4), user_ids=matrix.user_ids)
    loaded = SimilarityGraph.load(store)
    assert loaded.user_ids.equals(expected.user_ids)
    assert (loaded.neighbors == expected.neighbors).all()
    assert (loaded.similarities == expected.similarities).all()
    assert loaded.neighbors_of(10) == expected.neighbors_of(10)
    SimilarityGraph.load(store, "ppr").check_integrity()
    figures = report.graphs[2].figures
    assert 0 <= figures["mean_lost_mass"] <= figures["lost_mass"] < 1


def test_build_again_replaces_and_reads_the_generation_asked(store: EmbeddingStore) -> None:
    first = build_graphs(store, GraphConfig(k=4))
    again = build_graphs(store, GraphConfig(k=2))
    assert (first.edges, again.edges) == (360, 180)
    assert SimilarityGraph.load(store).num_edges == 180
    add_generation(store, "g2", vectors(60, 8, seed=5), as_of=8)
    assert build_graphs(store, GraphConfig(k=2), generation="g1").users == 90
    assert build_graphs(store, GraphConfig(k=2)).generation == "g2"
    with pytest.raises(InputError, match="g3"):
        build_graphs(store, GraphConfig(), generation="g3")


def test_ppr_needs_follows(store: EmbeddingStore) -> None:
    with pytest.raises(InputError, match="--social"):
        build_graphs(store, GraphConfig(ppr=True))


def test_follows_are_read_before_the_work(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        build_graphs(store, GraphConfig(), social=tmp_path / "none.parquet")
    assert store.generations("graph") == []


def test_large_graphs_are_stored_in_batches() -> None:
    graph = small_graph()
    batches = list(graph.batches(rows=2))
    assert [batch.num_rows for batch in batches] == [2, 1]
    assert pa.Table.from_batches(batches).to_pylist()[0]["neighbor_ids"] == ["b", "c"]
    assert batches[1].to_pylist()[0]["neighbor_ids"] == ["a"]
