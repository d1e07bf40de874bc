"""Content vectors of an items table: which rows have one, and a sample of them in memory."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import InputError
from alure.engine.tables import open_dataset, readable

BATCH_ROWS = 8_192
MOST_BAD = 0.05  # share of the vectors that may be unusable, as in `ingest`
REMEDY = "such items get no semantic ids; repair them, or name another column with --dense"


@dataclass
class Rows:
    """How many rows there are, and why some have no usable vector."""

    items: int = 0
    usable: int = 0
    without: int = 0  # null or empty
    wrong_length: int = 0
    not_finite: int = 0

    def add(self, other: "Rows") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def check(self, what: str, width: int) -> None:
        """InputError where more than MOST_BAD of the vectors are unusable, or none is usable."""
        bad, vectors = self.wrong_length + self.not_finite, self.items - self.without
        if bad > MOST_BAD * vectors or (bad and not self.usable):
            raise InputError(
                f"{what}: of {vectors:,} vectors, {self.wrong_length:,} have another length than {width} and "
                f"{self.not_finite:,} hold NaN, infinity or null; expected at most {MOST_BAD:.0%}; {REMEDY}"
            )


@dataclass(frozen=True)
class Sample:
    """Usable vectors of a table."""

    values: np.ndarray  # float32 [n, width]
    rows: Rows


class VectorColumn:
    """The column of vectors of a Parquet file, a folder of them or a Delta table; InputError where it cannot be one."""

    def __init__(self, path: Path, column: str) -> None:
        self.what = f"items: {path}: column {column}"
        self.path, self.column = path, column
        self.data = open_dataset(path, "items", f"a column {column} with lists of floats")
        names = self.data.schema.names
        if column not in names:
            near = difflib.get_close_matches(column, names, 1)
            tip = f"; the nearest is {near[0]!r}" if near else ""
            raise InputError(
                f"items: {path}: expected a column {column} with the content vectors, got "
                f"{', '.join(names) or 'no column'}{tip}; name it with --dense COLUMN"
            )
        kind = self.data.schema.field(column).type
        if not is_vector(kind):
            raise InputError(f"{self.what}: expected lists of floats, got {kind}; name another column with --dense")

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        with readable(self.path, "items"):
            yield from self.data.to_batches(columns=columns, batch_size=BATCH_ROWS)

    def count_rows(self) -> int:
        with readable(self.path, "items"):
            return self.data.count_rows()

    def usual_width(self) -> int:
        """The most frequent length above 0 (the shorter of two equally frequent)."""
        counts: dict[int, int] = {}
        for batch in self.batches([self.column]):
            lengths = pc.list_value_length(batch.column(0)).drop_null().to_numpy(zero_copy_only=False)
            for length, count in zip(*np.unique(lengths[lengths > 0], return_counts=True)):
                counts[int(length)] = counts.get(int(length), 0) + int(count)
        if not counts:
            raise InputError(f"{self.what}: expected content vectors, got only nulls and empty lists")
        return min(counts, key=lambda length: (-counts[length], length))

    def sample(self, width: int, most: int, seed: int) -> Sample:
        """The usable vectors of at most `most` rows, drawn evenly by `seed`, in the table's order."""
        total = self.count_rows()
        chosen = np.ones(total, bool)
        if total > most:
            chosen[np.random.default_rng(seed).choice(total, total - most, replace=False)] = False
        parts, rows, start = [np.empty((0, width), np.float32)], Rows(), 0
        for batch in self.batches([self.column]):
            mine = chosen[start : start + len(batch)]
            start += len(batch)
            values, _, found = to_matrix(batch.column(0).filter(pa.array(mine)), width)
            parts.append(values)
            rows.add(found)
        rows.check(self.what, width)
        return Sample(np.concatenate(parts), rows)


def is_vector(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)


def to_matrix(lists: pa.Array, width: int) -> tuple[np.ndarray, np.ndarray, Rows]:
    """(float32 [m, width], the m rows that are usable among the n of `lists`, the counts)."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    right = np.flatnonzero(lengths == width) if width else np.empty(0, np.int64)
    taken = lists.take(pa.array(right)).cast(pa.large_list(pa.float32()), safe=False)
    values = taken.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, width)
    finite = np.isfinite(values).all(axis=1)
    without = int((lengths == 0).sum())
    counts = Rows(
        items=len(lists),
        usable=int(finite.sum()),
        without=without,
        wrong_length=len(lists) - without - len(right),
        not_finite=len(right) - int(finite.sum()),
    )
    return values[finite], right[finite], counts
