"""Second pass: DuckDB sorts the good rows; this writes them out as sequences, a record batch at a time.

The order is (source, user, timestamp, item, event_type, account, category, value, utc_offset, country, vectors): all of
a row that is read, so equal rows are neighbours (a duplicate is one comparison away) and the input's order leaves no
trace.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from alure.engine.events.columns import ColumnWriter
from alure.engine.events.indices import Indices, count, matrix
from alure.engine.events.manifest import folder_name
from alure.engine.progress import Track

BATCH_ROWS = 131_072
VECTOR_BATCH_ROWS = 16_384
DTYPES = {
    "timestamp": "<i8", "item": "<i4", "account": "<i4", "category": "<i4", "event_type": "<i2", "value": "<f4",
    "utc_offset": "<i4", "count": "<i4", "dense": "<f4", "semantic_ids": "<i4",
}  # fmt: skip
VECTORS = ("dense", "semantic_ids")

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class SourceShape:
    """What the events of one source carry."""

    name: str
    columns: tuple[str, ...]  # of DTYPES, beside timestamp, item and count
    dense_dim: int = 0
    semantic_levels: int = 0

    def width(self, column: str) -> int | None:
        return {"dense": self.dense_dim, "semantic_ids": self.semantic_levels}.get(column)


@dataclass
class Written:
    """What the second pass counts."""

    lengths: list[np.ndarray]  # per source, int64 [num_users]
    item_events: np.ndarray  # int64 [num_items]
    duplicates: list[np.ndarray]  # rowids of event_rows
    first_timestamp: int = np.iinfo(np.int64).max
    last_timestamp: int = 0
    semantic_codes: int = 0


def write_sequences(
    con: duckdb.DuckDBPyConnection, shapes: list[SourceShape], indices: Indices, out: Path, bar: Track
) -> Written:
    """Write sources/<name>/*.npy under `out`; `shapes` in the order of the sources' indices."""
    written = Written([], np.zeros(indices.num_items, np.int64), [])
    pieces = ordered_rows(con, shapes)
    piece = next(pieces, None)
    for index, shape in enumerate(shapes):
        folder = out / "sources" / folder_name(shape.name)
        folder.mkdir(parents=True)
        lengths = np.zeros(indices.num_users, np.int64)
        with ExitStack() as stack:
            columns = {
                column: stack.enter_context(ColumnWriter(folder / f"{column}.npy", DTYPES[column], shape.width(column)))
                for column in ("timestamp", "item", "count", *shape.columns)
            }
            waiting: list[Rows] = []  # the last user's rows so far: more may come
            while piece is not None and piece[0] == index:
                rows = piece[1]
                begin = int(np.searchsorted(rows["user"], rows["user"][-1]))
                if begin or (waiting and waiting[-1]["user"][-1] != rows["user"][0]):
                    append_users([*waiting, head(rows, begin)], columns, lengths, written, indices)
                    waiting = []
                waiting.append(tail(rows, begin))
                bar.advance(len(rows["user"]))
                piece = next(pieces, None)
            if waiting:
                append_users(waiting, columns, lengths, written, indices)
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"), allow_pickle=False)
        written.lengths.append(lengths)
    return written


def ordered_rows(con: duckdb.DuckDBPyConnection, shapes: list[SourceShape]) -> Iterator[tuple[int, Rows]]:
    """(source index, its next rows), the good rows of the whole log in order."""
    carried = {column for shape in shapes for column in shape.columns}
    columns = {"source": "s.index", "user": "u.index", "timestamp": "e.timestamp", "item": "i.index"}
    joins = "JOIN sources s USING (source) JOIN users u USING (user_id) JOIN items i ON i.item_id = e.item_id"
    if "event_type" in carried:
        columns["event_type"] = "COALESCE(t.index, -1::SMALLINT)"
        joins += " LEFT JOIN event_types t ON t.event_type = e.event_type"
    if "account" in carried:
        columns["account"] = "COALESCE(a.index, i.account)"
        joins += " LEFT JOIN accounts a ON a.account_id = e.account_id"
    if "category" in carried:
        columns["category"] = "COALESCE(c.index, i.category)"
        joins += " LEFT JOIN categories c ON c.category_id = e.category_id"
    if "value" in carried:
        columns["value"] = "COALESCE(e.value, 0::FLOAT) + 0::FLOAT"  # −0 becomes 0: equal values have equal bits
    if "utc_offset" in carried:
        columns["utc_offset"] = "COALESCE(e.utc_offset, 0)"
    if count(con, "country_names"):
        columns["country"] = "COALESCE(n.index, -1)"
        joins += " LEFT JOIN country_names n ON n.country = e.country"
    order = [f'"{column}"' for column in columns]
    vectors = [vector for vector in VECTORS if vector in carried]
    order += [f"hash(e.{vector})" for vector in vectors]
    columns |= {vector: f"e.{vector}" for vector in vectors}
    columns["row"] = "e.rowid"
    order.append('"row"')
    selected = ", ".join(f'{expression} AS "{column}"' for column, expression in columns.items())
    query = con.sql(f"SELECT {selected} FROM event_rows e {joins} WHERE e.reason IS NULL ORDER BY {', '.join(order)}")
    for batch in query.to_arrow_reader(VECTOR_BATCH_ROWS if vectors else BATCH_ROWS):
        source = batch.column("source").to_numpy()
        bounds = [0, *(np.flatnonzero(np.diff(source)) + 1).tolist(), len(source)]
        for begin, end in pairwise(bounds):
            yield int(source[begin]), to_numpy(batch.slice(begin, end - begin), shapes[int(source[begin])])


def to_numpy(batch: pa.RecordBatch, shape: SourceShape) -> Rows:
    rows: Rows = {}
    for name in batch.schema.names:
        if name not in VECTORS:
            rows[name] = batch.column(name).to_numpy()
        elif name in shape.columns:
            width = shape.width(name) or 0
            rows[name] = matrix(batch.column(name), width, -1 if name == "semantic_ids" else 0)
    if "dense" in rows:
        rows["dense"] += np.float32(0)  # as for values
    return rows


def head(rows: Rows, end: int) -> Rows:
    return {name: column[:end] for name, column in rows.items()}


def tail(rows: Rows, begin: int) -> Rows:
    return {name: column[begin:] for name, column in rows.items()}


def append_users(
    parts: list[Rows], columns: dict[str, ColumnWriter], lengths: np.ndarray, written: Written, indices: Indices
) -> None:
    """Append all rows of some users of one source: duplicates out, occurrences counted."""
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    again = repeated(rows)
    if again.any():
        written.duplicates.append(rows["row"][again])
        rows = {name: column[~again] for name, column in rows.items()}
    rows["count"] = occurrences(rows, indices.num_accounts, indices.num_categories)
    for name, column in columns.items():
        column.append(rows[name])
    user = rows["user"]
    begins = np.flatnonzero(np.diff(user, prepend=-1))
    lengths[user[begins]] = np.diff(begins, append=len(user))
    np.add.at(written.item_events, rows["item"], 1)
    written.first_timestamp = min(written.first_timestamp, int(rows["timestamp"].min()))
    written.last_timestamp = max(written.last_timestamp, int(rows["timestamp"].max()))
    if "semantic_ids" in rows:
        written.semantic_codes = max(written.semantic_codes, int(rows["semantic_ids"].max()) + 1)


def repeated(rows: Rows) -> np.ndarray:
    """bool [n]: equal to the row before in every column that is read."""
    again = np.zeros(len(rows["user"]), bool)
    if len(again) > 1:
        again[1:] = True
        for name, column in rows.items():
            if name != "row":
                equal = column[1:] == column[:-1]
                again[1:] &= equal if equal.ndim == 1 else equal.all(1)
    return again


def occurrences(rows: Rows, num_accounts: int, num_categories: int) -> np.ndarray:
    """int32 [n], 1 = first: how often the event's account (else its category, else its item) has come up so far."""
    what = rows["item"].astype(np.int64) + num_accounts + num_categories
    if "category" in rows:
        what = np.where(rows["category"] >= 0, rows["category"].astype(np.int64) + num_accounts, what)
    if "account" in rows:
        what = np.where(rows["account"] >= 0, rows["account"], what)
    order = np.lexsort((what, rows["user"]))  # stable, so times stay in order among equals
    user, what = rows["user"][order], what[order]
    new = np.ones(len(order), bool)
    new[1:] = (user[1:] != user[:-1]) | (what[1:] != what[:-1])
    begins = np.flatnonzero(new)
    position = np.arange(len(order))
    counts = np.empty(len(order), np.int32)
    counts[order] = position - np.repeat(begins, np.diff(begins, append=len(order))) + 1
    return counts
