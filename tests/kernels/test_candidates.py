"""The retrieval join: native against reference to the bit, against a plain Python model, and against hostile input."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import measured_memory
from torch import Tensor

from alure.kernels import Candidates, Engagements, ItemRules, NeighborLists, join_candidates
from alure.kernels.backend import has_cupy
from alure.kernels.candidates import arrays, ops

BACKENDS = ("native", "reference")
CUPY = pytest.param("cupy", marks=[pytest.mark.gpu, pytest.mark.skipif(not has_cupy(), reason="needs CuPy")])
INT32, INT64, UINT8 = torch.int32, torch.int64, torch.uint8


def neighbor_lists(rows: list[list[tuple[int, float]]]) -> NeighborLists:
    flat = [edge for row in rows for edge in row]
    return NeighborLists(
        _offsets(rows), torch.tensor([e[0] for e in flat], dtype=INT32), torch.tensor([e[1] for e in flat]).float()
    )


def engagement_lists(lists: list[list[tuple[int, float, int]]]) -> Engagements:
    flat = [engagement for one in lists for engagement in one]
    return Engagements(
        _offsets(lists),
        torch.tensor([e[0] for e in flat], dtype=INT32),
        torch.tensor([e[1] for e in flat]).float(),
        torch.tensor([e[2] for e in flat], dtype=UINT8),
    )


def _offsets(lists: list) -> Tensor:
    return torch.tensor([0, *np.cumsum([len(one) for one in lists], dtype=np.int64).tolist()], dtype=INT64)


def rows_of(joined: Candidates) -> list[list[tuple[int, float, int]]]:
    columns = [joined.items.tolist(), joined.scores.tolist(), joined.reasons.tolist()]
    bounds = joined.offsets.tolist()
    return [list(zip(*(column[a:b] for column in columns))) for a, b in pairwise(bounds)]


def plain_join(
    neighbors, engagements, cap, excluded=None, eligible=None, groups=None, group_cap=1
) -> list[list[tuple[int, float, int]]]:
    """The definition, with dictionaries."""
    out = []
    for row, edges in enumerate(neighbors):
        scores: dict[int, float] = {}
        reasons: dict[int, int] = {}
        for neighbor, similarity in edges:
            for item, weight, reason in engagements[neighbor]:
                product = float(np.float32(similarity)) * float(np.float32(weight))
                scores[item] = scores.get(item, 0.0) + product
                reasons[item] = reasons.get(item, 0) | reason
        gone = set(excluded[row]) if excluded else set()
        with np.errstate(over="ignore"):
            rounded = [(i, float(np.float32(s)), reasons[i]) for i, s in scores.items() if i not in gone]
        kept, taken = [], dict[int, int]()
        for entry in sorted((r for r in rounded if r[1] > 0), key=lambda r: (-r[1], r[0])):
            if eligible is not None and not eligible[entry[0]]:
                continue
            group = -1 if groups is None else groups[entry[0]]
            taken[group] = taken.get(group, 0) + 1
            if group < 0 or taken[group] <= group_cap:
                kept.append(entry)
        out.append(kept[:cap])
    return out


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# few distinct numbers, so that scores tie; 0.1 is not exact, so the order of a sum shows
numbers = st.sampled_from([1.0, 0.5, 0.1, 0.3, -0.25, -1.0, 0.0, 1e-40, 3e38])


@st.composite
def problems(draw):
    num_lists, num_items = draw(st.integers(0, 6)), draw(st.integers(1, 12))
    engagement = st.tuples(st.integers(0, num_items - 1), numbers, st.integers(0, 255))
    lists = draw(st.lists(st.lists(engagement, max_size=8), min_size=num_lists, max_size=num_lists))
    edge = st.tuples(st.integers(0, max(num_lists - 1, 0)), numbers)
    rows = draw(st.lists(st.lists(edge, max_size=5 if num_lists else 0), max_size=9))
    seen = draw(
        st.none()
        | st.lists(
            st.lists(st.integers(-2, num_items + 2), max_size=5).map(sorted), min_size=len(rows), max_size=len(rows)
        )
    )
    eligible = draw(st.none() | st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    groups = draw(st.none() | st.lists(st.integers(-2, 4), min_size=num_items, max_size=num_items))
    rules = {"excluded": seen, "eligible": eligible, "groups": groups, "group_cap": draw(st.integers(1, 3))}
    return rows, lists, draw(st.integers(1, 15)), num_items, rules


@settings(max_examples=200)
@given(problems())
def test_both_backends_are_the_definition(problem):
    rows, lists, cap, num_items, given = problem
    expected = plain_join(rows, lists, cap, **given)
    seen, eligible, groups = given["excluded"], given["eligible"], given["groups"]
    rules = ItemRules(
        exclude_offsets=None if seen is None else _offsets(seen),
        exclude_items=None if seen is None else torch.tensor([item for row in seen for item in row], dtype=INT32),
        eligible=None if eligible is None else torch.tensor(eligible),
        groups=None if groups is None else torch.tensor(groups, dtype=INT32),
        group_cap=given["group_cap"],
    )
    for backend in BACKENDS:
        joined = join_candidates(
            neighbor_lists(rows), engagement_lists(lists), cap, num_items=num_items, rules=rules, backend=backend
        )
        assert [x.dtype for x in joined] == [INT64, INT32, torch.float32, UINT8]
        assert rows_of(joined) == expected, backend


def join_arrays(xp, neighbors, engagements, cap, num_items=2**31, rules=None) -> Candidates:
    """The join of arrays.py by the module `xp`, past the choice of a backend."""
    rules = rules or ItemRules()
    edges = (neighbors.offsets, neighbors.ids, neighbors.similarities)
    lists = (engagements.offsets, engagements.items, engagements.weights, engagements.reasons)
    refused = (rules.exclude_offsets, rules.exclude_items, rules.eligible, rules.groups)
    inputs = [None if x is None else x.numpy() for x in (*edges, *lists, *refused)]
    return Candidates(*map(torch.from_numpy, arrays.join_candidates(xp, *inputs, rules.group_cap, cap, num_items)))


@settings(max_examples=200)
@given(problems(), st.sampled_from([1, 7, arrays.PAIRS_PER_CHUNK]))
def test_array_operations_are_the_definition(problem, pairs_per_chunk):
    """What CuPy runs, by NumPy: the same calls, and chunks of one row to all."""
    rows, lists, cap, num_items, given = problem
    seen, eligible, groups = given["excluded"], given["eligible"], given["groups"]
    rules = ItemRules(
        exclude_offsets=None if seen is None else _offsets(seen),
        exclude_items=None if seen is None else torch.tensor([item for row in seen for item in row], dtype=INT32),
        eligible=None if eligible is None else torch.tensor(eligible),
        groups=None if groups is None else torch.tensor(groups, dtype=INT32),
        group_cap=given["group_cap"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "PAIRS_PER_CHUNK", pairs_per_chunk)
        joined = join_arrays(np, neighbor_lists(rows), engagement_lists(lists), cap, num_items, rules)
    assert [x.dtype for x in joined] == [INT64, INT32, torch.float32, UINT8]
    assert rows_of(joined) == plain_join(rows, lists, cap, **given)


def test_array_operations_agree_to_the_bit_and_refuse_the_same():
    neighbors, engagements = large_problem(seed=3)
    expected = join_candidates(neighbors, engagements, 50, backend="reference")
    for a, b in zip(join_arrays(np, neighbors, engagements, 50), expected):
        assert torch.equal(a, b)
    engagements.items[7] = -1
    with pytest.raises(ValueError, match=r"engagements\.items: expected item ids from 0"):
        join_arrays(np, neighbors, engagements, 50)


@pytest.mark.parametrize("backend", [CUPY])
def test_a_gpu_gives_the_same_bits(backend):
    for seed in range(3):
        neighbors, engagements = large_problem(seed)
        rules = ItemRules(groups=torch.arange(3000, dtype=INT32) % 400, group_cap=2)
        for chosen in (None, rules):
            joined, expected = (
                join_candidates(neighbors, engagements, 50, num_items=3000, rules=chosen, backend=b)
                for b in (backend, "reference")
            )
            for a, b in zip(joined, expected):
                assert torch.equal(a, b)


def test_cupy_is_named_where_it_is_missing(monkeypatch):
    neighbors, engagements = large_problem(seed=0, rows=2)
    monkeypatch.setattr("alure.kernels.backend.has_cupy", lambda: False)
    with pytest.raises(ValueError, match="'cupy' needs the package CuPy"):
        join_candidates(neighbors, engagements, 5, backend="cupy")
    monkeypatch.setattr("alure.kernels.backend.has_cupy", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cupy' needs a CUDA device"):
        join_candidates(neighbors, engagements, 5, backend="cupy")
    assert "cupy" in ops.BACKENDS


def large_problem(seed: int, rows: int = 700, lists: int = 900, num_items: int = 3000):
    rng = np.random.default_rng(seed)
    degrees, lengths = rng.integers(0, 16, rows), rng.integers(0, 80, lists)
    edges, total = int(degrees.sum()), int(lengths.sum())
    neighbors = NeighborLists(
        torch.from_numpy(np.concatenate([[0], np.cumsum(degrees)])),
        torch.from_numpy(rng.integers(0, lists, edges).astype(np.int32)),
        torch.from_numpy(rng.random(edges, dtype=np.float32)),
    )
    engagements = Engagements(
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        torch.from_numpy((num_items * rng.random(total) ** 3).astype(np.int32)),
        torch.from_numpy(rng.choice(np.float32([0.1, 0.2, 1, 3]), total)),
        torch.from_numpy(rng.integers(0, 4, total).astype(np.uint8)),
    )
    return neighbors, engagements


@pytest.mark.parametrize("cap", [1, 50, 10**6])
def test_threads_and_backends_agree_to_the_bit(cap, num_threads):
    neighbors, engagements = large_problem(seed=cap)
    rng = np.random.default_rng(cap)
    rules = ItemRules(
        eligible=torch.from_numpy(rng.random(3000) < 0.9),
        groups=torch.from_numpy(rng.integers(-1, 400, 3000).astype(np.int32)),
        group_cap=2,
    )
    for chosen in (None, rules):
        native, reference = (
            join_candidates(neighbors, engagements, cap, num_items=3000, rules=chosen, backend=b) for b in BACKENDS
        )
        for a, b in zip(native, reference):
            assert torch.equal(a, b)


def test_groups_may_be_any_numbers() -> None:
    """Such as hashed accounts: a thread's counts are of the groups there are, not of all up to the largest."""
    neighbors, engagements = large_problem(seed=0)
    numbers = np.random.default_rng(0).integers(-1, 400, 3000).astype(np.int32)
    hashed = np.where(numbers < 0, -7, 2**28 - 1000 * numbers).astype(np.int32)
    with measured_memory() as peak:
        joined = [
            join_candidates(neighbors, engagements, 50, num_items=3000, rules=ItemRules(groups=groups))
            for groups in (torch.from_numpy(numbers), torch.from_numpy(hashed))
        ]
    assert peak.extra < 2**28  # bytes; counts would be 2^30
    for a, b in zip(*joined):
        assert torch.equal(a, b)


def test_equal_scores_in_a_long_row_are_in_the_order_of_items():
    items = np.random.default_rng(0).permutation(5000).astype(np.int32)
    engagements = Engagements(
        torch.tensor([0, 5000]), torch.from_numpy(items), torch.full((5000,), 0.5), torch.ones(5000, dtype=UINT8)
    )
    weights = engagements.weights.clone()
    weights[torch.from_numpy(items) % 7 == 0] = 2.0**-130  # below the least normal float
    engagements = Engagements(engagements.offsets, engagements.items, weights, engagements.reasons)
    for backend in BACKENDS:
        joined = join_candidates(neighbor_lists([[(0, 1.0)]]), engagements, 5000, backend=backend)
        first = [i for i in range(5000) if i % 7]
        assert joined.items.tolist() == first + list(range(0, 5000, 7))


def test_reference_in_chunks_of_rows(monkeypatch):
    neighbors, engagements = large_problem(seed=3)
    whole = join_candidates(neighbors, engagements, 20, backend="reference")
    monkeypatch.setattr("alure.kernels.candidates.reference._EDGES_PER_CHUNK", 37)
    chunked = join_candidates(neighbors, engagements, 20, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked))


def test_a_row_does_not_depend_on_the_others():
    neighbors, engagements = large_problem(seed=5, rows=400)
    rows = rows_of(join_candidates(neighbors, engagements, 30, backend="native"))
    for row in (0, 17, 399):
        edges = slice(int(neighbors.offsets[row]), int(neighbors.offsets[row + 1]))
        alone = NeighborLists(
            torch.tensor([0, edges.stop - edges.start]), neighbors.ids[edges], neighbors.similarities[edges]
        )
        assert rows_of(join_candidates(alone, engagements, 30, backend="native")) == [rows[row]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend):
    engagements = engagement_lists([[], []])
    joined = join_candidates(neighbor_lists([]), engagements, 5, backend=backend)
    assert joined.offsets.tolist() == [0]
    assert joined.items.shape == (0,)
    joined = join_candidates(neighbor_lists([[(0, 1.0)], []]), engagements, 5, num_items=0, backend=backend)
    assert joined.scores.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_input(backend):
    neighbors, engagements = large_problem(seed=9, rows=50, lists=60)

    def spread(x: Tensor) -> Tensor:
        wide = torch.stack([x, torch.full_like(x, 99)], 1)
        return wide[:, 0]

    strided = join_candidates(
        NeighborLists(*(spread(x) for x in vars(neighbors).values())),
        Engagements(*(spread(x) for x in vars(engagements).values())),
        40,
        backend=backend,
    )
    for a, b in zip(strided, join_candidates(neighbors, engagements, 40, backend=backend)):
        assert torch.equal(a, b)


def vector(dtype: torch.dtype, *values: float) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GOOD = {
    "neighbors.offsets": vector(INT64, 0, 2, 3),
    "neighbors.ids": vector(INT32, 0, 1, 1),
    "neighbors.similarities": vector(torch.float32, 0.9, 0.8, 0.7),
    "engagements.offsets": vector(INT64, 0, 1, 3),
    "engagements.items": vector(INT32, 4, 2, 9),
    "engagements.weights": vector(torch.float32, 1, 2, 3),
    "engagements.reasons": vector(UINT8, 1, 2, 1),
    "exclude_offsets": vector(INT64, 0, 2, 2),
    "exclude_items": vector(INT32, 3, 7),
    "eligible": torch.ones(10, dtype=torch.bool),
    "groups": vector(INT32, *range(-5, 5)),
}

HOSTILE = [
    ("neighbors.offsets", vector(INT64, 1, 2, 3), "first offset to be 0, got 1"),
    ("neighbors.offsets", vector(INT64, -5, 2, 3), "first offset to be 0, got -5"),
    ("neighbors.offsets", vector(INT64, 0, 2, 2**62), "equal the number of values, 3"),
    ("neighbors.offsets", vector(INT64, 0, 2**62, 3), "never decrease"),
    ("neighbors.offsets", vector(INT64, 0, -1, 3), "never decrease"),
    ("neighbors.ids", vector(INT32, 0, 2, 1), "from 0 to 1, got 2 at position 1"),
    ("neighbors.ids", vector(INT32, 0, 1, -1), "got -1 at position 2"),
    ("neighbors.ids", vector(INT32, 0, 1, 2**31 - 1), "got 2147483647 at position 2"),
    ("neighbors.similarities", vector(torch.float32, 0.9, math.nan, 0.7), "finite numbers, got nan at position 1"),
    ("neighbors.similarities", vector(torch.float32, 0.9, 0.7), r"expected shape \[3\], got \[2\]"),
    ("engagements.offsets", vector(INT64, 0, 3, 1), "never decrease"),
    ("engagements.offsets", vector(INT64, 0, 1, 4), "number of values, 3, got 4"),
    ("engagements.items", vector(INT32, 4, -1, 9), "item ids from 0 to 9, got -1 at position 1"),
    ("engagements.items", vector(INT32, 4, 1, 10), "got 10 at position 2"),
    ("engagements.weights", vector(torch.float32, 1, 2, math.inf), "got inf at position 2"),
    ("engagements.weights", vector(torch.float32, 1, 2), r"expected shape \[3\], got \[2\]"),
    ("engagements.reasons", vector(UINT8, 1), r"expected shape \[3\], got \[1\]"),
    ("exclude_offsets", vector(INT64, 0, 3, 2), "never decrease"),
    ("exclude_offsets", vector(INT64, 0, 2), r"expected shape \[3\], got \[2\]"),
    ("exclude_offsets", vector(INT64, 0, 2, 9), "number of values, 2, got 9"),
    ("exclude_items", vector(INT32, 7, 3), "descent in row 0"),
    ("eligible", torch.ones(9, dtype=torch.bool), r"expected shape \[10\], got \[9\]"),
    ("groups", vector(INT32, 1, 2), r"expected shape \[10\], got \[2\]"),
]


def join_parts(parts: dict[str, Tensor], backend: str, cap: int = 5) -> Candidates:
    values = list(parts.values())
    return join_candidates(
        NeighborLists(*values[:3]),
        Engagements(*values[3:7]),
        cap,
        num_items=10,
        rules=ItemRules(*values[7:]),
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value", "message"), HOSTILE)
def test_hostile_values_are_refused_before_they_are_used(name, value, message, backend):
    join_parts(GOOD, backend)
    with pytest.raises(ValueError, match=message) as caught:
        join_parts(GOOD | {name: value}, backend)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neighbors.offsets", vector(INT32, 0, 2, 3)),
        ("neighbors.ids", vector(INT64, 0, 1, 1)),
        ("neighbors.similarities", vector(torch.float64, 1, 1, 1)),
        ("engagements.offsets", vector(INT32, 0, 1, 3)),
        ("engagements.weights", vector(torch.float64, 1, 2, 3)),
        ("engagements.reasons", vector(INT32, 1, 2, 1)),
        ("exclude_items", [3, 7]),
        ("eligible", torch.ones(10, dtype=UINT8)),
        ("groups", torch.ones(10)),
    ],
)
def test_wrong_types_are_named(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        join_parts(GOOD | {name: value}, "native")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="cap: expected at least 1, got 0"):
        join_parts(GOOD, "native", cap=0)
    with pytest.raises(ValueError, match=r"neighbors\.offsets: expected shape \[rows \+ 1\], got \[0\]"):
        join_candidates(NeighborLists(vector(INT64), vector(INT32), vector(torch.float32)), engagement_lists([]), 1)
    with pytest.raises(ValueError, match="expected both or neither"):
        join_candidates(neighbor_lists([]), engagement_lists([]), 1, rules=ItemRules(exclude_items=vector(INT32)))
    with pytest.raises(ValueError, match="eligible: expected num_items beside it"):
        join_candidates(neighbor_lists([]), engagement_lists([]), 1, rules=ItemRules(eligible=GOOD["eligible"]))
    with pytest.raises(ValueError, match="group_cap: expected at least 1, got 0"):
        join_candidates(neighbor_lists([]), engagement_lists([]), 1, rules=ItemRules(group_cap=0))
    with pytest.raises(ValueError, match="backend: this operator offers native, reference, cupy"):
        join_parts(GOOD, "triton")
    with pytest.raises(ValueError, match=r"neighbors\.ids: the join runs on the CPU"):
        join_parts(GOOD | {"neighbors.ids": GOOD["neighbors.ids"].to("meta")}, "native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    with_rules = (*GOOD.values(), 1, 5, 10, backend)
    without = (*list(GOOD.values())[:7], None, None, None, None, 1, 5, 10, backend)
    for arguments in (with_rules, without):
        torch.library.opcheck(torch.ops.alure.join_candidates.default, arguments)
