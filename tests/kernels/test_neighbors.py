"""assign_clusters, grouped_topk and train_kmeans against brute force in float64, FAISS, and each other."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerance import TARGETS, require
from torch import Tensor

from alure.kernels import assign_clusters, grouped_topk, train_kmeans
from alure.kernels.backend import has_native
from alure.kernels.neighbors import reference
from alure.kernels.neighbors.duplicates import first_copies
from alure.kernels.neighbors.scores import MISSING, decode, encode

needs_native = pytest.mark.skipif(not has_native(), reason="needs the compiled module")
EVERYWHERE = pytest.mark.parametrize(
    ("backend", "device"), [*TARGETS, pytest.param("native", "cpu", id="native", marks=needs_native)]
)
METRICS = ["ip", "l2"]


def random(*shape: int, seed: int = 0, integers: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if integers:  # products are exact whatever the order: ties are ties
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


def lists(nb: int, nlist: int, seed: int = 0) -> Tensor:
    """Offsets of lists of random lengths, some of them empty."""
    cuts = torch.randint(0, nb + 1, (nlist - 1,), generator=torch.Generator().manual_seed(seed)).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([nb])])


def scores_of(query: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Higher is better, float64 rounded once."""
    q, x = query.double(), rows.double()
    return ((q * x).sum(-1) if metric == "ip" else -(q - x).square().sum(-1)).float()


def brute_force(
    queries: Tensor,
    database: Tensor,
    offsets: Tensor,
    probes: Tensor,
    k: int,
    metric: str = "ip",
    ids: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    D = torch.full((len(queries), k), -torch.inf)
    I = torch.full((len(queries), k), -1, dtype=torch.int64)
    ids = torch.arange(len(database)) if ids is None else ids
    for i, query in enumerate(queries):
        rows = [r for l in sorted(set(probes[i].tolist()) - {-1}) for r in range(int(offsets[l]), int(offsets[l + 1]))]
        rows = [r for r in rows if exclude is None or int(ids[r]) != int(exclude[i])]
        if not rows:
            continue
        scores = scores_of(query, database[rows], metric).tolist()
        best = sorted(zip(scores, ids[rows].tolist()), key=lambda pair: (-pair[0], pair[1]))[:k]
        for place, (score, identity) in enumerate(best):
            D[i, place], I[i, place] = score, identity
    return (D if metric == "ip" else -D), I


def search(device: str, backend: str, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`grouped_topk` on a device; all is on the CPU before and after."""
    return on(device, grouped_topk, backend, *tensors, **options)


def on(device: str, call: Any, backend: str, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    require(backend, device)
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    D, I = call(*(x.to(device) for x in tensors), **given, backend=backend)
    assert D.device.type == I.device.type == device
    return D.cpu(), I.cpu()


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], expected[1])


# ---- grouped_topk


@EVERYWHERE
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("d", "k", "nq", "nb", "nlist", "nprobe", "integers"),
    [
        (5, 3, 20, 60, 4, 2, True),
        (40, 15, 33, 150, 7, 5, False),
        (3, 4, 10, 40, 5, 3, True),
        (1, 1, 1, 1, 1, 1, False),
        (6, 40, 9, 200, 2, 2, False),
    ],
)
def test_equals_brute_force(
    backend: str, device: str, metric: Any, d: int, k: int, nq: int, nb: int, nlist: int, nprobe: int, integers: bool
) -> None:
    queries, database = random(nq, d, integers=integers), random(nb, d, seed=1, integers=integers)
    database[nb // 2 : nb // 2 + 10] = database[0].clone()  # copies: ties that only ids break
    offsets = lists(nb, nlist)
    probes = torch.randint(-1, nlist, (nq, nprobe), generator=torch.Generator().manual_seed(2))
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:nb] + (1 << 40)
    exclude = ids[torch.arange(nq) % nb]
    found = search(device, backend, queries, database, offsets, probes, k=k, ids=ids, exclude=exclude, metric=metric)
    check(found, brute_force(queries, database, offsets, probes, k, metric, ids, exclude))


@settings(max_examples=60)
@given(data=st.data())
def test_equals_brute_force_on_anything(data: st.DataObject) -> None:
    nq, nb = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 30))
    d, nlist, nprobe = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    k, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99))
    metric: Any = data.draw(st.sampled_from(METRICS))
    integers = data.draw(st.booleans())
    queries, database = random(nq, d, seed=seed, integers=integers), random(nb, d, seed=seed + 1, integers=integers)
    offsets = lists(nb, nlist, seed)
    probes = torch.randint(-1, nlist, (nq, nprobe), generator=torch.Generator().manual_seed(seed))
    exclude = torch.randint(-1, nb + 3, (nq,), generator=torch.Generator().manual_seed(seed))
    found = grouped_topk(queries, database, offsets, probes, k, exclude=exclude, metric=metric, backend="reference")
    check(found, brute_force(queries, database, offsets, probes, k, metric, exclude=exclude))


@pytest.mark.parametrize("metric", METRICS)
def test_bounds_and_blocks_change_nothing(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, merges, query blocks and waves at a small size."""
    queries, database = random(300, 8), random(500, 8, seed=1)
    offsets = lists(500, 20)
    probes = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:15] for i in range(300)])
    whole = grouped_topk(queries, database, offsets, probes, 7, metric=metric, backend="reference")
    for name, value in (("QUERY_BLOCK", 64), ("TILE", 128), ("TILE_COLUMNS", 16), ("PENDING", 50)):
        monkeypatch.setattr(reference, name, value)
    parts = grouped_topk(queries, database, offsets, probes, 7, metric=metric, backend="reference")
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    check(whole, brute_force(queries, database, offsets, probes, 7, metric))


def test_equals_faiss_with_the_same_clusters() -> None:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(1)
    x = torch.nn.functional.normalize(random(3000, 24), dim=1)
    centroids = train_kmeans(x, 30, niter=4)
    _, probes = assign_clusters(x, centroids, 6)
    ids = probes[:, 0].argsort(stable=True)
    offsets = torch.cat([torch.tensor([0]), torch.bincount(probes[:, 0], minlength=30).cumsum(0)])
    D, I = grouped_topk(x, x[ids], offsets, probes, 10, ids=ids)
    quantizer = faiss.IndexFlatIP(24)
    quantizer.add(centroids.numpy())
    index = faiss.IndexIVFFlat(quantizer, 24, 30, faiss.METRIC_INNER_PRODUCT)
    index.train(x.numpy())
    index.add(x.numpy())
    index.nprobe = 6
    theirs = index.search(x.numpy(), 10)
    np.testing.assert_allclose(D.numpy(), theirs[0], atol=2e-6)
    same_by_score_groups(D.numpy(), I.numpy(), *theirs)


def same_by_score_groups(D: np.ndarray, I: np.ndarray, their_D: np.ndarray, their_I: np.ndarray) -> None:
    """Equal ids but for the order within, and the choice at the k-th place among, scores that float32 cannot part."""
    for row in (their_I != I).any(axis=1).nonzero()[0]:
        for mine in set(I[row]) ^ set(their_I[row]):
            where = D[row][I[row] == mine] if mine in I[row] else their_D[row][their_I[row] == mine]
            assert abs(where[0] - D[row, -1]) < 2e-6, f"row {row}: {mine} is not a tie at the boundary"


@EVERYWHERE
def test_all_lists_probed_is_exact(backend: str, device: str) -> None:
    x = random(120, 6)
    offsets = lists(120, 4)
    everywhere = torch.arange(4).expand(30, 4)
    found = search(device, backend, x[:30], x, offsets, everywhere, k=5)
    check(found, brute_force(x[:30], x, torch.tensor([0, 120]), torch.zeros(30, 1, dtype=torch.int64), 5))


@EVERYWHERE
@pytest.mark.parametrize("metric", METRICS)
def test_copies_of_one_vector_come_in_order_of_id(backend: str, device: str, metric: Any) -> None:
    x = random(1, 13).repeat(90, 1)  # a float product that rounds
    ids = torch.arange(90).flip(0) * 7
    everywhere = torch.arange(3).expand(90, 3)
    _, I = search(device, backend, x, x, lists(90, 3), everywhere, k=8, ids=ids, exclude=ids, metric=metric)
    for row in range(90):
        assert I[row].tolist() == [i for i in sorted(ids.tolist()) if i != int(ids[row])][:8]


@EVERYWHERE
def test_zero_vectors_are_searched_like_others(backend: str, device: str) -> None:
    x = torch.zeros(20, 4)
    D, I = search(device, backend, x, x, torch.tensor([0, 20]), torch.zeros(20, 1, dtype=torch.int32), k=3)
    assert (D == 0).all()
    assert I.tolist() == [[0, 1, 2]] * 20


@EVERYWHERE
@pytest.mark.parametrize(("metric", "nothing"), [("ip", -torch.inf), ("l2", torch.inf)])
def test_fewer_than_k(backend: str, device: str, metric: Any, nothing: float) -> None:
    database = random(3, 4)
    probes = torch.tensor([[0, 1], [1, -1], [-1, -1]])  # all three rows, an empty list, no list
    D, I = search(device, backend, random(3, 4, seed=1), database, torch.tensor([0, 3, 3]), probes, k=5, metric=metric)
    assert sorted(I[0].tolist()) == [-1, -1, 0, 1, 2]
    assert I[0, 3:].tolist() == [-1, -1]
    assert (D[0, 3:] == nothing).all()
    assert (I[1:] == -1).all()
    assert (D[1:] == nothing).all()


@EVERYWHERE
def test_nothing_to_search(backend: str, device: str) -> None:
    none = torch.zeros(0, 4)
    D, I = search(device, backend, random(2, 4), none, torch.tensor([0, 0]), torch.zeros(2, 1, dtype=torch.int64), k=3)
    assert D.shape == I.shape == (2, 3)
    assert (I == -1).all()
    D, I = search(device, backend, none, random(2, 4), torch.tensor([0, 2]), torch.zeros(0, 2, dtype=torch.int64), k=3)
    assert D.shape == I.shape == (0, 3)
    no_probes = torch.zeros(2, 0, dtype=torch.int64)
    D, I = search(device, backend, random(2, 4), random(2, 4), torch.tensor([0, 2]), no_probes, k=3)
    assert (I == -1).all()


@EVERYWHERE
def test_a_list_named_twice_is_searched_once(backend: str, device: str) -> None:
    x = random(10, 4)
    once, twice = (
        search(device, backend, x, x, lists(10, 3), torch.tensor([probes]).expand(10, -1), k=6)
        for probes in ([2, 0], [2, 0, 2, 2, 0])
    )
    assert torch.equal(once[1], twice[1])


def test_a_query_alone_gives_what_it_gives_in_a_batch() -> None:
    x = random(400, 33)
    offsets, probes = lists(400, 9), torch.randint(0, 9, (400, 4), generator=torch.Generator().manual_seed(0))
    D, I = grouped_topk(x, x, offsets, probes, 6, exclude=torch.arange(400))
    for i in (0, 17, 399):
        alone = grouped_topk(x[i : i + 1], x, offsets, probes[i : i + 1], 6, exclude=torch.tensor([i]))
        assert torch.equal(alone[0][0], D[i])
        assert torch.equal(alone[1][0], I[i])


def test_another_query_changes_nothing_for_this_one() -> None:
    queries, database = random(50, 8), random(200, 8, seed=1)
    probes = torch.randint(0, 5, (50, 3), generator=torch.Generator().manual_seed(0))
    before = grouped_topk(queries, database, lists(200, 5), probes, 6)
    changed = queries.clone()
    changed[0] *= -100.0
    after = grouped_topk(changed, database, lists(200, 5), probes, 6)
    assert torch.equal(before[0][1:], after[0][1:])
    assert torch.equal(before[1][1:], after[1][1:])


def test_non_contiguous_half_and_double_inputs() -> None:
    x = random(60, 10, integers=True)
    expected = grouped_topk(x[:20], x, lists(60, 4), torch.zeros(20, 2, dtype=torch.int64).fill_(3), 5)
    strided = torch.stack([x, x], dim=2)[:, :, 0]
    probes = torch.full((2, 20), 3).T
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        found = grouped_topk(strided[:20].to(dtype), strided.to(dtype), lists(60, 4), probes, 5)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


def test_leaves_its_inputs_alone() -> None:
    x, probes = random(30, 4), torch.tensor([[0, 0, 1]]).repeat(30, 1)
    before = (x.clone(), probes.clone())
    grouped_topk(x, x, torch.tensor([0, 10, 30]), probes, 3, metric="l2")
    assert torch.equal(x, before[0])
    assert torch.equal(probes, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.full((2, 4), torch.nan)}, "queries: expected finite values, got NaN or infinity in row 0"),
        ({"database": torch.tensor([[0.0] * 4, [torch.inf] * 4, [0.0] * 4])}, "database: .* row 1"),
        ({"queries": torch.full((2, 4), 1e30)}, "overflow float32"),
        ({"queries": torch.zeros(2, 5)}, "database: expected 5 columns as in queries, got 4"),
        ({"queries": torch.zeros(2, 4, dtype=torch.float64)}, "database: expected torch.float64 as in queries"),
        ({"queries": torch.zeros(2, 4, dtype=torch.int64)}, "queries: expected a floating point tensor"),
        ({"queries": torch.zeros(4)}, r"queries: expected shape \[n, d\]"),
        ({"queries": [[0.0]]}, "queries: expected a torch.Tensor, got list"),
        ({"list_offsets": torch.tensor([0, 4])}, "last offset to equal the number of rows, 3, got 4"),
        ({"list_offsets": torch.tensor([0, 5, 3])}, "never decrease"),
        ({"list_offsets": torch.tensor([-1, 3])}, "first offset to be 0"),
        ({"list_offsets": torch.tensor([0.0, 3.0])}, "list_offsets: expected int32 or int64"),
        ({"probes": torch.tensor([[1], [0]])}, r"probes: expected lists −1 … 0 .* got 1"),
        ({"probes": torch.tensor([[-2], [0]])}, "got -2"),
        ({"probes": torch.tensor([[0]])}, r"probes: expected shape \[2, nprobe\]"),
        ({"ids": torch.tensor([1, 2, 1])}, "ids: expected every id once, got 1 at rows 0 and 2"),
        ({"ids": torch.tensor([1, 2, -1])}, "ids: expected ids ≥ 0"),
        ({"ids": torch.tensor([1, 2])}, r"ids: expected shape \[3\]"),
        ({"exclude": torch.tensor([1])}, r"exclude: expected shape \[2\]"),
        ({"k": 0}, "k: expected at least 1"),
        ({"probes": torch.zeros(2, 1)}, "probes: expected int32 or int64, got torch.float32"),
        ({"probes": [[0], [0]]}, "probes: expected a torch.Tensor, got list"),
        (
            {"database": torch.zeros(3, 4, device="meta")},
            "database: expected a tensor on cpu as queries, got one on meta",
        ),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, "ids: expected a tensor on cpu, got one on meta"),
        ({"metric": "cosine"}, "metric: expected 'ip' or 'l2'"),
        ({"backend": "fast"}, "expected one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "queries": torch.zeros(2, 4), "database": torch.zeros(3, 4), "list_offsets": torch.tensor([0, 3]),
        "probes": torch.zeros(2, 1, dtype=torch.int64), "k": 2,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        grouped_topk(**{**arguments, **change})


def test_triton_says_what_it_cannot_do() -> None:
    require("triton", "cpu")
    x = random(4, 4)
    probes = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="keeps at most 255"):
        grouped_topk(x, x, torch.tensor([0, 4]), probes, 256, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        grouped_topk(x.double(), x.double(), torch.tensor([0, 4]), probes, 2, backend="triton")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_ignores_what_lies_beyond_its_rows(device: str) -> None:
    """A database inside a larger buffer of NaN, at odd sizes: nothing outside may be read into a score."""
    require("triton", device)
    buffer = torch.full((90, 7), torch.nan, device=device)
    buffer[:50] = random(50, 7).to(device)
    database = buffer[:50]
    offsets, probes = torch.tensor([0, 17, 18, 50]), torch.tensor([[0, 2], [1, 2], [2, 0]])
    found = grouped_topk(database[:3], database, offsets.to(device), probes.to(device), 4, backend="triton")
    there = database.cpu()
    check((found[0].cpu(), found[1].cpu()), brute_force(there[:3], there, offsets, probes, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
def test_on_a_gpu_many_rows_find_what_a_cpu_finds(metric: Any) -> None:
    """Lists of many tiles, several launches, every size of a program's best."""
    require("triton", "cuda")
    x = random(6000, 40)
    offsets, probes = lists(6000, 30), torch.randint(0, 30, (6000, 8), generator=torch.Generator().manual_seed(1))
    for k in (1, 15, 60, 200):
        arguments = (x[:2000], x, offsets, probes[:2000])
        D, I = search("cuda", "triton", *arguments, k=k, metric=metric)
        expected = search("cpu", "reference", *arguments, k=k, metric=metric)
        torch.testing.assert_close(D, expected[0], rtol=1e-5, atol=1e-5)
        assert (expected[1] == I).float().mean() > 0.999  # float32 products part rows at the k-th place


# ---- the native search


def instruction_sets() -> list[str]:
    """Those of this machine; where it has no tiles, their emulation."""
    sets = importlib.import_module("alure.kernels._native").instruction_sets() if has_native() else []
    return sets if "amx" in sets or not sets else [*sets, "emulated amx"]


def clustered(n: int, d: int, nlist: int, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """(database by list, offsets, probes nearest first) of points around centres; the last tenth are copies."""
    centres = random(nlist, d, seed=seed)
    x = centres[torch.arange(n) % nlist] + spread * random(n, d, seed=seed + 1)
    x[n - n // 10 :] = x[0].clone()
    _, probes = assign_clusters(x, centres, nlist, metric="l2", backend="reference")
    order = probes[:, 0].argsort(stable=True)
    offsets = torch.cat([torch.tensor([0]), torch.bincount(probes[:, 0], minlength=nlist).cumsum(0)])
    return x[order], offsets, probes[order]


@needs_native
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "d", "nlist", "nprobe", "k"),
    [(3000, 64, 12, 6, 15), (1500, 7, 40, 9, 3), (700, 130, 3, 3, 256), (2500, 16, 1, 1, 1), (900, 1, 5, 2, 40)],
)
def test_native_equals_the_reference(
    instruction_set: str, metric: Any, n: int, d: int, nlist: int, nprobe: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = importlib.import_module("alure.kernels.neighbors.native")
    monkeypatch.setattr(native, "INSTRUCTION_SET", instruction_set)
    x, offsets, probes = clustered(n, d, nlist)
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    arguments = (x, x, offsets, probes[:, :nprobe], k)
    found = grouped_topk(*arguments, ids=ids, exclude=ids, metric=metric, backend="native")
    expected = grouped_topk(*arguments, ids=ids, exclude=ids, metric=metric, backend="reference")
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@needs_native
@settings(max_examples=60)
@given(data=st.data())
def test_native_equals_brute_force_on_anything(data: st.DataObject) -> None:
    nq, nb = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 90))
    d, nlist, nprobe = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    k, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99))
    metric: Any = data.draw(st.sampled_from(METRICS))
    integers = data.draw(st.booleans())
    queries, database = random(nq, d, seed=seed, integers=integers), random(nb, d, seed=seed + 1, integers=integers)
    database *= data.draw(st.sampled_from([0.0, 1e-37, 1e-30, 1e-20, 1.0, 1e6]))
    offsets = lists(nb, nlist, seed)
    probes = torch.randint(-1, nlist, (nq, nprobe), generator=torch.Generator().manual_seed(seed))
    exclude = torch.randint(-1, nb + 3, (nq,), generator=torch.Generator().manual_seed(seed))
    instruction_set = data.draw(st.sampled_from([*instruction_sets(), "emulated amx"]))
    native = importlib.import_module("alure.kernels.neighbors.native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "INSTRUCTION_SET", instruction_set)
        found = grouped_topk(queries, database, offsets, probes, k, exclude=exclude, metric=metric, backend="native")
    check(found, brute_force(queries, database, offsets, probes, k, metric, exclude=exclude))


@needs_native
@pytest.mark.parametrize("metric", METRICS)
def test_native_is_the_same_for_any_threads_and_shares(metric: Any) -> None:
    x, offsets, probes = clustered(2000, 24, 9)
    before = torch.get_num_threads()
    whole = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole.append(grouped_topk(x, x, offsets, probes[:, :4], 10, metric=metric, backend="native"))
    finally:
        torch.set_num_threads(before)
    for start in range(0, 2000, 333):
        part = slice(start, start + 333)
        found = grouped_topk(x[part], x, offsets, probes[part, :4], 10, metric=metric, backend="native")
        for D, I in whole:
            assert torch.equal(found[0], D[part])
            assert torch.equal(found[1], I[part])


@needs_native
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4])
def test_vectors_closer_than_products_resolve(spread: float) -> None:
    """Near copies: no float32 product parts them, the exact scores do."""
    x = torch.nn.functional.normalize(random(1, 32) + spread * random(800, 32, seed=1), dim=1)
    arguments = (x, x, lists(800, 4), torch.arange(4).expand(800, 4), 12)
    found = grouped_topk(*arguments, exclude=torch.arange(800), backend="native")
    expected = grouped_topk(*arguments, exclude=torch.arange(800), backend="reference")
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("backend", ["reference", *instruction_sets()])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-22, 1e-30])
def test_scores_that_float32_cannot_tell_from_zero(
    backend: str, metric: Any, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of scales underflow, and every neighbour is found all the same."""
    if backend != "reference":
        monkeypatch.setattr(importlib.import_module("alure.kernels.neighbors.native"), "INSTRUCTION_SET", backend)
        backend = "native"
    queries, database = scale * random(60, 31), scale * random(90, 31, seed=1)
    offsets, probes = lists(90, 3), torch.arange(3).expand(60, 3)
    for k in (1, 15, 90):
        found = grouped_topk(queries, database, offsets, probes, k, metric=metric, backend=backend)
        check(found, brute_force(queries, database, offsets, probes, k, metric))


# ---- assign_clusters


@needs_native
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "c", "d", "nprobe"), [(500, 400, 64, 50), (77, 33, 5, 33), (300, 1000, 8, 1)])
def test_native_assignment(
    instruction_set: str, metric: Any, n: int, c: int, d: int, nprobe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = importlib.import_module("alure.kernels.neighbors.native")
    monkeypatch.setattr(native, "INSTRUCTION_SET", instruction_set)
    x, centroids = random(n, d), random(c, d, seed=1)
    centroids[c // 2] = centroids[c // 3]
    D, I = assign_clusters(x, centroids, nprobe, metric=metric, backend="native")
    exact = scores_of(x[:, None], centroids[None], metric) * (1 if metric == "ip" else -1)
    torch.testing.assert_close(D, exact.gather(1, I), rtol=1e-5, atol=1e-4)
    best = exact.topk(nprobe, dim=1, largest=metric == "ip").values
    torch.testing.assert_close(D, best, rtol=1e-5, atol=1e-4)
    tied = D[:, 1:] == D[:, :-1]
    assert (I[:, 1:] > I[:, :-1])[tied].all()
    assert all(len(set(row)) == nprobe for row in I.tolist())


@EVERYWHERE
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "c", "d", "nprobe"), [(40, 9, 5, 4), (17, 70, 3, 7), (5, 1, 2, 1), (30, 30, 6, 30)])
def test_assignment_equals_brute_force(
    backend: str, device: str, metric: Any, n: int, c: int, d: int, nprobe: int
) -> None:
    x, centroids = random(n, d, integers=True), random(c, d, seed=1, integers=True)
    centroids[-1] = centroids[0]
    found = on(device, assign_clusters, backend, x, centroids, nprobe=nprobe, metric=metric)
    check(found, brute_force(x, centroids, torch.tensor([0, c]), torch.zeros(n, 1, dtype=torch.int64), nprobe, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_assignment_of_floats(metric: Any) -> None:
    x, centroids = random(500, 16), random(64, 16, seed=1)
    D, I = assign_clusters(x.double(), centroids.double(), 5, metric=metric)
    expected = brute_force(x, centroids, torch.tensor([0, 64]), torch.zeros(500, 1, dtype=torch.int64), 5, metric)
    check((D, I), expected)


@pytest.mark.parametrize(
    ("x", "centroids", "nprobe", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, "nprobe: expected 1 … 4"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0, "nprobe"),
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, "centroids: expected 3 columns"),
        (torch.full((2, 3), torch.nan), torch.zeros(4, 3), 1, "x: expected finite"),
        (torch.zeros(2, 3), torch.full((4, 3), torch.inf), 1, "centroids: expected finite"),
    ],
)
def test_bad_assignment_is_named(x: Tensor, centroids: Tensor, nprobe: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_clusters(x, centroids, nprobe)
    with pytest.raises(ValueError, match="metric: expected 'ip' or 'l2', got 'cosine'"):
        assign_clusters(torch.zeros(2, 3), torch.zeros(4, 3), metric="cosine")  # type: ignore[arg-type]


def test_assignment_of_nothing() -> None:
    D, I = assign_clusters(torch.zeros(0, 3), torch.zeros(4, 3), 2)
    assert D.shape == I.shape == (0, 2)


def test_operators_are_clean_for_compile_and_export() -> None:
    x = random(12, 4)
    offsets, probes = torch.tensor([0, 12]), torch.zeros(12, 1, dtype=torch.int64)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.alure.assign_clusters, (x, x[:3], 2, "ip", "auto"), test_utils=checks)
    arguments = (x, x, offsets, probes, 3, None, torch.arange(12), "l2", "auto")
    torch.library.opcheck(torch.ops.alure.grouped_topk, arguments, test_utils=checks)


# ---- train_kmeans


def test_kmeans_finds_planted_clusters() -> None:
    centres = torch.nn.functional.normalize(random(8, 16), dim=1)
    x = torch.nn.functional.normalize(centres.repeat(100, 1) + 0.05 * random(800, 16, seed=1), dim=1)
    centroids = train_kmeans(x, 8, niter=20)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(8))
    objective = assign_clusters(x, centroids)[0].mean()
    assert objective > 0.95 * assign_clusters(x, centres)[0].mean()


def test_kmeans_in_euclidean_space() -> None:
    x = torch.cat([random(50, 3) * 0.1 + 5, random(50, 3, seed=1) * 0.1 - 5])
    centroids = train_kmeans(x, 2, spherical=False).sort(dim=0).values
    torch.testing.assert_close(centroids, torch.stack([x[50:].mean(0), x[:50].mean(0)]).sort(dim=0).values)


@pytest.mark.gpu
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_on_a_gpu_fits_as_on_a_cpu(spherical: bool, init: Any) -> None:
    require("triton", "cuda")
    x = clustered(3000, 20, 15)[0]
    found, again = (train_kmeans(x.cuda(), 40, niter=5, init=init, spherical=spherical).cpu() for _ in range(2))
    assert torch.equal(found, again)
    metric: Any = "ip" if spherical else "l2"
    reached, expected = (
        assign_clusters(x, centroids, metric=metric)[0].double().mean()
        for centroids in (found, train_kmeans(x, 40, niter=5, init=init, spherical=spherical))
    )
    assert abs(reached - expected) < 0.02 * abs(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kmeans_in_half_precision_is_rounded_at_the_end(dtype: torch.dtype) -> None:
    x = random(300, 6).to(dtype)
    centroids = train_kmeans(x, 5)
    assert torch.equal(centroids, train_kmeans(x.float(), 5).to(dtype))
    assert assign_clusters(x, centroids)[1].unique().numel() == 5


def test_kmeans_depends_on_the_seed_only() -> None:
    x = random(500, 6)
    assert torch.equal(train_kmeans(x, 20, seed=3), train_kmeans(x, 20, seed=3))
    assert not torch.equal(train_kmeans(x, 20, seed=3), train_kmeans(x, 20, seed=4))
    sampled = train_kmeans(x, 5, max_points_per_centroid=10)
    assert torch.equal(sampled, train_kmeans(x, 5, max_points_per_centroid=10))


def test_kmeans_leaves_no_cluster_empty_where_points_allow() -> None:
    x = torch.nn.functional.normalize(torch.cat([torch.ones(1, 4).repeat(300, 1), random(20, 4)]), dim=1)
    centroids = train_kmeans(x, 16, niter=15)
    assert centroids.isfinite().all()
    assert len(centroids.unique(dim=0)) == 16


def test_kmeans_of_copies_opposites_and_zeros() -> None:
    same = train_kmeans(torch.ones(50, 3), 4)
    assert same.isfinite().all()
    opposite = train_kmeans(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(20, 1), 1)
    assert opposite.isfinite().all()
    with pytest.raises(ValueError, match="at least nlist = 2 rows that are not zero, got 0"):
        train_kmeans(torch.zeros(10, 3), 2)


def test_kmeans_continues_from_given_centroids() -> None:
    x = torch.nn.functional.normalize(random(300, 5), dim=1)
    first = train_kmeans(x, 6, niter=10)
    more = train_kmeans(x, 6, niter=5, start=first)
    assert assign_clusters(x, more)[0].mean() >= assign_clusters(x, first)[0].mean() - 1e-6
    with pytest.raises(ValueError, match=r"start: expected shape \[6, 5\]"):
        train_kmeans(x, 6, start=first[:5])


def test_kmeans_refuses_what_it_cannot_cluster() -> None:
    with pytest.raises(ValueError, match="at least nlist = 11"):
        train_kmeans(random(10, 3), 11)
    with pytest.raises(ValueError, match="NaN"):
        train_kmeans(torch.full((10, 3), torch.nan), 2)
    with pytest.raises(TypeError, match="floating"):
        train_kmeans(torch.zeros(10, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="nlist, niter, max_points_per_centroid: expected at least 1, 0, 1; got 0, 10"):
        train_kmeans(random(10, 3), 0)


@needs_native
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_is_the_same_for_any_threads_and_instruction_set(
    init: Any, spherical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = clustered(1200, 20, 15)[0]
    native = importlib.import_module("alure.kernels.neighbors.native")

    def trained() -> Tensor:
        return train_kmeans(x, 40, niter=5, init=init, spherical=spherical)

    expected, before = trained(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(trained(), expected)
    finally:
        torch.set_num_threads(before)
    for instruction_set in instruction_sets():
        monkeypatch.setattr(native, "INSTRUCTION_SET", instruction_set)
        assert torch.equal(trained(), expected)
    torch.testing.assert_close(train_kmeans(x.double(), 40, niter=5, init=init, spherical=spherical), expected.double())


@needs_native
def test_kmeans_ends_where_no_point_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    native = importlib.import_module("alure.kernels.neighbors.native")
    calls = []
    assign = native.ClusterPoints.assign
    monkeypatch.setattr(native.ClusterPoints, "assign", lambda *args: calls.append(1) or assign(*args))
    x = random(400, 3)
    long = train_kmeans(x, 4, niter=1000, spherical=False)
    assert len(calls) < 1000
    nearest = assign_clusters(x, long, metric="l2")[1].squeeze(1)
    means = torch.stack([x[nearest == cluster].double().mean(dim=0) for cluster in range(4)])
    torch.testing.assert_close(long, means.float())


def test_kmeans_plus_plus_starts_far_apart() -> None:
    """Of 40 heaps, a few of them much larger, nearly each gets a first centroid; points at random miss many."""
    centres = 100 * random(40, 8)
    heaps = torch.cat([torch.arange(40).repeat(10), torch.arange(4).repeat(250)])
    x = centres[heaps] + random(len(heaps), 8, seed=1)
    starts = {init: train_kmeans(x, 40, niter=0, init=init, spherical=False) for init in ("random", "k-means++")}
    missed = {init: 40 - len(torch.cdist(start, centres).argmin(1).unique()) for init, start in starts.items()}
    assert missed["k-means++"] <= 4 < missed["random"]
    with pytest.raises(ValueError, match="init: expected 'random' or 'k-means"):
        train_kmeans(x, 2, init="far")  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [40, 41])
def test_kmeans_plus_plus_of_copies(n: int) -> None:
    """More centroids than different points: every row is drawn once, at distances of zero as well."""
    x = torch.ones(n, 3)
    assert torch.equal(train_kmeans(x, 40, niter=0, init="k-means++", spherical=False), torch.ones(40, 3))


@needs_native
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("n", "c", "d", "scale"), [(500, 90, 64, 1.0), (77, 1, 5, 1e-30), (300, 33, 130, 1e6), (200, 33, 16, 1e-21)]
)
def test_a_second_assignment_equals_a_fresh_one(
    instruction_set: str, metric: Any, n: int, c: int, d: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was nearest before: what is, or the worst there is."""
    native = importlib.import_module("alure.kernels.neighbors.native")
    monkeypatch.setattr(native, "INSTRUCTION_SET", instruction_set)
    x, centroids = scale * random(n, d), scale * random(c, d, seed=1)
    x[: n // 4] = x[0].clone()
    centroids[c // 2] = centroids[c // 3]
    expected = native.assign(x, centroids, 1, metric)[1].squeeze(1)
    points = native.ClusterPoints(x, metric)
    for start in (scale * random(c, d, seed=2), -centroids, centroids):
        points.assign(start)
        nearest, sums = points.assign(centroids)
        assert torch.equal(nearest, expected)
        exact = torch.zeros(c, d, dtype=torch.float64).index_add_(0, nearest, x.double())
        torch.testing.assert_close(sums, exact, rtol=1e-9, atol=1e-9 * scale)


@needs_native
@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_points_far_from_all_centroids(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The origin, which is among the points, is large beside the scores."""
    native = importlib.import_module("alure.kernels.neighbors.native")
    monkeypatch.setattr(native, "INSTRUCTION_SET", instruction_set)
    x = torch.cat([1e-3 * random(300, 1), torch.full((700, 1), 1e5)])
    centroids = torch.tensor([1.0, -1.0])[torch.randint(0, 2, (8, 1), generator=torch.Generator().manual_seed(0))]
    points = native.ClusterPoints(x, "ip")
    for each in (centroids, -centroids, centroids.flip(0)):  # assigned, then reassigned
        assert torch.equal(points.assign(each)[0], (x.double() @ each.double().T).max(dim=1).indices)


@needs_native
def test_cluster_sums_do_not_depend_on_threads() -> None:
    native = importlib.import_module("alure.kernels._native")
    x = random(1000, 9)
    before, nearest = (torch.randint(0, 20, (1000,), generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    first = torch.zeros(21, 9, dtype=torch.float64).index_add_(0, before, x.double())
    moved = []
    for threads in (1, 2, 5):
        sums = torch.zeros(21, 9, dtype=torch.float64)
        assert native.add_to_clusters(x.numpy(), None, before.numpy(), sums.numpy(), "portable", threads)
        assert torch.equal(sums, first)
        assert native.add_to_clusters(x.numpy(), before.numpy(), nearest.numpy(), sums.numpy(), "portable", threads)
        moved.append(sums)
    assert all(torch.equal(sums, moved[0]) for sums in moved)
    torch.testing.assert_close(moved[0], torch.zeros_like(first).index_add_(0, nearest, x.double()))
    sums = torch.zeros(19, 9, dtype=torch.float64)
    assert not native.add_to_clusters(x.numpy(), None, nearest.numpy(), sums.numpy(), "portable", 1)
    assert not native.ClusterPoints(x.numpy(), "ip", "portable", 1).reassign(x[:19].numpy(), nearest.numpy(), 1)


# ---- parts


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20), st.data())
def test_keys_sort_like_scores_then_ids(values: list[float], data: st.DataObject) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    rank = torch.tensor(data.draw(st.permutations(range(len(values)))))
    keys = encode(scores, rank)
    order = sorted(range(len(values)), key=lambda i: (-values[i] if values[i] else 0.0, int(rank[i])))
    assert keys.argsort(descending=True).tolist() == order
    back, ranks = decode(keys)
    assert torch.equal(back, torch.where(scores == 0, 0.0, scores))
    assert torch.equal(ranks, rank)
    assert decode(torch.tensor([MISSING]))[1].item() == -1


def test_only_copies_beyond_the_first_few_are_left_out() -> None:
    x = random(40, 3)
    x[5:35:2] = x[5]  # 15 copies, rows 5, 7, … 33
    x[36] = -x[37]
    rank = torch.arange(40).flip(0)  # the last rows have the lowest ids
    kept = first_copies(x, torch.tensor([0, 20, 40]), rank, 3)
    assert kept is not None
    copies = [row for row in kept.tolist() if row in range(5, 35, 2)]
    assert copies == [15, 17, 19, 29, 31, 33]  # three in each list, the lowest ids
    assert len(kept) == 40 - 15 + 6
    assert first_copies(random(40, 3), torch.tensor([0, 40]), rank, 1) is None
