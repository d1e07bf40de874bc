"""The Triton kernel that nominates: no row of the k best is missed, whatever tf32 makes of a product."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerance import require
from torch import Tensor

from alure.kernels import grouped_topk
from alure.kernels.neighbors.scores import Search, exact_scores

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
METRICS = pytest.mark.parametrize("metric", ["ip", "l2"])


def clustered(nb: int, width: int, nlist: int, nprobe: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(queries, database, list_offsets, probes), nearest list first: points around centres, queries beside some."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(nlist, width, generator=generator)
    cuts = torch.randint(0, nb + 1, (nlist - 1,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([nb])])
    near = torch.repeat_interleave(centres, offsets[1:] - offsets[:-1], dim=0)
    database = torch.nn.functional.normalize(near + 3 * torch.randn(nb, width, generator=generator), dim=1)
    queries = database[:: max(1, nb // 40)]
    queries = queries + 0.05 * torch.randn(queries.shape, generator=generator)
    return queries, database, offsets, (queries @ centres.T).topk(nprobe, dim=1).indices


def both(device: str, *problem: Tensor, k: int, **options: Any) -> tuple[Tensor, ...]:
    """Scores and ids of the kernels and of the reference."""
    require("triton", device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    D, I = grouped_topk(*(x.to(device) for x in problem), k, **options, backend="triton")
    return D, I, *grouped_topk(*(x.to(device) for x in problem), k, **options, backend="reference")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every call: how many rows were nominated, and how many queries are searched again."""
    kernel = importlib.import_module("alure.kernels.neighbors.kernel")
    nominate, calls = kernel.nominate, []

    def watch(*args: Any) -> tuple[Tensor, Tensor]:
        rows, again = nominate(*args)
        calls.append((int((rows >= 0).sum()), len(again)))
        return rows, again

    monkeypatch.setattr(kernel, "nominate", watch)
    return calls


@DEVICES
@METRICS
@pytest.mark.parametrize(("width", "k"), [(3, 5), (64, 15), (100, 1), (129, 15)])
def test_the_neighbours_of_the_reference(
    device: str, metric: str, width: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("triton", device)
    calls = watched(monkeypatch)
    problem = clustered(900, width, nlist=8, nprobe=6)
    D, I, expected_D, expected_I = both(device, *problem, k=k, metric=metric)
    assert torch.equal(I, expected_I)
    assert torch.equal(D, expected_D)
    (nominated, again), queries = calls[0], len(problem[0])
    assert 0 < nominated < queries * 900 / 4
    assert again < queries / 2


@DEVICES
def test_who_nominates_too_many_or_knows_too_few(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton", device)
    kernel = importlib.import_module("alure.kernels.neighbors.kernel_nominate")
    monkeypatch.setattr(kernel, "CAPACITY", 4)
    calls = watched(monkeypatch)
    problem = clustered(600, 16, nlist=12, nprobe=9, seed=3)
    D, I, expected_D, expected_I = both(device, *problem, k=15)
    assert torch.equal(I, expected_I)
    assert torch.equal(D, expected_D)
    assert calls[0][1] > 0


@DEVICES
def test_an_excluded_row_of_a_far_list(device: str) -> None:
    queries, database, offsets, probes = clustered(400, 16, nlist=6, nprobe=6, seed=5)
    best = grouped_topk(queries, database, offsets, probes, 1, backend="reference")[1][:, 0]
    away = probes.flip(1)  # the nearest list last
    _, I, _, expected = both(device, queries, database, offsets, away, k=7, exclude=best)
    assert not (I.cpu() == best[:, None]).any()
    assert torch.equal(I, expected)


@DEVICES
@METRICS
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e17])
def test_tiny_and_huge_vectors(device: str, metric: str, scale: float) -> None:
    queries, database, offsets, probes = clustered(300, 8, nlist=5, nprobe=5, seed=7)
    D, I, expected_D, expected_I = both(device, queries * scale, database * scale, offsets, probes, k=4, metric=metric)
    if 1e-15 < scale < 1e15:  # beyond, what the kernel of the nearest lists keeps may be any
        assert torch.equal(I, expected_I)
        assert torch.equal(D, expected_D)
    assert (I >= 0).all()


def cut(x: Tensor, nearest: bool) -> Tensor:
    """float32 as tf32 has it: 10 bits behind the point, rounded or cut off."""
    bits = x.view(torch.int32)
    return ((bits + 0x1000 if nearest else bits) & ~0x1FFF).view(torch.float32)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    width=st.sampled_from([1, 2, 3, 16, 64, 200]),
    metric=st.sampled_from(["ip", "l2"]),
    lengths=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
    nearest=st.booleans(),
)
def test_the_bound_holds_for_tf32(seed: int, width: int, metric: str, lengths: tuple[int, int], nearest: bool) -> None:
    """A row whose exact score reaches the k-th best reaches the bound with its score of cut factors."""
    require("triton", "cpu")
    bounds_of = importlib.import_module("alure.kernels.neighbors.kernel_nominate").Bounds
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(20, width, generator=generator) * 2.0 ** lengths[0]
    database = torch.randn(60, width, generator=generator) * 2.0 ** (lengths[1] + torch.randint(-2, 3, (60, 1)))
    database[:10] = queries[:10] * (1 + 2e-4 * torch.randn(10, 1, generator=generator))  # near ties
    offsets, none = torch.tensor([0, 30, 60]), torch.full((20,), -1)
    task = Search(queries, database, offsets, none[:, None], torch.arange(60), none, 1, metric)
    i, j = torch.cartesian_prod(torch.arange(20), torch.arange(60)).unbind(1)
    exact = exact_scores(queries, i, database, j, metric).view(20, 60)
    products = (cut(queries, nearest).double() @ cut(database, nearest).double().T).float()
    scores = products if metric == "ip" else 2 * products - database.square().sum(dim=1)
    bounds = bounds_of(task)
    for column in range(0, 60, 7):
        kth = exact[:, column]
        floor, slack = bounds.of(slice(None), kth)
        bound = floor[:, None] - slack[:, None] * bounds.list_norm.repeat_interleave(30)
        assert (scores >= bound)[exact >= kth[:, None]].all()
