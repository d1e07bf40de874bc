"""Offsets and timestamps are checked before anything reads through them; jagged input of other libraries is read."""

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alure.kernels.jagged import check_offsets, check_timestamps, segment_ids, tile_list, to_jagged


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@given(lengths=st.lists(st.integers(0, 9), max_size=8), wide=st.booleans())
def test_offsets_of_any_lengths_pass(lengths: list[int], wide: bool) -> None:
    check_offsets(offsets_of(lengths).to(torch.int64 if wide else torch.int32), sum(lengths))


@given(numbers=st.lists(st.integers(-3, 6), min_size=1, max_size=6), total=st.integers(0, 6))
def test_offsets_pass_exactly_when_they_tile_the_rows(numbers: list[int], total: int) -> None:
    sound = numbers[0] == 0 and numbers[-1] == total and sorted(numbers) == numbers
    if sound:
        check_offsets(torch.tensor(numbers), total)
    else:
        with pytest.raises(ValueError, match="expected"):
            check_offsets(torch.tensor(numbers), total)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 2], TypeError, "offsets: expected a torch.Tensor, got list"),
        (torch.tensor([0.0, 2.0]), TypeError, "expected int32 or int64, got torch.float32"),
        (torch.tensor([0, 2], dtype=torch.uint8), TypeError, "expected int32 or int64"),
        (torch.tensor([0, 2], dtype=torch.bool), TypeError, "expected int32 or int64"),
        (torch.tensor(2), ValueError, r"expected shape \[batch \+ 1\], got \[\]"),
        (torch.tensor([[0, 2]]), ValueError, r"got \[1, 2\]"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"got \[0\]"),
        (torch.tensor([1, 2]), ValueError, "first offset to be 0, got 1"),
        (torch.tensor([0, 3, 2]), ValueError, r"offsets\[1\] = 3 > offsets\[2\] = 2"),
        (torch.tensor([0, 1]), ValueError, "number of rows, 2, got 1"),
        (torch.tensor([0, 2**40]), ValueError, "number of rows, 2, got 1099511627776"),
        (torch.tensor([0, 2**31 - 1, 2], dtype=torch.int32), ValueError, "never decrease"),
    ],
)
def test_hostile_offsets(offsets: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_offsets(offsets, 2)


def test_decreasing_steps_that_wrap_are_seen() -> None:
    """Differences that leave the type must not hide a fall."""
    for dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(dtype)
        for beyond, behind in ((limits.max, limits.min), (4, limits.min + 3)):  # the second: every step wraps to >= 0
            with pytest.raises(ValueError, match="expected offsets that never decrease"):
                check_offsets(torch.tensor([0, beyond, behind, 2], dtype=dtype), 2)


def test_offsets_elsewhere() -> None:
    with pytest.raises(ValueError, match="expected a tensor on meta, got one on cpu"):
        check_offsets(torch.tensor([0, 2]), 2, device=torch.device("meta"))


def test_offsets_name_the_argument() -> None:
    with pytest.raises(ValueError, match="k_offsets: expected the last offset"):
        check_offsets(torch.tensor([0, 2]), 3, "k_offsets")


@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    numbers=st.lists(st.integers(-(2**62), 2**62), min_size=30, max_size=30),
)
def test_timestamps_pass_exactly_when_sorted_in_each_sequence(lengths: list[int], numbers: list[int]) -> None:
    total, offsets = sum(lengths), offsets_of(lengths)
    numbers = numbers[:total]
    parts = [numbers[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]
    times = torch.tensor(numbers, dtype=torch.int64)
    if all(sorted(part) == part for part in parts):
        check_timestamps(times, offsets, total)
    else:
        with pytest.raises(ValueError, match="never decrease within a sequence"):
            check_timestamps(times, offsets, total)
    ordered = torch.tensor([t for part in parts for t in sorted(part)], dtype=torch.int64)
    check_timestamps(ordered, offsets, total)


def test_unsorted_timestamps_say_where() -> None:
    with pytest.raises(ValueError, match="got 9 at row 3 and 8 after it"):
        check_timestamps(torch.tensor([5, 6, 1, 9, 8]), torch.tensor([0, 2, 2, 5]), 5)


@pytest.mark.parametrize(
    ("times", "error", "message"),
    [
        (torch.tensor([1.0, 2.0]), TypeError, "float32 rounds seconds of this decade"),
        (torch.tensor([1, 2], dtype=torch.int32), TypeError, "expected int64 unix seconds"),
        (torch.tensor([1]), ValueError, r"expected shape \[2\], got \[1\]"),
        (torch.tensor([1, 2]).to("meta"), ValueError, "expected a tensor on cpu"),
        ([1, 2], TypeError, "expected a torch.Tensor, got list"),
    ],
)
def test_hostile_timestamps(times: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_timestamps(times, torch.tensor([0, 2]), 2)


@given(lengths=st.lists(st.integers(0, 40), max_size=8), block=st.integers(1, 16))
def test_tiles_cover_every_row_once(lengths: list[int], block: int) -> None:
    offsets = offsets_of(lengths)
    sequences, starts = tile_list(offsets, block)
    assert sequences.dtype == starts.dtype == torch.int32
    rows = [
        int(offsets[s]) + row
        for s, start in zip(sequences.tolist(), starts.tolist())
        for row in range(start, min(start + block, lengths[s]))
    ]
    assert rows == list(range(sum(lengths)))
    ids = segment_ids(offsets, sum(lengths))
    assert ids.tolist() == [s for s, length in enumerate(lengths) for _ in range(length)]


def test_pair() -> None:
    values, offsets = to_jagged((torch.arange(3), torch.tensor([0, 1, 3])))
    assert values.tolist() == [0, 1, 2]
    assert offsets.tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="number of rows, 3, got 2"):
        to_jagged((torch.arange(3), torch.tensor([0, 2])))


def test_nested_jagged_tensor() -> None:
    parts = [torch.randn(2, 3), torch.randn(0, 3), torch.randn(4, 3)]
    values, offsets = to_jagged(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert torch.equal(values, torch.cat(parts))
    assert offsets.tolist() == [0, 2, 2, 6]


class KeyedJagged:
    """What is used of a TorchRec KeyedJaggedTensor."""

    def values(self) -> Tensor:
        return torch.arange(5)

    def offsets(self) -> Tensor:
        return torch.tensor([0, 2, 5], dtype=torch.int32)


def test_keyed_jagged_tensor() -> None:
    values, offsets = to_jagged(KeyedJagged())
    assert values.tolist() == [0, 1, 2, 3, 4]
    assert offsets.tolist() == [0, 2, 5]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())], ids=["list", "large_list"])
def test_arrow_lists(kind: pa.DataType) -> None:
    lists = [[1, 2], [], [3, 4, 5], [6]]
    array = pa.array(lists, kind)
    for begin, end in ((0, 4), (1, 4), (2, 3), (0, 0)):
        values, offsets = to_jagged(array.slice(begin, end - begin))
        expected = lists[begin:end]
        assert values.tolist() == [x for part in expected for x in part]
        assert offsets.tolist() == offsets_of([len(part) for part in expected]).tolist()


def test_a_column_of_an_arrow_table() -> None:
    column = pa.chunked_array([[[1, 2]], [[], [3]]], pa.list_(pa.int64()))
    values, offsets = to_jagged(column)
    assert values.tolist() == [1, 2, 3]
    assert offsets.tolist() == [0, 2, 2, 3]
    assert to_jagged(column.slice(0, 0))[1].tolist() == [0]


STRINGS, MOMENTS = pa.array([["a"]]), pa.array([[1]], pa.list_(pa.timestamp("s")))
PAIRS = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))


@pytest.mark.parametrize(
    "other",
    [[1, 2], torch.arange(3), {"values": 1}, pa.array([1, 2]), ([1], [0, 1]), STRINGS, MOMENTS, PAIRS],
    ids=["list", "tensor", "dict", "numbers", "lists", "strings", "moments", "pairs"],
)
def test_other_things_are_refused(other: object) -> None:
    with pytest.raises(TypeError, match=r"expected .*, got"):
        to_jagged(other)


@pytest.mark.parametrize("lists", [[[1], None, [2, 3]], [[1, None], [2]]], ids=["null list", "null value"])
def test_arrow_nulls_are_refused(lists: list) -> None:
    with pytest.raises(ValueError, match="null"):
        to_jagged(pa.array(lists, pa.list_(pa.int64())))
