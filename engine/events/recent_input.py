"""What `RecentEvents.add` accepts: rows with the columns of an event log, checked and brought to a log's indices."""

import difflib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import InputError
from alure.engine.events.indices import matrix
from alure.engine.events.ordering import Rows
from alure.engine.events.reader import Events
from alure.engine.events.staging import LAST_SECOND
from alure.engine.tables import ids_as

REQUIRED = ("user_id", "timestamp", "item_id")
OPTIONAL = (
    "source", "account_id", "category_id", "country", "event_type", "value", "utc_offset", "dense", "semantic_ids",
)  # fmt: skip


class RowReader:
    """Reads rows for one log; ids are found in dictionaries, as a feed brings a few rows at a time.

    vectors: column → source → width, of the events' own vectors.
    """

    def __init__(self, events: Events) -> None:
        self.events, manifest = events, events.manifest
        self.vectors = {
            name: widths
            for name, widths in (("dense", manifest.event_dense_dims), ("semantic_ids", manifest.event_semantic_levels))
            if widths
        }
        self._items = {item: index for index, item in enumerate(events.items.item_ids.to_pylist())}
        self._owners = {
            name: {each: index for index, each in enumerate(table.column(f"{name}_id").to_pylist())}
            for name, table in (("account", events.accounts), ("category", events.categories))
        }

    def read(self, table: pa.Table | pa.RecordBatch) -> tuple[list[Any], Rows]:
        """User ids, and the other columns as a log has them, with item −1 where the log does not know it.

        Raises InputError for a column, type or value that a log would refuse.
        """
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        if not isinstance(table, pa.Table):
            raise InputError(f"recent events: expected a pyarrow.Table or RecordBatch, got {type(table).__name__}")
        self._check_names(table.schema.names)
        for name in REQUIRED:
            if table[name].null_count:
                raise InputError(f"recent events: column {name}: expected a value in every row, got nulls")
        manifest, items = self.events.manifest, self.events.items
        user_ids = _ids(table, "user_id", manifest.user_id_type, "users")
        item = _indices(_ids(table, "item_id", manifest.item_id_type, "items"), self._items)
        rows: Rows = {
            "timestamp": _seconds(table["timestamp"]),
            "item": item,
            "source": _named(table, "source", manifest.sources),
            "event_type": _named(table, "event_type", manifest.event_types),
            "value": _numbers(table, "value", pa.float32()) + np.float32(0),  # −0 becomes 0
            "utc_offset": _numbers(table, "utc_offset", pa.int32()),
            "country": np.array(_column(table, "country", pa.string()).to_pylist(), object),
        }
        if "source" not in table.schema.names:
            rows["source"][:] = 0  # there is one
        elif (rows["source"] < 0).any():
            raise InputError("recent events: column source: expected a value in every row, got nulls")
        of_items = {"account": items.accounts, "category": items.categories}
        for name, owners in of_items.items():
            given = _ids(table, f"{name}_id", getattr(manifest, f"{name}_id_type"), f"{name} ids")
            own = _indices(given, self._owners[name])
            rows[name] = np.where(own < 0, owners[np.maximum(item, 0)], own).astype(np.int32)
        for name in self.vectors:
            rows[name] = self._vector_rows(table, name, rows["source"])
        return user_ids, rows

    def _check_names(self, names: list[str]) -> None:
        known = (*REQUIRED, *OPTIONAL)
        wanted = [*REQUIRED, *(["source"] if len(self.events.manifest.sources) > 1 else [])]
        for name in wanted:
            if name not in names:
                raise InputError(f"recent events: expected a column {name}, got {', '.join(names) or 'none'}")
        for name in names:
            if name not in known or names.count(name) > 1:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise InputError(
                    f"recent events: column {name!r}: expected each of {', '.join(known)} at most once{hint}"
                )

    def _vector_rows(self, table: pa.Table, name: str, source: np.ndarray) -> np.ndarray:
        """[n, widest of the sources], missing ones as a log has them: zeros, and codes −1."""
        widths = self.vectors[name]
        width = max(widths.values())
        missing = 0 if name == "dense" else -1
        kind = pa.float32() if name == "dense" else pa.int32()
        found = np.full((len(table), width), missing, kind.to_pandas_dtype())
        lists = _column(table, name, pa.list_(kind)).combine_chunks()
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        for number, source_name in enumerate(self.events.manifest.sources):
            own, expected = np.flatnonzero(source == number), widths.get(source_name, 0)
            if wrong := sorted(set(lengths[own].tolist()) - {0, expected}):
                raise InputError(
                    f"recent events: column {name}: expected {expected} values in source {source_name}, got {wrong[0]}"
                )
            if expected:
                found[own, :expected] = matrix(lists.take(pa.array(own)), expected, missing)
        if not np.isfinite(found).all() or (name == "semantic_ids" and (found < -1).any()):
            raise InputError(f"recent events: column {name}: expected finite numbers, and codes of at least 0")
        return found


def _column(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as `kind`, nulls where the table does not have it."""
    if name not in table.schema.names:
        return pa.chunked_array([pa.nulls(len(table), kind)])
    try:
        return table[name].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"recent events: column {name}: expected {kind}: {error}") from None


def _ids(table: pa.Table, name: str, kind: str | None, whose: str) -> list[Any]:
    if name not in table.schema.names or kind is None:
        return [None] * len(table)
    return ids_as(table, name, getattr(pa, kind)(), "recent events", f"the {whose} of the log").to_pylist()


def _indices(ids: list[Any], known: dict[Any, int]) -> np.ndarray:
    return np.array([known.get(each, -1) for each in ids], np.int32)


def _seconds(column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("s", kind.tz), safe=False)
    elif not pa.types.is_integer(kind):
        raise InputError(f"recent events: column timestamp: expected unix seconds or a timestamp, got {kind}")
    seconds = column.cast(pa.int64()).to_numpy()
    wrong = (seconds < 0) | (seconds > LAST_SECOND)
    if wrong.any():
        raise InputError(
            f"recent events: column timestamp: expected unix seconds from 0 to {LAST_SECOND}, got "
            f"{seconds[wrong][0]}; milliseconds?"
        )
    return seconds


def _named(table: pa.Table, name: str, known: list[str]) -> np.ndarray:
    """int16 places among `known`, −1 for null."""
    column = _column(table, name, pa.string())
    found = pc.index_in(column, value_set=pa.array(known, pa.string()))
    strange = pc.and_(pc.is_null(found), pc.is_valid(column))
    if pc.any(strange).as_py():
        value = column.filter(strange)[0].as_py()
        raise InputError(
            f"recent events: column {name}: {value!r} is not in the log; it has {', '.join(known) or 'none'}"
        )
    return pc.fill_null(found, -1).to_numpy().astype(np.int16)


def _numbers(table: pa.Table, name: str, kind: pa.DataType) -> np.ndarray:
    """0 for null."""
    numbers = pc.fill_null(_column(table, name, kind), 0).to_numpy().astype(kind.to_pandas_dtype())
    if not np.isfinite(numbers).all():
        raise InputError(f"recent events: column {name}: expected finite numbers")
    return numbers
