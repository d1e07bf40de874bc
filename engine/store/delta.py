"""One Delta table on disk: created on first write, appended to exactly once a key, streamed into, scanned."""

import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs
from deltalake import CommitProperties, DeltaTable, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError

from alure.engine.errors import AlureError, InputError

COMMIT_ATTEMPTS = 50  # each after losing a race to another commit, so some writer gains with every one


class DataTable:
    """A Delta table. Its schema is that of the first write (the type of ids is the input's), then it is fixed."""

    def __init__(self, path: Path, partition_by: list[str], row_group_rows: int = 65_536) -> None:
        self.path = path
        self.partition_by = partition_by
        self.writer = WriterProperties(compression="ZSTD", compression_level=1, max_row_group_size=row_group_rows)

    def exists(self) -> bool:
        return DeltaTable.is_deltatable(str(self.path))

    def open(self) -> DeltaTable:
        return DeltaTable(str(self.path))

    def schema(self) -> pa.Schema:
        return pa.schema(self.open().schema().to_arrow(as_large_types=False))

    def ensure(self, schema: pa.Schema) -> None:
        """Create the table, or raise InputError where it exists with other columns or types."""
        if not self.exists():
            DeltaTable.create(str(self.path), schema, mode="ignore", partition_by=self.partition_by)
        have = self.schema()
        for field in schema:
            place = have.get_field_index(field.name)
            if place < 0 or not _same_type(have.field(place).type, field.type):
                found = "no such column" if place < 0 else str(have.field(place).type)
                raise InputError(
                    f"{self.path}: column {field.name}: the store has {found}, this write has {field.type}; "
                    "use another store for data of another shape"
                )

    def has(self, app_id: str) -> bool:
        return self.exists() and self.open().transaction_version(app_id) is not None

    def append_once(self, data: pa.Table, app_id: str) -> bool:
        """Append `data` in one commit unless a commit with `app_id` is there already; whether it was appended.

        Two writers of one `app_id` may race: Delta lets one commit, the other sees it here and returns False.
        """
        self.ensure(data.schema)
        for _ in range(COMMIT_ATTEMPTS):
            table = self.open()
            if table.transaction_version(app_id) is not None:
                return False
            once = CommitProperties(app_transactions=[Transaction(app_id, 1)])
            try:
                write_deltalake(table, data, mode="append", commit_properties=once, writer_properties=self.writer)
            except CommitFailedError:
                continue
            return True
        raise AlureError(f"{self.path}: lost {COMMIT_ATTEMPTS} races to commit {app_id}; run again")

    def append_stream(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        """Append all `batches` in one commit and return the number of rows; nothing is committed if `batches` raises.

        The writer has its own thread: it compresses one batch while the caller's iterator makes the next, and signals
        reach the main thread between batches.
        """
        self.ensure(schema)
        waiting: queue.Queue[object] = queue.Queue(maxsize=2)
        reader = pa.RecordBatchReader.from_batches(schema, _handed_over(waiting))
        rows = 0
        with ThreadPoolExecutor(1, thread_name_prefix=f"write {self.path.name}") as pool:
            write = pool.submit(write_deltalake, str(self.path), reader, mode="append", writer_properties=self.writer)
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
            write.result()
        return rows

    def delete(self, predicate: str) -> None:
        """Remove whole partitions (no file is rewritten); losing a race to an append is retried by Delta itself."""
        self.open().delete(predicate)

    def dataset(self, snapshot: DeltaTable | None = None) -> ds.Dataset:
        """The rows of a snapshot (None: of now).

        Read by Arrow's own file system: Delta's is in Python, and threads of Arrow that still hold its files when the
        interpreter ends abort the process.
        """
        local = fs.SubTreeFileSystem(str(self.path.resolve()), fs.LocalFileSystem())
        return (snapshot or self.open()).to_pyarrow_dataset(filesystem=local)

    def scan(self, where: ds.Expression, columns: list[str], batch_rows: int = 32_768) -> Iterator[pa.RecordBatch]:
        """The rows of `where` in no particular order, at most `batch_rows` at a time; little is read ahead."""
        scanner = (
            self.open()
            .to_pyarrow_dataset()
            .scanner(columns=columns, filter=where, batch_size=batch_rows, batch_readahead=2, fragment_readahead=1)
        )
        for batch in scanner.to_batches():
            if batch.num_rows:
                yield batch

    def table(self, where: ds.Expression, columns: list[str]) -> pa.Table:
        return self.dataset().to_table(columns=columns, filter=where)

    def count(self, where: ds.Expression) -> int:
        return self.dataset().count_rows(filter=where)


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
