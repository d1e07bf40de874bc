"""Columns of a Parquet file, a folder of them or a Delta table that a user names, with errors that say what to do."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from alure.engine.errors import InputError


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """InputError where the block fails to read `path`."""
    try:
        yield
    except (pa.ArrowException, DeltaError, OSError) as error:
        raise InputError(f"{what}: {path} cannot be read as Parquet or Delta: {error}") from None


def open_dataset(path: Path, what: str, expected: str) -> ds.Dataset:
    """What lies at `path`, nothing of it read yet, with the columns of all its files and, as text, those that folders
    are named by (country=DE). what: the option, expected: of the table, both for errors.
    """
    if not path.exists():
        raise InputError(f"{what}: {path} does not exist; expected Parquet or Delta with {expected}")
    with readable(path, what):
        if path.is_dir() and DeltaTable.is_deltatable(str(path)):
            return DeltaTable(str(path)).to_pyarrow_dataset()
        files = ds.dataset(path, format="parquet")
        schemas = [files.schema, *(fragment.physical_schema for fragment in files.get_fragments())]
        typed_last = sorted((f for schema in reversed(schemas) for f in schema), key=lambda f: f.type != pa.null())
        columns = {field.name: field for field in typed_last}
        folders = (folder for file in files.files for folder in Path(file).relative_to(path).parent.parts)
        keys = dict.fromkeys(folder.split("=", 1)[0] for folder in folders if "=" in folder)
        named = pa.schema([(key, pa.string()) for key in keys if key not in columns])
        data = ds.dataset(path, format="parquet", partitioning=ds.partitioning(named, flavor="hive"))
        return data.replace_schema(pa.schema([*columns.values(), *named]))


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
    """The id column `name` in the type `wanted` of `whose` ids, null where it is an integer too large for that, which
    is nobody's; InputError for ids of another kind.
    """
    kind = table.schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    fits = pa.types.is_integer(kind) if pa.types.is_integer(wanted) else is_text
    if not fits and not pa.types.is_null(kind):
        raise InputError(
            f"{what}: column {name}: expected ids of type {wanted} as {whose}, got {kind}; cast the column"
        )
    return within_int64(table[name]).cast(wanted)


def within_int64(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers too large for int64, in which no id of ours is, become null; other columns stay."""
    if not pa.types.is_uint64(ids.type):
        return ids
    return pc.if_else(pc.greater(ids, pa.scalar(2**63 - 1, ids.type)), pa.scalar(None, ids.type), ids)


def texts_as(table: pa.Table, name: str, what: str) -> pa.ChunkedArray:
    """A column of names as strings; InputError where it is neither text nor whole numbers."""
    kind = table.schema.field(name).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_nested(values) or pa.types.is_floating(values):
        raise InputError(f"{what}: column {name}: expected text or whole numbers, got {kind}; cast the column")
    return table[name].cast(pa.string())
