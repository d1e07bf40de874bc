"""Personalized PageRank: both backends against networkx, native against exact, the error bound, and hostile input."""

import math
from collections.abc import Iterator

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alure.kernels import PageRanks, personalized_pagerank
from alure.kernels.backend import has_cupy

BACKENDS = ("native", "reference")
INT32, INT64, FLOAT32 = torch.int32, torch.int64, torch.float32

Edge = tuple[int, int, float]


def arrays(n: int, edges: list[Edge]) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, neighbors, weights), the edges of a node in the order given."""
    edges = sorted(edges, key=lambda edge: edge[0])
    degrees = np.bincount(np.array([u for u, _, _ in edges], dtype=np.int64), minlength=n)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64))
    return offsets, torch.tensor([v for _, v, _ in edges], dtype=INT32), torch.tensor([w for _, _, w in edges]).float()


def by_networkx(n: int, edges: list[Edge], alpha: float) -> np.ndarray:
    """[n, n], row s: PageRank personalized to s; parallel edges are one of their weights' sum."""
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(range(n))
    graph.add_weighted_edges_from((u, v, float(np.float32(w))) for u, v, w in edges)
    rows = [nx.pagerank(graph, 1 - alpha, personalization={s: 1.0}, max_iter=20_000, tol=1e-14) for s in range(n)]
    return np.array([[row[v] for v in range(n)] for row in rows]).reshape(n, n)


def dense(ranks: PageRanks, n: int) -> np.ndarray:
    out = np.zeros((len(ranks.ids), n + 1))
    np.put_along_axis(out, np.where(ranks.ids >= 0, ranks.ids, n), ranks.scores.numpy().astype(np.float64), 1)
    return out[:, :n]


def random_graph(n: int, edges: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A few nodes are popular, a few busy; some have no edges, some lead to themselves, some edges come twice."""
    rng = np.random.default_rng(seed)
    source, target = (n * rng.random(edges) ** 2).astype(int), (n * rng.random(edges) ** 3).astype(int)
    weights = rng.choice([0.25, 1.0, 7.0], edges)
    return arrays(n, list(zip(source.tolist(), target.tolist(), weights.tolist())))


def communities(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Walks stay in their community, so that pushes are never given up for sweeps."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, count * size, 5 * count * size)
    target = source // size * size + rng.integers(0, size, len(source))
    weights = rng.random(len(source)) + 0.1
    return arrays(count * size, list(zip(source.tolist(), target.tolist(), weights.tolist())))


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[Edge], float]:
    n = draw(st.integers(1, 9))
    node = st.integers(0, n - 1)
    weight = st.sampled_from([1.0, 0.5, 3.0, 1e-3, 1e4])
    return n, draw(st.lists(st.tuples(node, node, weight), max_size=25)), draw(st.sampled_from([0.05, 0.15, 0.5, 0.9]))


@settings(max_examples=150)
@given(problems(), st.booleans())
def test_exact_scores_are_those_of_networkx(problem: tuple[int, list[Edge], float], weighted: bool) -> None:
    n, edges, alpha = problem
    edges = edges if weighted else [(u, v, 1.0) for u, v, _ in edges]
    expected = by_networkx(n, edges, alpha)
    np.fill_diagonal(expected, 0.0)
    offsets, neighbors, weights = arrays(n, edges)
    for backend in BACKENDS:
        ranks = personalized_pagerank(
            offsets, neighbors, weights if weighted else None, torch.arange(n), n, alpha, 0.0, backend=backend
        )
        assert (ranks.scores.dtype, ranks.ids.dtype, ranks.lost.dtype) == (FLOAT32, INT64, FLOAT32)
        np.testing.assert_allclose(dense(ranks, n), expected, rtol=2e-7, atol=1e-9)
        assert ranks.lost.max() < 1e-6


@pytest.mark.parametrize("graph", [random_graph(400, 3000), communities(60, 20)], ids=["swept", "pushed"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("k", [1, 10, 2000])
def test_the_best_k_are_exact(graph: tuple[Tensor, Tensor, Tensor], weighted: bool, k: int) -> None:
    offsets, neighbors, weights = graph
    sources = torch.arange(0, len(offsets) - 1, 7)
    found, expected = (
        personalized_pagerank(
            offsets, neighbors, weights if weighted else None, sources, k, epsilon=0.0, backend=backend
        )
        for backend in BACKENDS
    )
    n = len(offsets) - 1
    np.testing.assert_allclose(found.scores, expected.scores, rtol=3e-7, atol=1e-9)
    exact = personalized_pagerank(offsets, neighbors, weights if weighted else None, sources, n, backend="reference")
    taken = np.take_along_axis(dense(exact, n), np.maximum(found.ids.numpy(), 0), 1)  # ties may part differently
    np.testing.assert_allclose(np.where(found.ids >= 0, taken, 0.0), found.scores, rtol=3e-7, atol=1e-9)
    assert not (found.ids == sources[:, None]).any()
    assert ((found.ids == -1) == (found.scores == 0)).all()


@pytest.mark.parametrize("graph", [random_graph(400, 3000), communities(60, 20)], ids=["swept", "pushed"])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
def test_scores_are_too_small_by_at_most_what_is_lost(graph: tuple[Tensor, Tensor, Tensor], epsilon: float) -> None:
    n = len(graph[0]) - 1
    sources = torch.arange(n)
    exact = dense(personalized_pagerank(*graph, sources, n, backend="reference"), n)
    ranks = personalized_pagerank(*graph, sources, 20, epsilon=epsilon, backend="native")
    found = dense(ranks, n)
    missing = np.where(found > 0, exact - found, 0.0)
    assert missing.min() > -1e-7
    assert (missing.sum(axis=1) <= ranks.lost.numpy() + 1e-6).all()
    best = -np.sort(-exact, axis=1)[:, :20]
    assert (best[:, -1] - found.max(axis=1) <= ranks.lost.numpy() + 1e-6).all()
    if epsilon <= 1e-3:
        chosen = np.where(found > 0, exact, 0.0).sum(axis=1)
        assert (chosen >= 0.995 * best.sum(axis=1)).all()


def test_popular_nodes_stop_walks_no_sooner_where_an_edge_is_heavy() -> None:
    """A hub that sends nearly all of its walks to one node: that share decides whether it passes on, not its degree."""
    n = 3000
    edges = [(0, 1, 1.0), (1, 2, 1e6), *((1, v, 1.0) for v in range(3, n)), (2, 0, 1.0)]
    ranks = personalized_pagerank(*arrays(n, edges), torch.tensor([0]), 3, epsilon=1e-3, backend="native")
    exact = personalized_pagerank(*arrays(n, edges), torch.tensor([0]), 3, backend="reference")
    assert ranks.ids[0, :2].tolist() == exact.ids[0, :2].tolist() == [1, 2]
    np.testing.assert_allclose(ranks.scores[0, :2], exact.scores[0, :2], rtol=1e-3)


def test_a_row_depends_on_its_source_only(num_threads: int) -> None:
    for graph in (random_graph(300, 2500, seed=4), communities(40, 25, seed=4)):
        for epsilon in (0.1, 1e-4, 0.0):
            torch.set_num_threads(1)
            sources = torch.arange(len(graph[0]) - 1)
            whole = personalized_pagerank(*graph, sources, 12, epsilon=epsilon, backend="native")
            torch.set_num_threads(num_threads)
            some = torch.tensor([7, 250, 7, 0, 133, 19, 20, 21, 22, 23, 24])  # any order, one twice
            part = personalized_pagerank(*graph, some, 12, epsilon=epsilon, backend="native")
            for a, b in zip(whole, part):
                assert torch.equal(a[some], b)
            again = personalized_pagerank(*graph, sources, 12, epsilon=epsilon, backend="native")
            assert all(torch.equal(a, b) for a, b in zip(whole, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_by_lower_id(backend: str) -> None:
    star = arrays(9, [(4, v, 1.0) for v in (8, 3, 1, 6, 0)])
    ranks = personalized_pagerank(*star, torch.tensor([4]), 4, backend=backend)
    assert ranks.ids.tolist() == [[0, 1, 3, 6]]
    assert len(set(ranks.scores[0].tolist())) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nodes_alone_and_walks_that_end(backend: str) -> None:
    graph = arrays(6, [(0, 1, 1.0), (1, 2, 1.0), (3, 3, 1.0), (5, 5, 2.0), (5, 4, 2.0), (5, 4, 1.0)])
    ranks = personalized_pagerank(*graph, torch.arange(6), 3, epsilon=0.0, backend=backend)
    assert ranks.ids.tolist() == [[1, 2, -1], [2, -1, -1], [-1] * 3, [-1] * 3, [-1] * 3, [4, -1, -1]]
    onward = 0.85  # p(0) = 1 / (1 + 0.85 + 0.85²): 2 leads back
    total = 1 + onward + onward**2
    np.testing.assert_allclose(ranks.scores[0, :2], [onward / total, onward**2 / total], rtol=1e-6)
    assert ranks.lost.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend: str) -> None:
    empty = personalized_pagerank(
        torch.zeros(1, dtype=INT64), torch.zeros(0, dtype=INT32), None, torch.zeros(0, dtype=INT64), 3, backend=backend
    )
    assert [list(x.shape) for x in empty] == [[0, 3], [0, 3], [0]]
    alone = personalized_pagerank(
        torch.zeros(2, dtype=INT64), torch.zeros(0, dtype=INT32), None, torch.tensor([0]), 3, backend=backend
    )
    assert alone.ids.tolist() == [[-1, -1, -1]]


def test_a_hub_of_a_million() -> None:
    n = 1_000_001
    ring = torch.stack([torch.zeros(n - 1, dtype=INT32), (torch.arange(n - 1, dtype=INT32) + 1) % (n - 1) + 1], 1)
    neighbors = torch.cat([torch.arange(1, n, dtype=INT32), ring.flatten()])  # 0 ↔ all, and all in a ring
    offsets = torch.cat([torch.tensor([0]), n - 1 + 2 * torch.arange(n)])
    ranks = personalized_pagerank(offsets, neighbors, None, torch.tensor([0, 17, 500_000]), 5, epsilon=1e-2)
    assert ranks.ids[1].tolist() == [0, 18, 19, 20, 21]
    assert ranks.ids[2].tolist() == [0, *range(500_001, 500_005)]
    # from 17, the ring walk halves at each step but for restarts: p(17 + i) ≈ p(17) × 0.425^i
    np.testing.assert_allclose(ranks.scores[1, 2:4] / ranks.scores[1, 1:3], 0.425, rtol=1e-3)
    assert (ranks.ids[0] >= 1).all()  # all alike but for rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_input(backend: str) -> None:
    graph = random_graph(50, 200)
    spread = [torch.stack([x, torch.full_like(x, 9)], 1)[:, 0] for x in (*graph, torch.arange(50))]
    a = personalized_pagerank(*spread, 5, backend=backend)
    b = personalized_pagerank(*graph, torch.arange(50), 5, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_reference_in_blocks_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(60, 240)
    whole = personalized_pagerank(*graph, torch.arange(60), 5, backend="reference")
    monkeypatch.setattr("alure.kernels.pagerank.reference.BLOCK_ENTRIES", 7 * 60)
    parts = personalized_pagerank(*graph, torch.arange(60), 5, backend="reference")
    np.testing.assert_allclose(whole.scores, parts.scores, rtol=2e-7)


def vector(dtype: torch.dtype, *values: float) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GOOD = {
    "offsets": vector(INT64, 0, 2, 3, 3),
    "neighbors": vector(INT32, 1, 2, 0),
    "weights": vector(FLOAT32, 1, 2, 0.5),
    "sources": vector(INT64, 2, 0),
}

HOSTILE = [
    ("offsets", vector(INT64, 1, 2, 3, 3), "first offset to be 0, got 1"),
    ("offsets", vector(INT64, 0, 2**62, 3, 3), "never decrease"),
    ("offsets", vector(INT64, 0, -1, 3, 3), "never decrease"),
    ("offsets", vector(INT64, 0, 2, 3, 2**62), "last offset to equal the number of rows, 3"),
    ("offsets", vector(INT64), r"expected shape \[nodes \+ 1\]"),
    ("neighbors", vector(INT32, 1, 3, 0), "from 0 to 2, got 3 at position 1"),
    ("neighbors", vector(INT32, 1, 2, -1), "got -1 at position 2"),
    ("neighbors", vector(INT32, 1, 2, -(2**31)), "got -2147483648 at position 2"),
    ("weights", vector(FLOAT32, 1, 0, 1), "above 0, got 0.0 at position 1"),
    ("weights", vector(FLOAT32, 1, 1, -2), "above 0, got -2.0 at position 2"),
    ("weights", vector(FLOAT32, math.nan, 1, 1), "above 0, got nan at position 0"),
    ("weights", vector(FLOAT32, 1, math.inf, 1), "above 0, got inf at position 1"),
    ("weights", vector(FLOAT32, 1, 1), r"expected shape \[3\], got \[2\]"),
    ("sources", vector(INT64, 2, 3), "from 0 to 2, got 3 at position 1"),
    ("sources", vector(INT64, -1, 2**40), "got -1 at position 0"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value", "message"), HOSTILE)
def test_hostile_values_are_refused_before_they_are_used(name: str, value: Tensor, message: str, backend: str) -> None:
    personalized_pagerank(**GOOD, k=2, backend=backend)
    with pytest.raises(ValueError, match=message) as caught:
        personalized_pagerank(**GOOD | {name: value}, k=2, backend=backend)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"offsets": vector(INT32, 0, 2, 3, 3)}, TypeError, "offsets: expected torch.int64, got torch.int32"),
        ({"neighbors": vector(INT64, 1, 2, 0)}, TypeError, "neighbors: expected torch.int32"),
        ({"weights": vector(torch.float64, 1, 2, 3)}, TypeError, "weights: expected torch.float32"),
        ({"sources": [0]}, TypeError, "sources: expected a torch.Tensor, got list"),
        ({"sources": GOOD["sources"].to("meta")}, ValueError, "sources: the walks run on the CPU"),
        ({"k": 0}, ValueError, "k: expected at least 1, got 0"),
        ({"alpha": 0.0}, ValueError, "alpha: expected a probability of restart"),
        ({"alpha": 1.0}, ValueError, "got 1.0"),
        ({"alpha": math.nan}, ValueError, "got nan"),
        ({"epsilon": -0.1}, ValueError, "epsilon: expected 0"),
        ({"epsilon": math.nan}, ValueError, "got nan"),
        ({"backend": "triton"}, ValueError, "backend: this operator offers native, reference"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        personalized_pagerank(**{**GOOD, "k": 2, **changed})


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    tensors = list(GOOD.values())
    for weights in (tensors[2], None):
        arguments = (*tensors[:2], weights, tensors[3], 2, 0.15, 1e-4, backend)
        torch.library.opcheck(torch.ops.alure.personalized_pagerank.default, arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not has_cupy(), reason="needs CuPy")
@pytest.mark.parametrize("weighted", [True, False])
def test_a_gpu_iterates_to_the_same_scores(weighted: bool) -> None:
    offsets, neighbors, weights = random_graph(400, 3000)
    graph = (offsets, neighbors, weights if weighted else None, torch.arange(400))
    found, expected = (personalized_pagerank(*graph, 400, backend=b) for b in ("cupy", "reference"))
    np.testing.assert_allclose(dense(found, 400), dense(expected, 400), atol=1e-7)


def test_cupy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets, neighbors, _ = random_graph(10, 30)
    monkeypatch.setattr("alure.kernels.backend.has_cupy", lambda: False)
    with pytest.raises(ValueError, match="'cupy' needs the package CuPy"):
        personalized_pagerank(offsets, neighbors, None, torch.arange(10), 3, backend="cupy")
