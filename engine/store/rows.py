"""Rows on their way into the store: one schema, ids of int64 or string, and the checks every unit passes."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.config import OutputDtype
from alure.engine.store.vectors import SCALES, embedding_fields

EMBEDDING_COLUMNS = ["user_id", "country", "generation", "embedding", "as_of", "model", "num_events", "refreshed_at"]
FINGERPRINT = "fingerprint"  # of the history, for refreshes; null where a version before wrote the row
STRINGS = pa.list_(pa.string())


def embedding_schema(ids: pa.DataType, dtype: OutputDtype = "float32") -> pa.Schema:
    """EMBEDDING_COLUMNS as they are stored: with the column `scales` where the embeddings are int8, and FINGERPRINT."""
    types = {"user_id": ids, "as_of": pa.int64(), "num_events": pa.int64(), "refreshed_at": pa.timestamp("us", "UTC")}
    fields = []
    for name in EMBEDDING_COLUMNS:
        plain = pa.field(name, types.get(name, pa.string()))
        fields += embedding_fields(dtype) if name == "embedding" else [plain]
    return pa.schema([*fields, pa.field(FINGERPRINT, pa.int64())])


def id_type(rows: pa.RecordBatch | pa.Table, column: str) -> pa.DataType:
    """int64 or string: the type of an id column, or of the elements of a column of id lists."""
    if column not in rows.schema.names:
        raise ValueError(f"expected a column {column}, got {', '.join(rows.schema.names)}")
    kind = rows.schema.field(column).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.string()
    raise ValueError(f"{column}: expected ids of type int64 or string, got {kind}")


def conform(rows: pa.RecordBatch | pa.Table, schema: pa.Schema, constants: Mapping[str, str]) -> pa.Table:
    """`rows` with exactly the columns of `schema`, `constants` filled in. Raises ValueError on a missing column."""
    columns = []
    for wanted in schema:
        if wanted.name in constants:
            columns.append(pa.repeat(constants[wanted.name], rows.num_rows).cast(wanted.type))
        elif wanted.name in rows.schema.names:
            column = rows.column(wanted.name)
            columns.append(column if column.type == wanted.type else column.cast(wanted.type))
        else:
            raise ValueError(f"expected a column {wanted.name}, got {', '.join(rows.schema.names)}")
    return pa.Table.from_arrays(columns, schema=schema)


def check_unit(rows: pa.Table, unit: str) -> None:
    """Raise ValueError unless the rows have no nulls, one model and one width, each user once, and a country each."""
    for name in rows.schema.names:
        if rows[name].null_count and name != FINGERPRINT:
            raise ValueError(f"unit {unit}: expected no nulls in {name}, got {rows[name].null_count}")
    if not len(rows):
        return
    for name, found in (
        ("model", pc.unique(rows["model"])),
        ("width of embedding", pc.unique(pc.list_value_length(rows["embedding"]))),
    ):
        if len(found) > 1:
            raise ValueError(f"unit {unit}: expected one {name}, got {found.to_pylist()}")
    if SCALES in rows.schema.names:
        width, counts = len(rows["embedding"][0]), pc.unique(pc.list_value_length(rows[SCALES])).to_pylist()
        if len(counts) > 1 or not counts[0] or width % counts[0]:
            raise ValueError(f"unit {unit}: expected as many {SCALES} as embeddings in {width} values, got {counts}")
    repeated = len(rows) - len(pc.unique(rows["user_id"]))
    if repeated:
        raise ValueError(f"unit {unit}: expected each user once, got {repeated} more rows")
    if pc.any(pc.equal(rows["country"], "")).as_py():
        raise ValueError(f"unit {unit}: expected every user to have a country, got an empty name")


def in_order(rows: pa.Table) -> pa.Table:
    """`rows` sorted by (country, user_id)."""
    order = order_of(rows)
    return rows if order is None else rows.take(order)


def order_of(rows: pa.Table) -> np.ndarray | None:
    """What sorts `rows` by (country, user_id); None where they are sorted, as one writer leaves them."""
    order = pc.sort_indices(rows, sort_keys=[("country", "ascending"), ("user_id", "ascending")]).to_numpy()
    return order if (order[1:] < order[:-1]).any() else None
