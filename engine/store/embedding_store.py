"""EmbeddingStore: a folder of Delta tables, on a disk or in an S3-compatible bucket, that stages meet in.

STORE/generations   the publication log; what is not there is invisible
STORE/embeddings    one row a user and generation, written in units of users, each unit exactly once
STORE/graph         one row a user, generation and graph      } written whole: all rows of one write carry its
STORE/candidates    one row a user, generation and blend      } write_id, and the publication names the write_id,
STORE/popularity    one row a country and generation          } so a rewrite replaces the old rows at one stroke
STORE/clusters      one row a cluster of the graph alure      }
STORE/checksums     one row a file of what is published
STORE/quarantine    rows that were refused, and why
STORE/kv_cache      files, not a table: see `alure.engine.store.kv_cache`
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from alure.engine.config import OutputDtype
from alure.engine.errors import AlureError, InputError
from alure.engine.store.checksums import Checksums
from alure.engine.store.delta import DataTable
from alure.engine.store.generations import Generation, GenerationLog
from alure.engine.store.location import Location, locate, make, reach
from alure.engine.store.rows import (
    EMBEDDING_COLUMNS,
    FINGERPRINT,
    check_unit,
    conform,
    embedding_schema,
    id_type,
    in_order,
    order_of,
)
from alure.engine.store.vectors import SCALES, dtype_of, flat, table_to_float32, to_float32
from alure.engine.store.whole import SHAPES, WholeTable, as_ids

Rows: TypeAlias = pa.RecordBatch | pa.Table
GenerationName: TypeAlias = str | Generation | None
QUARANTINE_SCHEMA = pa.schema([("origin", pa.string()), ("row", pa.string()), ("reason", pa.string())])
ROW_GROUP_ROWS = 2_048  # a point read decodes one group: 2 ms, and 150 ms where it has 65,536 rows


@dataclass(frozen=True)
class EmbeddingMatrix:
    """Embeddings as one array: values float32 [n, k·d], slot after slot; rows sorted by (country, user_id)."""

    user_ids: pa.Array
    countries: pa.Array
    values: np.ndarray


class EmbeddingStore:
    """`EmbeddingStore(path, create=True)` makes the folder where there is none. path: of a disk, or s3://bucket/prefix,
    with credentials, region and endpoint in the environment (AWS_ACCESS_KEY_ID and the like).

    `generation=None` means the newest published one everywhere; a `Generation` that was looked up before is
    read without another look at the log. Reading what is not published raises InputError. Embeddings are float32 to
    readers, whatever type the store keeps them in, which is one for all its generations.
    """

    def __init__(self, path: str | Location, *, create: bool = False) -> None:
        self.path = locate(path)
        reach(self.path)
        self.log = GenerationLog(self.path / "generations")
        self.checksums = Checksums(self.path)
        self.embeddings = DataTable(self.path / "embeddings", ["generation", "country"], ROW_GROUP_ROWS, (FINGERPRINT,))
        self.whole = {table: WholeTable(self.path, table, self.log, self.checksums) for table in SHAPES}
        self._part = lru_cache(maxsize=8)(self._open_part)
        self.quarantine = DataTable(self.path / "quarantine", [])
        self._dtype: OutputDtype | None = None
        if not self.log.log.exists():
            if not create:
                raise InputError(f"store: {self.path} is not an embedding store; `alure refresh --store` makes one")
            make(self.path)
            self.log.create()

    def tables(self) -> list[DataTable]:
        """Every Delta table of the store, whether it has rows or not."""
        whole = [table.data for table in self.whole.values()]
        return [self.log.log, self.embeddings, *whole, self.checksums.table, self.quarantine]

    # ---- publications

    def generations(self, table: str | None = None) -> list[Generation]:
        """What is published, oldest first."""
        return self.log.published(table)

    def latest(self, table: str, name: str = "") -> Generation:
        """The newest publication. Raises InputError where there is none."""
        return self.log.require(None, table, name)

    def published(self, generation: GenerationName, table: str, name: str = "") -> Generation:
        """The publication of this generation (None: the newest). Raises InputError that lists the published ones."""
        return self.log.require(generation, table, name)

    # ---- embeddings

    def write_unit(self, generation: str, unit: str, rows: pa.Table) -> bool:
        """Add one unit of a generation's embeddings in one commit; False where it was there already.

        rows: EMBEDDING_COLUMNS (`generation` may be left out), and FINGERPRINT or not; one model and one width
        throughout. embedding: lists of float32 or float16, or of int8 beside `scales`, one float32 an embedding;
        InputError where the store has another type.
        A row's as_of is the time its embedding was made for: earlier than the generation's where it is carried forward.
        """
        dtype = dtype_of(rows.schema)
        self.check_dtype(dtype)
        if FINGERPRINT not in rows.schema.names:
            rows = rows.append_column(FINGERPRINT, pa.nulls(len(rows), pa.int64()))
        rows = conform(rows, embedding_schema(id_type(rows, "user_id"), dtype), {"generation": generation})
        check_unit(rows, unit)
        return self.embeddings.append_once(rows, generation, unit)

    def output_dtype(self) -> OutputDtype | None:
        """In which the store keeps its embeddings, None where it has none yet."""
        if self._dtype is None and self.embeddings.exists():
            self._dtype = dtype_of(self.embeddings.schema())
        return self._dtype

    def check_dtype(self, dtype: OutputDtype) -> None:
        """Raise InputError where the store keeps its embeddings in another type."""
        found = self.output_dtype()
        if found not in (None, dtype):
            raise InputError(
                f"{self.path}: the store keeps embeddings as {found}, got output_dtype {dtype}; a store has one type. "
                f"Give --output-dtype {found} (refresh: output_dtype), or another store"
            )

    def written_units(self, generation: str, units: Sequence[str]) -> set[str]:
        """Those of `units` that are written, from one snapshot."""
        return self.embeddings.written(generation, units)

    def count_written(self, generation: str) -> int:
        """Rows of a generation, published or not."""
        return self.embeddings.count(_of(generation)) if self.embeddings.exists() else 0

    def count_as_ofs(self, generation: GenerationName = None) -> dict[int, int]:
        """{as_of: rows whose embedding was made for that time}."""
        chosen, counts = self.published(generation, "embeddings"), Counter[int]()
        for batch in self.embeddings.scan(_of(chosen.generation), ["as_of"]) if chosen.rows else ():
            counts.update({entry["values"]: entry["counts"] for entry in pc.value_counts(batch["as_of"]).to_pylist()})
        return dict(counts)

    def publish(self, new: Generation) -> Generation:
        """Make a generation's embeddings visible. Publishing the same again changes nothing.

        Raises AlureError where the rows are not what `new` says, InputError where the generation is published already
        with other content.
        """
        if new.table != "embeddings":
            raise ValueError(
                f"publish: expected embeddings, got {new.table}; the other tables are published by their write"
            )
        present = self.log.find(*new.key)
        if present is not None and not present.same_content(new):
            raise InputError(
                f"generation {new.generation} is published already, with {present.rows:,} rows of model "
                f"{present.model}; got {new.rows:,} rows of model {new.model}. A published generation never changes"
            )
        if present is None:
            self._check_written(new)
            self.checksums.record(self.embeddings, new.generation)
        return self.log.publish(new, may_replace=lambda present: present is None)

    def _check_written(self, new: Generation) -> None:
        rows = self.count_written(new.generation)
        if rows != new.rows:
            raise AlureError(
                f"generation {new.generation}: expected {new.rows:,} rows before publishing, found {rows:,}"
            )
        for batch in self.embeddings.scan(_of(new.generation), ["model", "as_of"]) if rows else ():
            models = pc.unique(batch["model"]).to_pylist()
            if models != [new.model]:
                raise InputError(
                    f"generation {new.generation}: expected model {new.model!r} in every row, found {models}; "
                    "embeddings of different models are never mixed"
                )
            latest = pc.max(batch["as_of"]).as_py()
            if latest > new.as_of:
                raise InputError(
                    f"generation {new.generation}: expected no row later than its as_of {new.as_of}, found {latest}"
                )

    def read_embeddings(self, generation: GenerationName = None, country: str | None = None) -> pa.Table:
        """EMBEDDING_COLUMNS, sorted by (country, user_id)."""
        chosen = self.published(generation, "embeddings")
        rows = self._embedding_rows(chosen, country, EMBEDDING_COLUMNS)
        if country is None and len(rows) != chosen.rows:
            raise AlureError(
                f"generation {chosen.generation}: {chosen.rows:,} rows were published, {len(rows):,} are there"
            )
        return in_order(rows)

    def iter_embeddings(
        self, generation: GenerationName = None, country: str | None = None
    ) -> Iterator[pa.RecordBatch]:
        """EMBEDDING_COLUMNS in batches, in no particular order."""
        return self._scan(self.published(generation, "embeddings"), country, EMBEDDING_COLUMNS)

    def read_matrix(self, generation: GenerationName = None, country: str | None = None) -> EmbeddingMatrix:
        """The embeddings as one float32 array [n, k·d]; for populations whose list column would not fit Arrow's."""
        chosen = self.published(generation, "embeddings")
        width = _width(chosen)
        where = _of(chosen.generation, country=country)
        total = self.embeddings.count(where) if chosen.rows else 0
        values, at, keys = np.empty((total, width), dtype=np.float32), 0, []
        for batch in self._scan(chosen, country, ["user_id", "country", "embedding"]):
            values[at : at + batch.num_rows] = flat(batch["embedding"]).reshape(batch.num_rows, width)
            at += batch.num_rows
            keys.append(batch.select(["user_id", "country"]))
        rows = pa.Table.from_batches(keys) if keys else embedding_schema(pa.int64()).empty_table()
        order = order_of(rows)
        if order is not None:
            rows, values = rows.take(order), values[order]
        return EmbeddingMatrix(rows["user_id"].combine_chunks(), rows["country"].combine_chunks(), values)

    def countries(self, generation: GenerationName = None) -> list[str]:
        """The countries whose users have embeddings in this generation, sorted."""
        chosen = self.published(generation, "embeddings")
        parts = {str(p["country"]) for p in self.embeddings.open().partitions() if p["generation"] == chosen.generation}
        return sorted(parts)

    def read_user(self, user_id: int | str, generation: GenerationName = None) -> dict[str, Any]:
        """One user's row. Raises InputError where the generation has no such user."""
        chosen = self.published(generation, "embeddings")
        rows = self.read_rows([user_id], chosen)
        if not len(rows):
            raise InputError(f"user {user_id!r}: not among the {chosen.rows:,} users of generation {chosen.generation}")
        return rows.to_pylist()[0]

    def read_rows(self, users: Sequence[Any], generation: GenerationName = None) -> pa.Table:
        """EMBEDDING_COLUMNS of those of `users` that the generation has, in no particular order."""
        chosen = self.published(generation, "embeddings")
        part = self._part(chosen.generation, chosen.sequence)
        wanted = ds.field("user_id").isin(as_ids(users, part.schema.field("user_id").type))
        return table_to_float32(part.to_table(columns=self._stored(EMBEDDING_COLUMNS), filter=wanted))

    def read_written(self, generation: str, users: Sequence[Any], columns: list[str]) -> pa.Table:
        """`columns` of EMBEDDING_COLUMNS of those of `users` that have a row of a generation, published or not."""
        wanted = ds.field("user_id").isin(as_ids(users, self.user_id_type()))
        return table_to_float32(self.embeddings.table(_of(generation) & wanted, self._stored(columns)))

    def read_history(self, users: Sequence[Any], generations: int = 7) -> pa.Table:
        """What the newest `generations` say of `users`, as one jagged sequence a user, oldest first, for models that
        read earlier embeddings as a feature: user_id, as_ofs list<int64>, models list<string>, embeddings
        list<list<float32>>. An embedding that was carried forward is there once. Spaces of two models do not compare.
        """
        columns = ["user_id", "as_of", "model", "embedding"]
        newest = self.generations("embeddings")[-generations:]
        if not newest:
            raise InputError(f"{self.path}: nothing of this table is published yet, so users have no history")
        rows = pa.concat_tables([self.read_rows(users, chosen).select(columns) for chosen in newest])
        rows = rows.append_column("row", pa.array(np.arange(len(rows))))
        once = rows.group_by(columns[:3]).aggregate([("row", "min")])["row_min"]
        rows = rows.take(once).sort_by([(name, "ascending") for name in columns[:3]]).combine_chunks()
        runs = pc.run_end_encode(rows["user_id"].combine_chunks())
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), runs.run_ends])
        lists = [pa.ListArray.from_arrays(offsets, rows[name].combine_chunks()) for name in columns[1:]]
        return pa.table([runs.values, *lists], names=["user_id", "as_ofs", "models", "embeddings"])

    def check_integrity(self, generation: GenerationName = None) -> None:
        """Read a published generation through and raise AlureError unless it is what its publication says.

        Checked: number of rows, users unique, one model, one width k·d, every value finite.
        """
        chosen = self.published(generation, "embeddings")
        width = _width(chosen)
        rows, users = 0, []
        for batch in self.iter_embeddings(chosen.generation):
            rows += batch.num_rows
            users.append(batch["user_id"])
            values = flat(batch["embedding"])
            lengths = pc.unique(pc.list_value_length(batch["embedding"])).to_pylist()
            if lengths != [width]:
                raise AlureError(
                    f"generation {chosen.generation}: expected embeddings of {width} values, found {lengths}"
                )
            if not np.isfinite(values).all():
                bad = batch["user_id"][int((~np.isfinite(values)).argmax()) // width]
                raise AlureError(f"generation {chosen.generation}: the embedding of user {bad} is not finite")
            models = pc.unique(batch["model"]).to_pylist()
            if models != [chosen.model]:
                raise AlureError(f"generation {chosen.generation}: expected model {chosen.model}, found {models}")
        if rows != chosen.rows:
            raise AlureError(f"generation {chosen.generation}: {chosen.rows:,} rows were published, {rows:,} are there")
        distinct = len(pc.unique(pa.chunked_array(users))) if users else 0
        if distinct != rows:
            raise AlureError(f"generation {chosen.generation}: {rows - distinct:,} users are there more than once")

    def read_users(self, generation: GenerationName = None, users: Sequence[Any] | None = None) -> pa.Table:
        """user_id and country of a generation's users, sorted by (country, user_id).

        users: only these, each once. Raises InputError on one that the generation does not have.
        """
        chosen, columns = self.published(generation, "embeddings"), ["user_id", "country"]
        if users is None:
            return in_order(self._embedding_rows(chosen, None, columns))
        ids = pc.unique(as_ids(users, self.user_id_type()))
        rows = in_order(self.embeddings.table(_of(chosen.generation) & ds.field("user_id").isin(ids), columns))
        missing = ids.filter(pc.invert(pc.is_in(ids, value_set=rows["user_id"].combine_chunks())))
        if len(missing):
            named = ", ".join(map(repr, missing[:5].to_pylist()))
            raise InputError(f"users {named}: not among the {chosen.rows:,} users of generation {chosen.generation}")
        return rows

    def read_range(
        self, generation: GenerationName, country: str, bounds: tuple[Any, Any], columns: Sequence[str] | None = None
    ) -> pa.Table:
        """`columns` (default: all) of a country's users with bounds[0] <= user_id <= bounds[1], in no particular order;
        embeddings as they are stored, to be written again. FINGERPRINT is left out where the store has none yet.
        """
        user = ds.field("user_id")
        where = (ds.field("country") == country) & (user >= bounds[0]) & (user <= bounds[1])
        return self._read_part(self.published(generation, "embeddings"), where, columns)

    def read_countries(
        self, generation: GenerationName, countries: Sequence[str], columns: Sequence[str] | None = None
    ) -> pa.Table:
        """`read_range` of all users of some countries."""
        where = ds.field("country").isin(pa.array(countries, pa.string()))
        return self._read_part(self.published(generation, "embeddings"), where, columns)

    def _read_part(self, chosen: Generation, where: ds.Expression, columns: Sequence[str] | None) -> pa.Table:
        part = self._part(chosen.generation, chosen.sequence)
        wanted = columns and [name for name in columns if name != FINGERPRINT or name in part.schema.names]
        return part.to_table(columns=wanted, filter=where)

    def _open_part(self, generation: str, sequence: int) -> ds.Dataset:
        """The files of a published generation, which never change under one sequence number."""
        return self.embeddings.part(_of(generation))

    def _embedding_rows(self, chosen: Generation, country: str | None, columns: list[str]) -> pa.Table:
        if not self.embeddings.exists():
            return embedding_schema(pa.int64()).empty_table().select(columns)
        rows = self.embeddings.table(_of(chosen.generation, country=country), self._stored(columns))
        return table_to_float32(rows)

    def _scan(self, chosen: Generation, country: str | None, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if not chosen.rows:
            return iter(())
        where = _of(chosen.generation, country=country)
        return map(to_float32, self.embeddings.scan(where, self._stored(columns)))

    def _stored(self, columns: list[str]) -> list[str]:
        """What to read of the table for `columns` of EMBEDDING_COLUMNS."""
        return [*columns, SCALES] if "embedding" in columns and self.output_dtype() == "int8" else columns

    def user_id_type(self) -> pa.DataType:
        """int64 or string."""
        return self.embeddings.schema().field("user_id").type if self.embeddings.exists() else pa.int64()

    # ---- tables written whole. `source`: the generation whose embeddings they derive from, published here, or as
    # another store's own record of it

    def write_graph(
        self, source: str | Generation, name: str, batches: Iterable[Rows], properties: Mapping[str, Any]
    ) -> Generation:
        """Write graph `name` of a generation, replacing an earlier one, and publish it.

        batches: user_id, country, neighbor_ids list of the ids' type, similarities list<float32>; best first.
        """
        return self.whole["graph"].write(self._source(source), name, batches, properties)

    def read_graph(
        self, generation: GenerationName = None, name: str = "alure", users: Sequence[Any] | None = None
    ) -> pa.Table:
        """user_id, country, neighbor_ids, similarities, sorted by (country, user_id); `users`: only theirs."""
        return self.whole["graph"].read(self.published(generation, "graph", name), users)

    def iter_graph(self, generation: GenerationName = None, name: str = "alure") -> Iterator[pa.RecordBatch]:
        """The same columns in batches, in no particular order."""
        return self.whole["graph"].scan(self.published(generation, "graph", name), batch_rows=32_768)

    def write_candidates(
        self, source: str | Generation, name: str, batches: Iterable[Rows], properties: Mapping[str, Any]
    ) -> Generation:
        """Write candidate set `name` of a generation, replacing an earlier one, and publish it.

        batches: user_id, country, item_ids list of the ids' type, scores list<float32>, reasons list<string>,
        graphs list<string>; best first.
        """
        return self.whole["candidates"].write(self._source(source), name, batches, properties)

    def read_candidates(
        self, generation: GenerationName = None, name: str = "alure", users: Sequence[Any] | None = None
    ) -> pa.Table:
        """user_id, country, item_ids, scores, reasons, graphs, sorted by (country, user_id); `users`: only theirs."""
        return self.whole["candidates"].read(self.published(generation, "candidates", name), users)

    def iter_candidates(
        self, generation: GenerationName = None, name: str = "alure", columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The same columns (or only `columns`) in batches of at most 1024 users, in no particular order."""
        return self.whole["candidates"].scan(self.published(generation, "candidates", name), 1024, columns)

    def write_popularity(self, source: str | Generation, rows: Rows, properties: Mapping[str, Any]) -> Generation:
        """rows: country, item_ids, scores; one row a country, best first."""
        return self.whole["popularity"].write(self._source(source), "", [rows], properties)

    def read_popularity(self, generation: GenerationName = None) -> pa.Table:
        """country, item_ids, scores, sorted by country."""
        return self.whole["popularity"].read(self.published(generation, "popularity"))

    def write_clusters(self, source: str | Generation, rows: Rows, properties: Mapping[str, Any]) -> Generation:
        """rows: country, cluster, centroid list<float32>, of the graph `alure`; a country searched exactly has none."""
        return self.whole["clusters"].write(self._source(source), "", [rows], properties)

    def read_clusters(self, generation: GenerationName = None) -> pa.Table:
        """country, cluster, centroid, sorted by (country, cluster)."""
        return self.whole["clusters"].read(self.published(generation, "clusters"))

    def _source(self, source: str | Generation) -> Generation:
        return source if isinstance(source, Generation) else self.published(source, "embeddings")

    # ---- quarantine

    def write_quarantine(self, origin: str, part: str, rows: Sequence[str], reason: str) -> None:
        """Keep refused `rows` (JSON text, one each) with where they came from and why, each part of an origin once."""
        count = len(rows)
        data = pa.table([[origin] * count, list(rows), [reason] * count], schema=QUARANTINE_SCHEMA)
        self.quarantine.append_once(data, origin, part)

    def count_quarantined(self, origin: str) -> int:
        """Rows refused by `origin`."""
        return self.quarantine.count(ds.field("origin") == origin) if self.quarantine.exists() else 0

    def read_quarantine(self) -> pa.Table:
        """origin, row and reason, all strings, of everything that was refused."""
        return self.quarantine.dataset().to_table() if self.quarantine.exists() else QUARANTINE_SCHEMA.empty_table()


def _of(generation: str, country: str | None = None) -> ds.Expression:
    where = ds.field("generation") == generation
    return where if country is None else where & (ds.field("country") == country)


def _width(chosen: Generation) -> int:
    return int(chosen.properties["k"]) * int(chosen.properties["d"])
