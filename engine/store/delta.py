"""One Delta table: created on first write, appended to exactly once a key, streamed into, scanned."""

import math
import os
import queue
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as ds
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    Field,
    Transaction,
    WriterProperties,
    write_deltalake,
)
from deltalake.exceptions import CommitFailedError, DeltaError

from alure.engine.errors import AlureError, InputError
from alure.engine.store.location import Location, filesystem, half_written, storage_options
from alure.engine.store.s3 import without_xml
from alure.engine.store.transactions import read_transactions

COMMIT_ATTEMPTS = 50  # each after losing a race to another commit, so some writer gains with every one


class DataFile(NamedTuple):
    path: str  # relative to the table's folder
    size_bytes: int
    written_at: float  # unix seconds
    partition: dict[str, str]


class DataTable:
    """A Delta table. Its schema is that of the first write (the type of ids is the input's), then it is fixed but for
    `later` columns, which a table made by a version before gets with its next write; its old rows have null there.
    """

    def __init__(
        self, path: Location, partition_by: list[str], row_group_rows: int = 65_536, later: tuple[str, ...] = ()
    ) -> None:
        self.path, self.later = path, later
        self.partition_by = partition_by
        self.row_group_rows = row_group_rows

    def exists(self) -> bool:
        with reading(self.path):
            return DeltaTable.is_deltatable(str(self.path), storage_options(self.path))

    def open(self) -> DeltaTable:
        with reading(self.path):
            return DeltaTable(str(self.path), storage_options=storage_options(self.path))

    def newest_commit(self) -> tuple[str, int, int] | None:
        """Of a table on a disk (name, inode, time) of its log's last file, as no other state has it; else None."""
        if not isinstance(self.path, Path):
            return None
        try:
            with os.scandir(self.path / "_delta_log") as entries:
                last = max((e for e in entries if e.name.endswith(".json")), key=lambda e: e.name, default=None)
            return None if last is None else (last.name, last.stat().st_ino, last.stat().st_mtime_ns)
        except OSError:  # opening the table says why
            return None

    def schema(self) -> pa.Schema:
        return _schema_of(self.open())

    def ensure(self, schema: pa.Schema) -> DeltaTable:
        """A snapshot, of the table made where there is none. InputError where it has other columns or types."""
        table = self.open() if self.exists() else self._create(schema)
        have = _schema_of(table)
        missing = [field for field in schema if field.name in self.later and field.name not in have.names]
        if missing:
            table = self._add(table, missing)
            have = _schema_of(table)
        for field in schema:
            place = have.get_field_index(field.name)
            if place < 0 or not _same(have.field(place), field):
                found = "no such column" if place < 0 else _described(have.field(place))
                raise InputError(
                    f"{self.path}: column {field.name}: the store has {found}, this write has {_described(field)}; "
                    "use another store for data of another shape"
                )
        return table

    def _create(self, schema: pa.Schema) -> DeltaTable:
        """The table, or that of another process that was first."""
        try:
            return DeltaTable.create(
                str(self.path),
                schema,
                mode="ignore",
                partition_by=self.partition_by,
                storage_options=storage_options(self.path),
                commit_properties=CommitProperties(max_commit_retries=0),  # a retry would define the table anew
            )
        except (DeltaError, OSError) as error:
            if self.exists():
                return self.open()
            raise refused(self.path, error) from error

    def _add(self, table: DeltaTable, missing: list[pa.Field]) -> DeltaTable:
        """With these columns too, whichever process adds them."""
        for _ in range(COMMIT_ATTEMPTS):
            try:
                table.alter.add_columns([Field.from_arrow(field) for field in missing])
            except CommitFailedError:
                table = self.open()
            except (DeltaError, OSError) as error:
                raise refused(self.path, error) from error
            if {field.name for field in missing} <= set(_schema_of(table).names):
                return table
        raise AlureError(f"{self.path}: lost {COMMIT_ATTEMPTS} races to add a column; run again")

    def written(self, group: str, parts: Sequence[str]) -> set[str]:
        """Those of `parts` that `append_once` wrote to the group, from one snapshot."""
        if not self.exists():
            return set()
        known = self.transactions(self.open())
        version = known.get(_removal(group), 0) + 1
        return {part for part in parts if known.get(f"{group}/{part}") == version}

    def append_once(self, data: pa.Table, group: str, part: str) -> bool:
        """Append `data` in one commit unless this part of the group is there already; whether it was appended.

        Two writers of one part may race: Delta lets one commit, the other sees it here and returns False.
        """
        table, app_id = self.ensure(data.schema), f"{group}/{part}"
        for _ in range(COMMIT_ATTEMPTS):
            known = self.transactions(table)
            version = known.get(_removal(group), 0) + 1
            if known.get(app_id) == version:
                return False
            once = CommitProperties(app_transactions=[Transaction(app_id, version)])
            if self.commit(table, data, once):
                return True
            table = self.open()
        raise AlureError(f"{self.path}: lost {COMMIT_ATTEMPTS} races to commit {app_id}; run again")

    def commit(self, table: DeltaTable, data: pa.Table, properties: CommitProperties) -> bool:
        """Append `data` to a snapshot; False where another commit was first. AlureError where the disk refuses."""
        try:
            writer = writer_properties(data.schema, self.row_group_rows)
            write_deltalake(table, data, mode="append", commit_properties=properties, writer_properties=writer)
        except CommitFailedError:
            return False
        except (DeltaError, OSError) as error:
            raise refused(self.path, error) from error
        return True

    def remove(self, group: str, **partition: str) -> None:
        """Remove a partition, which is the whole of a group; the group's parts then count as not written."""
        table = self.open()
        removals = self.transactions(table).get(_removal(group), 0)
        removed = CommitProperties(app_transactions=[Transaction(_removal(group), removals + 1)])
        table.delete(_predicate(partition), commit_properties=removed)

    def delete(self, **partition: str) -> None:
        """Remove a partition (no file is rewritten); losing a race to an append is retried by Delta itself."""
        self.open().delete(_predicate(partition))

    def transactions(self, snapshot: DeltaTable) -> dict[str, int]:
        """{application: version}. Parts of a group that was removed since have an earlier one than is asked for."""
        with reading(self.path):
            return read_transactions(filesystem(self.path), snapshot.version())

    def append_stream(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        """Append all `batches` in one commit and return the number of rows; nothing is committed if `batches` raises.

        The writer has its own thread: it compresses one batch while the caller's iterator makes the next, and signals
        reach the main thread between batches.
        """
        table = self.ensure(schema)
        waiting: queue.Queue[object] = queue.Queue(maxsize=2)
        reader = pa.RecordBatchReader.from_batches(schema, _handed_over(waiting))
        rows = 0
        with ThreadPoolExecutor(1, thread_name_prefix=f"write {self.path.name}") as pool:
            writer = writer_properties(schema, self.row_group_rows)
            write = pool.submit(write_deltalake, table, reader, mode="append", writer_properties=writer)
            try:
                for batch in batches:
                    rows += batch.num_rows
                    if not _put(waiting, batch, write):
                        break
                _put(waiting, _END, write)
            except BaseException:
                _put(waiting, _ABANDON, write)
                wait([write])  # it fails, by design, without a commit
                raise
            try:
                write.result()
            except (DeltaError, OSError) as error:
                raise refused(self.path, error) from error
        return rows

    def files(self, **partition: str) -> list["DataFile"]:
        """What the table is made of now, of one partition where it is given."""
        if not self.exists():
            return []
        rows = pa.table(self.open().get_add_actions(flatten=True)).to_pylist()
        wanted = {f"partition.{column}": value for column, value in partition.items()}
        return [
            DataFile(unquote(row["path"]), row["size_bytes"], row["modification_time"] / 1e3, _partition(row))
            for row in rows
            if wanted.items() <= row.items()
        ]

    def vacuum(self, grace_hours: float, dry_run: bool) -> list[str]:
        """Delete files that no snapshot of the last `grace_hours` reads, and what writers that died left half written.

        Returns their paths, relative to the table's folder.
        """
        if not self.exists():
            return []
        before = time.time() - 3600 * grace_hours
        torn = half_written(self.path, before)
        if not dry_run:
            for path in torn:
                with suppress(FileNotFoundError):
                    filesystem(self.path).delete_file(path)
        hours = math.ceil(grace_hours)
        unread = self.open().vacuum(hours, dry_run, enforce_retention_duration=False, full=True)
        return [*unread, *torn]

    def dataset(self, snapshot: DeltaTable | None = None) -> ds.Dataset:
        """The rows of a snapshot (None: of now).

        Read by Arrow's own file system: Delta's is in Python, and threads of Arrow that still hold its files when the
        interpreter ends abort the process.
        """
        return (snapshot or self.open()).to_pyarrow_dataset(filesystem=filesystem(self.path))

    def part(self, where: ds.Expression) -> ds.Dataset:
        """The files of now that `where` does not rule out by their partition, as a dataset to be read many times."""
        all_files = self.dataset()
        chosen = list(all_files.get_fragments(where))
        return ds.FileSystemDataset(chosen, all_files.schema, all_files.format, all_files.filesystem)

    def scan(self, where: ds.Expression, columns: list[str], batch_rows: int = 32_768) -> Iterator[pa.RecordBatch]:
        """The rows of `where` now, in no particular order, at most `batch_rows` at a time; little is read ahead."""
        limits = {"batch_size": batch_rows, "batch_readahead": 2, "fragment_readahead": 1}
        batches = self.dataset().scanner(columns=columns, filter=where, **limits).to_batches()
        return (batch for batch in batches if batch.num_rows)

    def table(self, where: ds.Expression, columns: list[str]) -> pa.Table:
        return self.dataset().to_table(columns=columns, filter=where)

    def count(self, where: ds.Expression) -> int:
        return self.dataset().count_rows(filter=where)


def refused(path: Location, error: Exception) -> AlureError:
    """What a failed write says."""
    said = in_one_line(error)
    return AlureError(f"{path}: nothing was committed: {said}; run the same command again once that is mended")


@contextmanager
def reading(path: Location) -> Iterator[None]:
    """Turns the error of a disk or a server that cannot be read into ours."""
    try:
        yield
    except OSError as error:
        raise AlureError(f"{path}: cannot be read: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """Without the library's colours and a server's XML."""
    return without_xml(re.sub(r"\x1b\[[0-9;]*m", "", str(error)))


def _schema_of(table: DeltaTable) -> pa.Schema:
    return pa.schema(table.schema().to_arrow(as_large_types=False))


def _partition(row: dict[str, Any]) -> dict[str, str]:
    return {key.removeprefix("partition."): value for key, value in row.items() if key.startswith("partition.")}


def _predicate(partition: dict[str, str]) -> str:
    return " AND ".join(f"{column} = '{value.replace(chr(39), chr(39) * 2)}'" for column, value in partition.items())


def _removal(group: str) -> str:
    return f"{group}/removed"


def writer_properties(schema: pa.Schema, row_group_rows: int) -> WriterProperties:
    """How Parquet is written. Lists, which the writer cannot be told of by name, take the default, others are named.

    Bytes, for which Parquet would take 4 each, come as places in a dictionary of 256. Of floats alone the first bytes
    of all values lie together, then the second, …: those of few digits then compress to half.
    """
    lists = {field.type.value_type for field in schema if pa.types.is_list(field.type)}
    plain = of_lists = _column("PLAIN")
    if pa.int8() in lists:
        of_lists = _column(None)
    elif lists == {pa.float32()}:
        of_lists = _column("BYTE_STREAM_SPLIT")
    return WriterProperties(
        compression="ZSTD",
        compression_level=1,
        max_row_group_size=row_group_rows,
        default_column_properties=of_lists,
        column_properties={field.name: plain for field in schema if not pa.types.is_list(field.type)},
    )


def _column(encoding: Literal["PLAIN", "BYTE_STREAM_SPLIT"] | None) -> ColumnProperties:
    """None: a dictionary."""
    return ColumnProperties(dictionary_enabled=encoding is None, statistics_enabled="CHUNK", encoding=encoding)


def _same(a: pa.Field, b: pa.Field) -> bool:
    return _same_type(a.type, b.type) and (a.metadata or {}) == (b.metadata or {})


def _described(field: pa.Field) -> str:
    notes = [f"{name.decode()} {value.decode()}" for name, value in (field.metadata or {}).items()]
    return " with ".join([str(field.type), *notes])


def _same_type(a: pa.DataType, b: pa.DataType) -> bool:
    """Whether types agree; a list's element has another name in Arrow than in Delta."""
    if pa.types.is_list(a) and pa.types.is_list(b):
        return _same_type(a.value_type, b.value_type)
    return a == b


_END, _ABANDON = object(), object()


class _Abandoned(Exception):
    """Raised inside the writer's input so that it stops without a commit."""


def _put(waiting: "queue.Queue[object]", thing: object, write: "Future[None]") -> bool:
    """Hand over to the writer; False where it has stopped reading."""
    while not write.done():
        try:
            waiting.put(thing, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def _handed_over(waiting: "queue.Queue[object]") -> Iterator[pa.RecordBatch]:
    while (thing := waiting.get()) is not _END:
        if thing is _ABANDON:
            raise _Abandoned
        yield thing
