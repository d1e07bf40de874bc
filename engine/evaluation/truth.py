"""What users did after the snapshot, read from a file and matched with the users of a generation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import InputError
from alure.engine.events.staging import LAST_SECOND
from alure.engine.tables import read_columns, readable, texts_as, within_int64

OPTIONAL = ("timestamp", "source", "event_type")
NO_ENGAGEMENT = ("view",)  # event types that do not count as engagement unless they are named


@dataclass(frozen=True)
class TruthRows:
    """The rows that can be used, and how many of the others there were of each kind."""

    table: pa.Table  # user_id, item_id, timestamp (null: unknown), source, event_type
    counts: dict[str, int]  # rows, and what was left out by reason


@dataclass(frozen=True)
class Relevance:
    """Distinct (user, item) pairs to be recalled, of the users that a generation knows."""

    users: np.ndarray  # int64 [n] rows of the generation, ascending: the users evaluated
    items: pa.Array  # [m] original ids of the distinct relevant items
    keys: np.ndarray  # int64 [pairs], sorted: position in `users` · m + position in `items`
    counts: dict[str, int]  # what was matched and what was not

    @property
    def pair_users(self) -> np.ndarray:
        """int64 [pairs], position in `users`."""
        return self.keys // max(len(self.items), 1)

    @property
    def pair_items(self) -> np.ndarray:
        """int64 [pairs], position in `items`."""
        return self.keys % max(len(self.items), 1)

    @property
    def num_relevant(self) -> np.ndarray:
        """int64 [n], relevant items of each user evaluated; all > 0."""
        return np.bincount(self.pair_users, minlength=len(self.users))


def read_truth(path: Path, as_of: int, ad_sources: list[str] | None) -> TruthRows:
    """Rows of a Parquet file or Delta table after `as_of`, of `ad_sources` where those and the rows' are known.

    Needs user_id and item_id; timestamp, source and event_type are optional. Rows with null ids, rows not after
    `as_of` (they would be a leak) and rows of other sources are left out and counted.
    """
    table = read_columns(path, "truth", ("user_id", "item_id"), OPTIONAL)
    counts = {"rows": len(table)}
    columns = {name: within_int64(table[name]) for name in ("user_id", "item_id")}
    for name in OPTIONAL:
        if name not in table.column_names:
            columns[name] = pa.nulls(len(table), pa.int64() if name == "timestamp" else pa.string())
        elif name == "timestamp":
            columns[name] = _seconds(table[name], path)
        else:
            columns[name] = texts_as(table, name, f"truth: {path}")
    rows = pa.table(columns)
    rows = _leave_out(rows, pc.or_(pc.is_null(rows["user_id"]), pc.is_null(rows["item_id"])), "null_id", counts)
    rows = _leave_out(rows, pc.fill_null(pc.less_equal(rows["timestamp"], as_of), False), "not_after_as_of", counts)
    if ad_sources is not None:
        known = pa.array(ad_sources, pa.string())
        other = pc.and_(pc.is_valid(rows["source"]), pc.invert(pc.is_in(rows["source"], value_set=known)))
        rows = _leave_out(rows, other, "not_an_ad_source", counts)
    return TruthRows(rows, counts)


def engagements(truth: TruthRows, truth_types: list[str] | None) -> pa.Table:
    """The rows that count as engagement: of `truth_types`, or of every type but "view" (no type counts too).

    Raises InputError where `truth_types` names none that the truth holds.
    """
    types = truth.table["event_type"]
    if truth_types is None:
        return truth.table.filter(pc.invert(pc.is_in(types, value_set=pa.array(NO_ENGAGEMENT))))
    wanted = truth.table.filter(pc.is_in(types, value_set=pa.array(truth_types, pa.string())))
    if not len(wanted) and len(truth.table):
        present = ", ".join(str(t) for t in pc.unique(types).to_pylist())
        raise InputError(f"truth: none of the types {', '.join(truth_types)} is in the truth; it has {present}")
    return wanted


def relevance(rows: pa.Table, user_ids: pa.Array, known_items: pa.ChunkedArray | None) -> Relevance:
    """Match `rows` (user_id, item_id) with a generation's `user_ids`.

    Users that the generation does not know cannot be evaluated; items that the log does not know stay relevant (a
    miss for everybody). Both are counted.
    """
    users = indices(rows["user_id"], user_ids)
    counts = {
        "engagements": len(rows),
        "unknown_user_rows": int((users < 0).sum()),
        "unknown_users": len(pc.unique(rows.filter(pa.array(users < 0))["user_id"])),
    }
    kept = rows.filter(pa.array(users >= 0))
    users = users[users >= 0]
    items = pc.unique(kept["item_id"])
    if known_items is not None:
        missing = indices(kept["item_id"], known_items) < 0
        counts["unknown_item_rows"] = int(missing.sum())
        counts["unknown_items"] = len(pc.unique(kept.filter(pa.array(missing))["item_id"]))
    distinct_users, row_of = np.unique(users, return_inverse=True)
    keys = np.sort(row_of * np.int64(max(len(items), 1)) + indices(kept["item_id"], items))  # np.unique would hash
    keys = keys[np.diff(keys, prepend=-1) != 0]
    counts |= {"repeated_rows": len(kept) - len(keys), "pairs": len(keys), "users": len(distinct_users)}
    return Relevance(distinct_users, items, keys, counts)


def indices(wanted: pa.ChunkedArray | pa.Array, known: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """int64 position of each of `wanted` in `known`, −1 where it is not there. Id types must agree."""
    if wanted.type != known.type:
        if pa.types.is_integer(wanted.type) != pa.types.is_integer(known.type):
            raise InputError(
                f"truth: expected ids of type {known.type}, as in the log, got {wanted.type}; "
                "write the truth with the ids of the log"
            )
        wanted = wanted.cast(known.type)
    found = pc.fill_null(pc.index_in(wanted, value_set=known), -1)
    return found.to_numpy(zero_copy_only=False).astype(np.int64) if len(found) else np.empty(0, np.int64)


def _seconds(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    """Unix seconds of a column of integers or of any Arrow timestamp; null (unknown) where a number can be none."""
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise InputError(
            f"truth: {path}: column timestamp: expected unix seconds or a timestamp, got {column.type}; cast the column"
        )
    if not pa.types.is_uint64(column.type):
        with readable(path, "truth: column timestamp"):
            column = column.cast(pa.int64())
    late = pc.greater(column, pa.scalar(LAST_SECOND, column.type))
    if 2 * (pc.sum(late).as_py() or 0) > pc.count(column).as_py():
        raise InputError(
            f"truth: {path}: column timestamp: expected unix seconds, got {pc.max(column)}; milliseconds? Divide them, "
            "or store them as an Arrow timestamp"
        )
    return pc.if_else(late, pa.scalar(None, column.type), column).cast(pa.int64())


def _leave_out(rows: pa.Table, which: pa.ChunkedArray, reason: str, counts: dict[str, int]) -> pa.Table:
    counts[reason] = int(pc.sum(which.cast(pa.int64())).as_py() or 0)
    return rows.filter(pc.invert(which)) if counts[reason] else rows
