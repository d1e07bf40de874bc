"""residual_quantize and the training of its codebooks against search by brute force."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tolerance import TARGETS, poisoned_memory, require
from torch import Tensor

from alure.kernels import residual_quantize, train_residual_codebooks
from alure.kernels.quantization import perplexity
from alure.kernels.quantization.training import lloyd, split_most_used, start_codes

# n, d, levels, codes
SHAPES = {
    "small": (50, 8, 3, 16),
    "odd": (67, 33, 2, 70),
    "wide": (5, 300, 2, 9),
    "one of each": (1, 1, 1, 1),
    "one code": (9, 4, 3, 1),
    "no rows": (0, 4, 2, 3),
    "no levels": (6, 4, 0, 3),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def random_problem(n: int, d: int, levels: int, codes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    shrinking = 2.0 ** -torch.arange(levels)
    return x, torch.randn(levels, codes, d, generator=generator) * shrinking[:, None, None]


@DTYPES
@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_the_nearest(shape: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Each level's code is, to float32 rounding, the nearest to what the levels before it left."""
    require(backend, device)
    x, books = (y.to(dtype) for y in random_problem(*SHAPES[shape]))
    codes, residual = residual_quantize(x.to(device), books.to(device), backend=backend)
    codes, residual = codes.cpu(), residual.cpu()
    assert (codes.shape, codes.dtype) == ((x.shape[0], books.shape[0]), torch.int64)
    left = x.double()
    for level, book in enumerate(books.double()):
        distances = (left[:, None] - book).square().sum(-1)
        chosen = distances.gather(1, codes[:, level : level + 1])[:, 0]
        scale = left.norm(dim=1) * book.norm(dim=1).max() + book.square().sum(1).max()
        assert (chosen <= distances.min(1).values + 1e-6 * scale).all()
        left = left - book[codes[:, level]]
    assert residual.dtype == dtype
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(residual.double(), left, **tolerance)


@settings(max_examples=25)
@given(
    points=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=6),
    book=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20),
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_of_equals_the_lowest_code(backend: str, points: list[tuple[int, int]], book: list[tuple[int, int]]) -> None:
    """Small integers, where float32 is exact, have many equally near codes."""
    require(backend, "cpu")
    x, codebook = torch.tensor(points, dtype=torch.float32), torch.tensor(book, dtype=torch.float32)
    distances = (x[:, None] - codebook).square().sum(-1)
    expected = (distances == distances.min(1, keepdim=True).values).to(torch.uint8).argmax(1)
    codes, residual = residual_quantize(x, codebook[None], backend=backend)
    assert torch.equal(codes[:, 0], expected)
    assert torch.equal(residual, x - codebook[expected])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_twin_codes(backend: str) -> None:
    """Copies of a code, wherever a matrix product's blocks put them, are the first of them."""
    require(backend, "cpu")
    x, books = random_problem(40, 37, 1, 50)
    copied = torch.cat([books, books.flip(1), books], 1)
    assert torch.equal(
        residual_quantize(x, copied, backend=backend)[0], residual_quantize(x, books, backend=backend)[0]
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_are_independent(backend: str) -> None:
    require(backend, "cpu")
    x, books = random_problem(40, 12, 3, 20)
    codes, residual = residual_quantize(x, books, backend=backend)
    changed = x.clone()
    changed[7] = 1e5
    again = residual_quantize(changed, books, backend=backend)
    others = torch.arange(40) != 7
    assert torch.equal(again[0][others], codes[others])
    assert torch.equal(again[1][others], residual[others])
    assert torch.equal(residual_quantize(x[5:6], books, backend=backend)[0], codes[5:6])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strided_inputs(backend: str) -> None:
    require(backend, "cpu")
    x, books = random_problem(30, 12, 2, 20)
    apart = torch.zeros(12, 60)
    apart[:, ::2] = x.T
    strided = residual_quantize(apart[:, ::2].T, books.transpose(0, 1).contiguous().transpose(0, 1), backend=backend)
    for got, want in zip(strided, residual_quantize(x, books, backend=backend)):
        assert torch.equal(got, want)
    assert torch.equal(x, random_problem(30, 12, 2, 20)[0])  # the input is not worked on in place


def test_gradients() -> None:
    """Codes held fixed, the residual is x − Σ codes: the straight-through training of an RQ-VAE reads this."""
    x, books = (y.double().requires_grad_() for y in random_problem(6, 3, 2, 4))
    assert torch.autograd.gradcheck(lambda *given: residual_quantize(*given)[1], (x, books))
    codes, _ = residual_quantize(x, books)
    assert not codes.requires_grad


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_opcheck(backend: str) -> None:
    require(backend, "cpu")
    x, books = (y.requires_grad_() for y in random_problem(6, 3, 2, 4))
    torch.library.opcheck(torch.ops.alure.residual_quantize.default, (x, books, backend))


def test_bad_arguments() -> None:
    x, books = random_problem(4, 3, 2, 5)
    with pytest.raises(ValueError, match=r"x: expected shape \[n, d\], got \[3\]"):
        residual_quantize(x[0], books)
    with pytest.raises(TypeError, match="x: expected float16"):
        residual_quantize(x.long(), books)
    with pytest.raises(TypeError, match=r"codebooks: expected torch\.float32 like x"):
        residual_quantize(x, books.double())
    with pytest.raises(TypeError, match=r"codebooks: expected a torch\.Tensor, got list"):
        residual_quantize(x, list(books))
    for wrong in (books[0], books[..., :2], books[:, :0]):
        with pytest.raises(ValueError, match=r"codebooks: expected shape \[levels, codes >= 1, 3\]"):
            residual_quantize(x, wrong)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[2, 1] = value
        with pytest.raises(ValueError, match=r"x: expected finite values, got (nan|inf) at \[2, 1\]"):
            residual_quantize(bad, books)
    with pytest.raises(ValueError, match="codebooks: expected finite values"):
        residual_quantize(x, books / 0)


def test_training_finds_planted_codes() -> None:
    """Points are a coarse code plus a fine one: two levels explain them, and use their codes evenly."""
    generator = torch.Generator().manual_seed(0)
    coarse, fine = 100 * torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    which = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(30, 1)
    x = coarse[which[:, 0]] + fine[which[:, 1]]
    trained = train_residual_codebooks(x, 2, 4, seed=0)
    assert trained.codebooks.shape == (2, 4, 6)
    assert spread(x, trained.codebooks) < 1e-6 * x.square().mean()
    torch.testing.assert_close(trained.perplexity, torch.tensor([4.0, 4.0], dtype=torch.float64))


def spread(x: Tensor, books: Tensor) -> float:
    return float(residual_quantize(x, books)[1].square().mean())


def test_training_is_deterministic_and_each_level_helps() -> None:
    x = torch.randn(600, 10, generator=torch.Generator().manual_seed(0))
    first, second = train_residual_codebooks(x, 3, 16, 5), train_residual_codebooks(x, 3, 16, 5)
    assert torch.equal(first.codebooks, second.codebooks)
    assert not torch.equal(first.codebooks, train_residual_codebooks(x, 3, 16, 6).codebooks)
    left = [float(x.square().mean()), *(spread(x, first.codebooks[: level + 1]) for level in range(3))]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.5 * left[0]
    assert (first.perplexity > 8).all()


def test_dead_codes_are_set_to_points() -> None:
    """Nine codes start on one of nine points: eight win nothing, and must be moved until each has its own."""
    others = 10 * torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    x = torch.cat([torch.zeros(40, 5), others])
    book = lloyd(x, torch.zeros(9, 5), 60, torch.Generator().manual_seed(0))
    assert spread(x, book[None]) < 1e-9


def test_held_out_vectors_use_every_code() -> None:
    """Also the deep levels, where k-means alone leaves one code in the middle that wins most rows."""
    x = torch.randn(12_000, 48, generator=torch.Generator().manual_seed(3))
    trained = train_residual_codebooks(x[2_000:], 3, 64, seed=0, max_points_per_code=64)
    codes, _ = residual_quantize(x[:2_000], trained.codebooks)
    assert all(float(perplexity(codes[:, level], 64)) > 0.95 * 64 for level in range(3))


def test_a_split_keeps_the_others_and_shares_evenly() -> None:
    copies = torch.full((90, 7), 50.0) + 1 / 3  # no error: not split
    x = torch.cat([torch.randn(80, 7, generator=torch.Generator().manual_seed(0)), copies])
    book = torch.stack([torch.zeros(7), torch.full((7,), 50.0), torch.full((7,), 90.0)])
    chosen = torch.tensor([0] * 80 + [1] * 90)
    moved = split_most_used(book, x, chosen, torch.Generator())
    assert torch.equal(moved[1], book[1])
    counts = torch.bincount(residual_quantize(x, moved[None])[0][:, 0], minlength=3).tolist()
    assert counts[1] == 90
    assert min(counts[0], counts[2]) > 20
    assert torch.equal(split_most_used(book, copies, torch.ones(90, dtype=torch.int64), torch.Generator()), book)


def test_codes_start_apart() -> None:
    x = torch.eye(12).repeat(30, 1)
    start = start_codes(x, 12, torch.Generator().manual_seed(0))
    assert torch.equal(start.unique(dim=0), torch.eye(12).unique(dim=0))
    assert start_codes(torch.ones(3, 2), 5, torch.Generator().manual_seed(0)).shape == (5, 2)


def test_training_with_few_points() -> None:
    x = torch.randn(3, 4)
    more_codes = train_residual_codebooks(x, 2, 8, 0)
    assert more_codes.codebooks.isfinite().all()
    assert spread(x, more_codes.codebooks) < 1e-12
    sampled = train_residual_codebooks(torch.randn(500, 4), 1, 2, 0, max_points_per_code=10)
    assert sampled.codebooks.isfinite().all()


def test_bad_training() -> None:
    for arguments in ({"levels": 0, "codes": 2}, {"levels": 1, "codes": 0}):
        with pytest.raises(ValueError, match=r"(levels|codes): expected at least 1, got 0"):
            train_residual_codebooks(torch.zeros(4, 2), **arguments)
    with pytest.raises(ValueError, match=r"x: expected shape \[n >= 1, d\]"):
        train_residual_codebooks(torch.zeros(0, 2), 1, 2)
    with pytest.raises(TypeError, match="x: expected float32 or float64"):
        train_residual_codebooks(torch.zeros(4, 2, dtype=torch.float16), 1, 2)
    with pytest.raises(ValueError, match="x: expected finite values"):
        train_residual_codebooks(torch.full((4, 2), torch.nan), 1, 2)


def test_perplexity() -> None:
    assert float(perplexity(torch.tensor([0, 1, 2, 3]), 8)) == pytest.approx(4)
    assert float(perplexity(torch.tensor([5, 5, 5]), 8)) == pytest.approx(1)
    assert float(perplexity(torch.zeros(0, dtype=torch.int64), 8)) == pytest.approx(1)
