"""Columns of a Parquet file, a folder of them or a Delta table that a user names, with errors that say what to do."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import DeltaTable

from alure.engine.errors import InputError


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """InputError where the block fails to read `path`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{what}: {path} cannot be read as Parquet: {error}") from None


def open_dataset(path: Path, what: str, expected: str) -> ds.Dataset:
    """What lies at `path`, nothing of it read yet. what: the option, expected: of the table, both for errors."""
    if not path.exists():
        raise InputError(f"{what}: {path} does not exist; expected Parquet or Delta with {expected}")
    with readable(path, what):
        if path.is_dir() and DeltaTable.is_deltatable(str(path)):
            return DeltaTable(str(path)).to_pyarrow_dataset()
        return ds.dataset(path, format="parquet")


def read_columns(path: Path, what: str, required: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """The columns of `required`, and those of `optional` that are there. what: the option, for errors.

    Raises InputError for a missing or unreadable file, and for a missing column (naming the nearest).
    """
    data = open_dataset(path, what, " and ".join(required))
    names = data.schema.names
    for wanted in required:
        if wanted not in names:
            near = difflib.get_close_matches(wanted, names, 1)
            hint = f"; the nearest is {near[0]!r}, rename it" if near else ""
            raise InputError(f"{what}: {path}: expected a column {wanted}, got {', '.join(names) or 'none'}{hint}")
    with readable(path, what):
        return data.to_table(columns=[*required, *(name for name in optional if name in names)])


def ids_as(table: pa.Table, name: str, wanted: pa.DataType, what: str, whose: str) -> pa.ChunkedArray:
    """The id column `name` in the type `wanted` of `whose` ids; InputError for ids of another kind."""
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    fits = pa.types.is_integer(kind) if pa.types.is_integer(wanted) else is_text
    if not fits and not pa.types.is_null(kind):
        raise InputError(
            f"{what}: column {name}: expected ids of type {wanted} as {whose}, got {kind}; cast the column"
        )
    return table[name].cast(wanted)
