"""Embeddings as a store keeps them, all in one type; the one place that makes them float32 again.

float32   list<float>
float16   list<float> of values that float16 has, for Delta has no such type; split into streams of bytes and compressed
          they take half the space, and every reader gets floats
int8      list<byte>, and `scales` list<float> beside it, one an embedding: value = code · scale
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.config import OutputDtype

SCALES = "scales"
DTYPE_KEY = b"alure.dtype"  # of the field's metadata, which tells float16 from float32
FLOATS = pa.list_(pa.float32())
NUMPY: dict[OutputDtype, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


@dataclass(frozen=True)
class Vectors:
    """Embeddings of n users in memory. values: float32, float16 or int8 [n, k·d]; scales: float32 [n, k] of int8."""

    values: np.ndarray
    scales: np.ndarray | None = None

    @classmethod
    def empty(cls, n: int, k: int, d: int, dtype: OutputDtype) -> "Vectors":
        scales = np.empty((n, k), np.float32) if dtype == "int8" else None
        return cls(np.empty((n, k * d), NUMPY[dtype]), scales)

    def finite(self) -> np.ndarray:
        """bool [n]: whether every value is. The scale of an embedding that has another is NaN."""
        return np.isfinite(self.values if self.scales is None else self.scales).all(axis=1)

    def columns(self, rows: np.ndarray) -> dict[str, pa.ListArray]:
        """`rows` (bool [n]) as `EmbeddingStore.write_unit` takes them."""
        columns = {"embedding": _lists(self.values[rows])}
        return columns if self.scales is None else columns | {SCALES: _lists(self.scales[rows])}


def embedding_fields(dtype: OutputDtype) -> list[pa.Field]:
    """The columns that hold embeddings of this type in a table."""
    if dtype == "int8":
        return [pa.field("embedding", pa.list_(pa.int8())), pa.field(SCALES, FLOATS)]
    metadata = {DTYPE_KEY: dtype.encode()} if dtype != "float32" else None
    return [pa.field("embedding", FLOATS, metadata=metadata)]


def dtype_of(schema: pa.Schema) -> OutputDtype:
    """The type of the embeddings of a table, or the one that rows in memory will have there. ValueError for others."""
    field = schema.field("embedding")
    lists = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
    kind = field.type.value_type if lists else pa.null()
    if kind == pa.int8() and SCALES in schema.names:
        return "int8"
    if kind == pa.float16() or (field.metadata or {}).get(DTYPE_KEY) == b"float16":
        return "float16"
    if pa.types.is_floating(kind):
        return "float32"
    raise ValueError(f"embedding: expected lists of floats, or of int8 beside {SCALES}; got {field.type}")


def to_float32(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows as they are stored → the same with embedding list<float32>, and without scales."""
    if SCALES not in batch.schema.names:
        return batch
    codes, scales = batch["embedding"], batch[SCALES]
    lengths = pc.list_value_length(codes).to_numpy()
    counts = pc.list_value_length(scales).to_numpy()
    of_each = np.repeat(flat(scales), np.repeat(lengths // counts, counts))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    values = pa.ListArray.from_arrays(offsets, pa.array(flat(codes) * of_each))
    place = batch.schema.get_field_index("embedding")
    return batch.set_column(place, "embedding", values).drop_columns(SCALES)


def table_to_float32(rows: pa.Table) -> pa.Table:
    nothing = pa.RecordBatch.from_pylist([], schema=rows.schema)
    return pa.Table.from_batches([to_float32(batch) for batch in (nothing, *rows.to_batches())])


def flat(lists: pa.Array) -> np.ndarray:
    """The values of a list array end to end."""
    return lists.flatten().to_numpy(zero_copy_only=False)


def _lists(values: np.ndarray) -> pa.ListArray:
    """[n, width] → list [n]."""
    count, width = values.shape
    offsets = pa.array(np.arange(count + 1, dtype=np.int64) * width, pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
