"""A table that is written whole: all rows of one write carry its write_id, and its publication names the write_id.

So a rewrite replaces the old rows at the stroke of its publication, and rows of a write that died are never read.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from alure.engine.errors import AlureError, InputError
from alure.engine.store.checksums import Checksums
from alure.engine.store.delta import DataTable
from alure.engine.store.generations import Generation, GenerationLog
from alure.engine.store.location import Location
from alure.engine.store.rows import STRINGS, conform, id_type, in_order
from alure.engine.store.vectors import FLOATS

# table: (the column that holds the publication's name, rows a row group: lists are long, and a reader takes a group)
SHAPES: dict[str, tuple[str | None, int]] = {
    "graph": ("graph", 65_536),
    "candidates": ("blend", 4_096),
    "popularity": (None, 4_096),
    "clusters": (None, 4_096),
}
COLUMNS: dict[str, list[str]] = {
    "graph": ["user_id", "country", "neighbor_ids", "similarities"],
    "candidates": ["user_id", "country", "item_ids", "scores", "reasons", "graphs"],
    "popularity": ["country", "item_ids", "scores"],
    "clusters": ["country", "cluster", "centroid"],
}


class WholeTable:
    """One of `SHAPES` in the folder of a store."""

    def __init__(self, path: Location, table: str, log: GenerationLog, checksums: Checksums) -> None:
        self.table, self.log, self.checksums = table, log, checksums
        self.named_by, row_group_rows = SHAPES[table]
        partitions = ["generation", *([self.named_by] if self.named_by else []), "write_id"]
        self.data = DataTable(path / table, partitions, row_group_rows)

    def write(
        self,
        source: Generation,
        name: str,
        batches: Iterable[pa.RecordBatch | pa.Table],
        properties: Mapping[str, Any],
    ) -> Generation:
        """Write `batches` (COLUMNS) as table `name` of the generation of `source`, its embeddings, and publish it.

        Nothing is visible until all is. Raises AlureError where another process published the same table meanwhile.
        """
        before = self.log.find(source.generation, self.table, name)
        write_id = uuid.uuid4().hex[:16]
        constants = {"generation": source.generation, "write_id": write_id}
        if self.named_by:
            constants[self.named_by] = name
        stream = iter(batches)
        first = next(stream, None)
        if first is None:
            raise ValueError(f"{self.table} {name!r}: expected at least one batch (it may have no rows), got none")
        schema = self._schema(first)

        def conformed() -> Iterator[pa.RecordBatch]:
            yield from conform(first, schema, constants).to_batches()
            for batch in stream:
                yield from conform(batch, schema, constants).to_batches()

        rows = self.data.append_stream(schema, conformed())
        new = Generation(
            source.generation, self.table, name, rows, source.as_of, source.model, dict(properties), write_id
        )
        self.checksums.record(self.data, source.generation, write_id)
        replaced = before.write_id if before else None
        try:
            visible = self.log.publish(new, lambda present: (present.write_id if present else None) == replaced)
        except AlureError:
            self._remove(write_id)
            raise
        for gone in {write_id, replaced} - {visible.write_id, None}:
            self._remove(gone)
        return visible

    def read(self, chosen: Generation, users: Sequence[Any] | None = None) -> pa.Table:
        """The published rows; `users`: only theirs, where the table has users."""
        if not chosen.rows:
            return self._empty()
        where = _of(chosen)
        if users is not None:
            kind = self.data.schema().field("user_id").type
            where = where & ds.field("user_id").isin(as_ids(users, kind))
        rows = self.data.table(where, COLUMNS[self.table])
        if "user_id" in rows.schema.names:
            return in_order(rows)
        return rows.sort_by([(name, "ascending") for name in ("country", "cluster") if name in rows.schema.names])

    def scan(
        self, chosen: Generation, batch_rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        wanted = list(columns) if columns is not None else COLUMNS[self.table]
        return self.data.scan(_of(chosen), wanted, batch_rows) if chosen.rows else iter(())

    def _remove(self, write_id: str | None) -> None:
        assert write_id is not None
        self.data.delete(write_id=write_id)

    def _empty(self) -> pa.Table:
        return self.data.schema().empty_table().select(COLUMNS[self.table])

    def _schema(self, first: pa.RecordBatch | pa.Table) -> pa.Schema:
        text = pa.string()
        types: dict[str, pa.DataType] = {"country": text, "scores": FLOATS, "similarities": FLOATS}
        types |= {"reasons": STRINGS, "graphs": STRINGS, "cluster": pa.int64(), "centroid": FLOATS}
        for name in ("user_id", "neighbor_ids", "item_ids"):
            if name in COLUMNS[self.table]:
                kind = id_type(first, name)
                types[name] = kind if name == "user_id" else pa.list_(kind)
        columns = [(name, types[name]) for name in COLUMNS[self.table]]
        named = [(self.named_by, text)] if self.named_by else []
        return pa.schema([*columns, ("generation", text), *named, ("write_id", text)])


def as_ids(ids: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Ids as the store has them; "42" where it has integers is 42. Raises InputError on one that cannot be."""
    try:
        return pa.array(ids).cast(kind) if len(ids) else pa.array([], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        shown = ", ".join(repr(i) for i in list(ids)[:5])
        raise InputError(f"users: expected ids of type {kind}, got {shown}") from None


def _of(chosen: Generation) -> ds.Expression:
    return (ds.field("generation") == chosen.generation) & (ds.field("write_id") == chosen.write_id)
