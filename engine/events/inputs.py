"""Which files come in, and whether their columns can be what they should be. Reads footers only."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from alure.engine.errors import InputError

IDS = ("int", "string")
ID_COLUMNS = ("user_id", "item_id", "account_id", "category_id")
EVENT_COLUMNS: dict[str, tuple[str, ...]] = {
    "user_id": IDS,
    "timestamp": ("int", "timestamp"),
    "source": ("string", "int"),
    "item_id": IDS,
    "account_id": IDS,
    "category_id": IDS,
    "country": ("string", "int"),
    "event_type": ("string", "int"),
    "value": ("float", "int"),
    "utc_offset": ("int",),
    "dense": ("list of float", "list of int"),
    "semantic_ids": ("list of int",),
}
ITEM_COLUMNS: dict[str, tuple[str, ...]] = {
    "item_id": IDS,
    "account_id": IDS,
    "category_id": IDS,
    "title": ("string",),
    "dense": ("list of float", "list of int"),
    "semantic_ids": ("list of int",),
}
# Delta reader features that change which rows of a data file count, or what its columns are called
FOREIGN_FEATURES = {"deletionVectors", "columnMapping"}


@dataclass(frozen=True)
class InputFile:
    path: Path
    columns: tuple[tuple[str, pa.DataType], ...]  # the file's own, then its partition columns
    partitions: tuple[str, ...]  # columns that come from the folders' names (key=value)
    identity: tuple[str, int, int]  # path, bytes, mtime in ns


@dataclass(frozen=True)
class FileGroup:
    """Files of one schema, which one SELECT can read."""

    files: tuple[InputFile, ...]
    names: dict[str, str]  # our column name: theirs
    types: dict[str, pa.DataType]  # our column name: type

    @property
    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        return self.files[0].columns


@dataclass(frozen=True)
class Inputs:
    groups: tuple[FileGroup, ...]
    kinds: dict[str, str]  # our column name: int, string, timestamp, float, list of float, list of int
    ignored: tuple[str, ...]  # their columns that nothing reads, sorted
    hints: tuple[str, ...]  # ignored columns that look like a misspelt optional one

    @property
    def files(self) -> list[InputFile]:
        return [file for group in self.groups for file in group.files]


def read_inputs(
    paths: list[Path], known: dict[str, tuple[str, ...]], required: tuple[str, ...], mapping: dict[str, str]
) -> Inputs:
    """Find the files and settle every column's name and kind; InputError names the file and column that cannot be."""
    check_mapping(mapping)
    files = list({file.path.resolve(): file for path in paths for file in find_files(path)}.values())
    if not files:
        raise InputError("input: expected Parquet files, folders of them or Delta tables, got none")
    by_schema: dict[tuple[object, ...], list[InputFile]] = {}
    for file in files:
        by_schema.setdefault((file.columns, file.partitions), []).append(file)
    groups = [match_columns(tuple(members), known, required, mapping) for members in by_schema.values()]
    present = {theirs for group in groups for theirs, _ in group.columns}
    ignored = sorted(present - {theirs for group in groups for theirs in group.names.values()})
    absent = [name for name in known if not any(name in group.names for group in groups)]
    return Inputs(tuple(groups), agree(groups), tuple(ignored), tuple(hint(absent, ignored)))


def check_mapping(mapping: dict[str, str]) -> None:
    known = list(dict.fromkeys([*EVENT_COLUMNS, *ITEM_COLUMNS]))
    for ours in mapping:
        if ours not in known:
            near = nearest(ours, known)
            tip = f"; the nearest is {near}" if near else ""
            raise InputError(f"column mapping: {ours!r} is not a column of the schema ({', '.join(known)}){tip}")


def find_files(path: Path) -> Iterator[InputFile]:
    if not path.exists():
        raise InputError(f"input: {path} does not exist; expected a Parquet file, a folder of them or a Delta table")
    if path.is_file():
        yield describe_file(path, {})
    elif (path / "_delta_log").is_dir():
        yield from find_delta_files(path)
    else:
        found = sorted(p for p in path.rglob("*") if p.suffix in (".parquet", ".parq", ".pq") and p.is_file())
        visible = [p for p in found if not any(part[0] in "._" for part in p.relative_to(path).parts)]
        tables = sorted(log.parent for log in path.rglob("_delta_log") if log.is_dir())
        if not visible and not tables:
            raise InputError(f"input: the folder {path} holds no .parquet file")
        for table in tables:
            yield from find_delta_files(table)
        for file in visible:
            if any(table in file.parents for table in tables):
                continue  # of a table, whose log says which of its files count
            keys = [part.split("=", 1)[0] for part in file.relative_to(path).parts[:-1] if "=" in part]
            yield describe_file(file, dict.fromkeys(keys, pa.string()))


def check_delta_path(path: Path) -> None:
    """delta-rs panics on these two characters; say so instead."""
    if set("[]") & set(str(path.resolve())):
        raise InputError(f"{path}: a Delta table cannot lie under a path with [ or ] in it; rename the folder")


def find_delta_files(path: Path) -> Iterator[InputFile]:
    check_delta_path(path)
    try:
        table = DeltaTable(path)
        foreign = FOREIGN_FEATURES & set(table.protocol().reader_features or [])
        listed = sorted(pa.table(table.get_add_actions(flatten=True)).to_pylist(), key=lambda file: file["path"])
        fields = {field.name: field.type for field in table.schema().fields}
        keys = table.metadata().partition_columns
    except DeltaError as error:
        raise InputError(f"input: the Delta table {path} cannot be read: {error}") from None
    if foreign:
        raise InputError(
            f"input: the Delta table {path} uses {', '.join(sorted(foreign))}, which is not supported; "
            "rewrite it without (for deletion vectors: REORG TABLE ... APPLY (PURGE), then drop the feature)"
        )
    if not listed:
        raise InputError(f"input: the Delta table {path} has no rows")
    whole = ("long", "integer", "short", "byte")
    types = {k: pa.int64() if getattr(fields[k], "type", "") in whole else pa.string() for k in keys}
    for stored in listed:  # relative to the table (or a file: URL), percent-encoded as Delta's protocol has it
        file = path / unquote(stored["path"]).removeprefix("file://")
        check_partition_folders(file, {key: stored[f"partition.{key}"] for key in keys})
        yield describe_file(file, types)


def check_partition_folders(file: Path, values: dict[str, object]) -> None:
    """DuckDB reads partition values from the folders' names; what counts in Delta is the log."""
    named = dict(part.split("=", 1) for part in file.parts[:-1] if "=" in part)
    for key, value in values.items():
        folder = named.get(key)
        differs = type(value) in (str, int) and folder is not None and unquote(folder) != str(value)
        if folder is None or differs:
            raise InputError(
                f"input: {file}: expected a folder {key}={value}, as the Delta table's log has it; "
                "write the table anew with its partitions in folders of these names"
            )


def describe_file(path: Path, partitions: dict[str, pa.DataType]) -> InputFile:
    try:
        schema = pq.read_schema(path)
        stat = path.stat()
    except FileNotFoundError:
        raise InputError(f"input: {path} does not exist, though its table lists it") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"input: {path} is not a readable Parquet file: {first_line(error)}") from None
    own = tuple((field.name, plain(field.type)) for field in schema)
    lower = [name.lower() for name, _ in own]
    extra = {name: type_ for name, type_ in partitions.items() if name.lower() not in lower}
    identity = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    return InputFile(path, own + tuple(extra.items()), tuple(extra), identity)


def plain(type_: pa.DataType) -> pa.DataType:
    """The type that counts: a dictionary's values; the name of a list's element does not matter."""
    if pa.types.is_dictionary(type_):
        return plain(type_.value_type)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return pa.list_(plain(type_.value_type))
    return type_


def kind_of(type_: pa.DataType) -> str:
    if pa.types.is_integer(type_):
        return "int"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "string"
    if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "float"
    if pa.types.is_timestamp(type_):
        return "timestamp"
    if pa.types.is_list(type_):
        return f"list of {kind_of(type_.value_type)}"
    return "null" if pa.types.is_null(type_) else str(type_)


def match_columns(
    files: tuple[InputFile, ...], known: dict[str, tuple[str, ...]], required: tuple[str, ...], mapping: dict[str, str]
) -> FileGroup:
    file = files[0]
    theirs = dict(file.columns)
    names: dict[str, str] = {}
    for ours, kinds in known.items():
        wanted = mapping.get(ours, ours)
        if wanted not in theirs:
            if ours in required or ours in mapping:
                taken = {mapping.get(name, name) for name in known}
                raise InputError(missing_column(file, ours, wanted, taken))
            continue
        twins = [name for name in theirs if name.lower() == wanted.lower()]
        if len(twins) > 1:
            raise InputError(f"{file.path}: columns {' and '.join(twins)} differ only in case; rename one")
        kind = kind_of(theirs[wanted])
        if kind not in (*kinds, "null") and not (kind == "list of null" and kinds[0].startswith("list")):
            tip = "; convert it to int64 seconds or to a timestamp" if ours == "timestamp" else ""
            raise InputError(
                f"{file.path}: column {wanted}: expected {' or '.join(kinds)} for {ours}, got {theirs[wanted]}{tip}"
            )
        names[ours] = wanted
    return FileGroup(files, names, {ours: theirs[name] for ours, name in names.items()})


def missing_column(file: InputFile, ours: str, wanted: str, taken: set[str]) -> str:
    """taken: columns that are something else already."""
    theirs = [name for name, _ in file.columns]
    mapped = f" (mapped from {ours})" if wanted != ours else ""
    near = nearest(wanted, [name for name in theirs if name not in taken])
    tip = f"the nearest is {near}: use --map {ours}={near}" if near else f"name it with --map {ours}=COLUMN"
    tip += f" (in a configuration, events.columns: {{{ours}: {near or 'COLUMN'}}})"
    return f"{file.path}: column {wanted}{mapped} is missing; the file has {', '.join(theirs) or 'no column'}; {tip}"


def nearest(wanted: str, names: list[str]) -> str | None:
    lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(wanted.lower(), list(lower), n=1, cutoff=0.5)
    return lower[found[0]] if found else None


def agree(groups: list[FileGroup]) -> dict[str, str]:
    """Each column's kind. Ids must be of one kind in all files, or they would never meet; the rest is converted."""
    kinds: dict[str, tuple[str, FileGroup]] = {}
    for group in groups:
        for ours, type_ in group.types.items():
            kind = kind_of(type_)
            if "null" in kind:
                continue
            first, other = kinds.setdefault(ours, (kind, group))
            if first != kind and ours in ID_COLUMNS:
                raise InputError(
                    f"column {ours} has mixed types: {first} in {other.files[0].path}, {kind} in "
                    f"{group.files[0].path}; convert one of them"
                )
    return {ours: kind for ours, (kind, _) in kinds.items()}


def hint(absent: list[str], ignored: list[str]) -> Iterator[str]:
    for ours in absent:
        found = difflib.get_close_matches(ours, ignored, n=1, cutoff=0.8)
        if found:
            yield f"column {found[0]} is not read; if it is {ours}, use --map {ours}={found[0]}"


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
