"""EmbeddingStore: a folder of Delta tables that stages meet in.

STORE/generations   the publication log; what is not there is invisible
STORE/embeddings    one row a user and generation, written in units of users, each unit exactly once
STORE/graph         one row a user, generation and graph      } written whole: all rows of one write carry its
STORE/candidates    one row a user, generation and blend      } write_id, and the publication names the write_id,
STORE/popularity    one row a country and generation          } so a rewrite replaces the old rows at one stroke
STORE/quarantine    rows that were refused, and why
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from alure.engine.errors import AlureError, InputError
from alure.engine.store.delta import DataTable
from alure.engine.store.generations import Generation, GenerationLog

EMBEDDING_COLUMNS = ["user_id", "country", "generation", "embedding", "as_of", "model", "num_events", "refreshed_at"]
GRAPH_COLUMNS = ["user_id", "country", "neighbor_ids", "similarities"]
CANDIDATE_COLUMNS = ["user_id", "country", "item_ids", "scores", "reasons", "graphs"]
POPULARITY_COLUMNS = ["country", "item_ids", "scores"]
FLOATS, STRINGS = pa.list_(pa.float32()), pa.list_(pa.string())


@dataclass(frozen=True)
class EmbeddingMatrix:
    """Embeddings as one array: values float32 [n, k·d], slot after slot; rows sorted by (country, user_id)."""

    user_ids: pa.Array
    countries: pa.Array
    values: np.ndarray


class EmbeddingStore:
    """`EmbeddingStore(path, create=True)` makes the folder where there is none.

    `generation=None` means the newest published one everywhere. Reading what is not published raises InputError.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path)
        self.log = GenerationLog(self.path / "generations")
        self.embeddings = DataTable(self.path / "embeddings", ["generation", "country"])
        self.graph = DataTable(self.path / "graph", ["generation", "graph", "write_id"])
        self.candidates = DataTable(self.path / "candidates", ["generation", "blend", "write_id"], row_group_rows=4096)
        self.popularity = DataTable(self.path / "popularity", ["generation", "write_id"])
        self.quarantine = DataTable(self.path / "quarantine", [])
        if not self.log.log.exists():
            if not create:
                raise InputError(f"store: {self.path} is not an embedding store; `alure refresh --store` makes one")
            self.path.mkdir(parents=True, exist_ok=True)
            self.log.create()

    # ---- publications

    def generations(self, table: str | None = None) -> list[Generation]:
        """What is published, oldest first."""
        return self.log.published(table)

    def latest(self, table: str, name: str = "") -> Generation:
        return self.log.require(None, table, name)

    def published(self, generation: str | None, table: str, name: str = "") -> Generation:
        """The publication of this generation (None: the newest). Raises InputError that lists the published ones."""
        return self.log.require(generation, table, name)

    # ---- embeddings

    def write_unit(self, generation: str, unit: str, rows: pa.Table) -> bool:
        """Add one unit of a generation's embeddings in one commit; False where it was there already.

        rows: EMBEDDING_COLUMNS (`generation` may be left out); one model, one as_of and one width throughout.
        """
        rows = _conform(rows, _embedding_schema(_id_type(rows, "user_id")), {"generation": generation})
        _check_unit(rows, unit)
        return self.embeddings.append_once(rows, _unit_key(generation, unit))

    def has_unit(self, generation: str, unit: str) -> bool:
        return self.embeddings.has(_unit_key(generation, unit))

    def written_units(self, generation: str, units: Sequence[str]) -> set[str]:
        """Those of `units` that are written, from one snapshot."""
        if not self.embeddings.exists():
            return set()
        snapshot = self.embeddings.open()
        return {unit for unit in units if snapshot.transaction_version(_unit_key(generation, unit)) is not None}

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
        return self.log.publish(new, may_replace=lambda present: present is None)

    def _check_written(self, new: Generation) -> None:
        rows = self.embeddings.count(_of(new.generation)) if self.embeddings.exists() else 0
        if rows != new.rows:
            raise AlureError(
                f"generation {new.generation}: expected {new.rows:,} rows before publishing, found {rows:,}"
            )
        for batch in self.embeddings.scan(_of(new.generation), ["model", "as_of"]) if rows else ():
            for column, expected in (("model", new.model), ("as_of", new.as_of)):
                found = pc.unique(batch[column]).to_pylist()
                if found != [expected]:
                    raise InputError(
                        f"generation {new.generation}: expected {column} {expected!r} in every row, found {found}; "
                        "embeddings of different models or times are never mixed"
                    )

    def read_embeddings(self, generation: str | None = None, country: str | None = None) -> pa.Table:
        """EMBEDDING_COLUMNS, sorted by (country, user_id)."""
        chosen = self.published(generation, "embeddings")
        return _sorted(self._embedding_rows(chosen, country, EMBEDDING_COLUMNS))

    def iter_embeddings(self, generation: str | None = None, country: str | None = None) -> Iterator[pa.RecordBatch]:
        """EMBEDDING_COLUMNS in batches, in no particular order."""
        chosen = self.published(generation, "embeddings")
        where = _of(chosen.generation, country=country)
        return self.embeddings.scan(where, EMBEDDING_COLUMNS) if chosen.rows else iter(())

    def read_matrix(self, generation: str | None = None, country: str | None = None) -> EmbeddingMatrix:
        """The embeddings as one float32 array [n, k·d]; for populations whose list column would not fit Arrow's."""
        chosen = self.published(generation, "embeddings")
        width = int(chosen.properties["k"]) * int(chosen.properties["d"])
        where = _of(chosen.generation, country=country)
        total = self.embeddings.count(where) if chosen.rows else 0
        values, at, keys = np.empty((total, width), dtype=np.float32), 0, []
        for batch in self.embeddings.scan(where, ["user_id", "country", "embedding"]) if total else ():
            values[at : at + batch.num_rows] = _flat(batch["embedding"]).reshape(batch.num_rows, width)
            at += batch.num_rows
            keys.append(batch.select(["user_id", "country"]))
        rows = pa.Table.from_batches(keys) if keys else _embedding_schema(pa.int64()).empty_table()
        order = _order(rows)
        if order is not None:
            rows, values = rows.take(order), values[order]
        return EmbeddingMatrix(rows["user_id"].combine_chunks(), rows["country"].combine_chunks(), values)

    def countries(self, generation: str | None = None) -> list[str]:
        chosen = self.published(generation, "embeddings")
        parts = {str(p["country"]) for p in self.embeddings.open().partitions() if p["generation"] == chosen.generation}
        return sorted(parts)

    def read_user(self, user_id: int | str, generation: str | None = None) -> dict[str, Any]:
        """One user's row. Raises InputError where the generation has no such user."""
        chosen = self.published(generation, "embeddings")
        where = _of(chosen.generation) & (ds.field("user_id") == self._as_id(user_id))
        rows = self.embeddings.table(where, EMBEDDING_COLUMNS)
        if not len(rows):
            raise InputError(f"user {user_id!r}: not among the {chosen.rows:,} users of generation {chosen.generation}")
        return rows.to_pylist()[0]

    def user_id_type(self) -> pa.DataType:
        return self.embeddings.schema().field("user_id").type

    def _as_id(self, user_id: int | str) -> pa.Scalar:
        expected = self.user_id_type()
        try:
            return pa.scalar(user_id).cast(expected)
        except pa.ArrowInvalid:
            raise InputError(f"user {user_id!r}: expected an id of type {expected}") from None

    def check_integrity(self, generation: str | None = None) -> None:
        """Read a published generation through and raise AlureError unless it is what its publication says.

        Checked: number of rows, users unique, one model, one width k·d, every value finite.
        """
        chosen = self.published(generation, "embeddings")
        width = int(chosen.properties.get("k", 0)) * int(chosen.properties.get("d", 0))
        rows, users = 0, []
        for batch in self.iter_embeddings(chosen.generation):
            rows += batch.num_rows
            users.append(batch["user_id"])
            values = _flat(batch["embedding"])
            lengths = pc.unique(pc.list_value_length(batch["embedding"])).to_pylist()
            if (width and lengths != [width]) or len(lengths) != 1:
                raise AlureError(
                    f"generation {chosen.generation}: expected embeddings of {width} values, found {lengths}"
                )
            if not np.isfinite(values).all():
                bad = batch["user_id"][int((~np.isfinite(values)).argmax()) // lengths[0]]
                raise AlureError(f"generation {chosen.generation}: the embedding of user {bad} is not finite")
            models = pc.unique(batch["model"]).to_pylist()
            if models != [chosen.model]:
                raise AlureError(f"generation {chosen.generation}: expected model {chosen.model}, found {models}")
        if rows != chosen.rows:
            raise AlureError(f"generation {chosen.generation}: {chosen.rows:,} rows were published, {rows:,} are there")
        distinct = len(pc.unique(pa.chunked_array(users))) if users else 0
        if distinct != rows:
            raise AlureError(f"generation {chosen.generation}: {rows - distinct:,} users are there more than once")

    def _embedding_rows(self, chosen: Generation, country: str | None, columns: list[str]) -> pa.Table:
        if not self.embeddings.exists():
            return _embedding_schema(pa.int64()).empty_table().select(columns)
        return self.embeddings.table(_of(chosen.generation, country=country), columns)

    # ---- tables written whole

    def write_graph(
        self, generation: str, name: str, batches: Iterable[pa.RecordBatch | pa.Table], properties: Mapping[str, Any]
    ) -> Generation:
        """Write graph `name` of a published generation, replacing an earlier one, and publish it.

        batches: GRAPH_COLUMNS (user_id, country, neighbor_ids list of the ids' type, similarities list<float32>),
        best first.
        """
        return self._write_whole(self.graph, "graph", (generation, name), batches, properties)

    def read_graph(
        self, generation: str | None = None, name: str = "alure", users: Sequence[Any] | None = None
    ) -> pa.Table:
        """GRAPH_COLUMNS sorted by (country, user_id); `users`: only these."""
        return self._read_whole(self.graph, self.published(generation, "graph", name), GRAPH_COLUMNS, users)

    def iter_graph(self, generation: str | None = None, name: str = "alure") -> Iterator[pa.RecordBatch]:
        """GRAPH_COLUMNS in batches, in no particular order."""
        return self._iter_whole(self.graph, self.published(generation, "graph", name), GRAPH_COLUMNS)

    def write_candidates(
        self, generation: str, name: str, batches: Iterable[pa.RecordBatch | pa.Table], properties: Mapping[str, Any]
    ) -> Generation:
        """Write candidate set `name` of a published generation, replacing an earlier one, and publish it.

        batches: CANDIDATE_COLUMNS (user_id, country, item_ids list of the ids' type, scores list<float32>,
        reasons list<string>, graphs list<string>), best first.
        """
        return self._write_whole(self.candidates, "candidates", (generation, name), batches, properties)

    def read_candidates(
        self, generation: str | None = None, name: str = "alure", users: Sequence[Any] | None = None
    ) -> pa.Table:
        """CANDIDATE_COLUMNS sorted by (country, user_id); `users`: only these."""
        return self._read_whole(
            self.candidates, self.published(generation, "candidates", name), CANDIDATE_COLUMNS, users
        )

    def iter_candidates(self, generation: str | None = None, name: str = "alure") -> Iterator[pa.RecordBatch]:
        """CANDIDATE_COLUMNS in batches of at most 1024 users, in no particular order."""
        chosen = self.published(generation, "candidates", name)
        return self._iter_whole(self.candidates, chosen, CANDIDATE_COLUMNS, batch_rows=1024)

    def write_popularity(self, generation: str, rows: pa.Table, properties: Mapping[str, Any]) -> Generation:
        """rows: POPULARITY_COLUMNS (country, item_ids, scores), one row a country, best first."""
        return self._write_whole(self.popularity, "popularity", (generation, ""), [rows], properties)

    def read_popularity(self, generation: str | None = None) -> pa.Table:
        """POPULARITY_COLUMNS sorted by country."""
        chosen = self.published(generation, "popularity")
        return self.popularity.table(_write_of(chosen), POPULARITY_COLUMNS).sort_by("country")

    def _write_whole(
        self,
        target: DataTable,
        table: str,
        address: tuple[str, str],
        batches: Iterable[pa.RecordBatch | pa.Table],
        properties: Mapping[str, Any],
    ) -> Generation:
        generation, name = address
        source = self.published(generation, "embeddings")
        before = self.log.find(generation, table, name)
        write_id = uuid.uuid4().hex[:16]
        stream = iter(batches)
        first = next(stream, None)
        if first is None:
            raise ValueError(f"{table} {name!r}: expected at least one batch (it may have no rows), got none")
        schema, constants = self._whole_schema(table, first), {"generation": generation, "write_id": write_id}
        constants.update({"graph": name} if table == "graph" else {"blend": name} if table == "candidates" else {})

        def conformed() -> Iterator[pa.RecordBatch]:
            yield from _conform(first, schema, constants).to_batches()
            for batch in stream:
                yield from _conform(batch, schema, constants).to_batches()

        rows = target.append_stream(schema, conformed())
        new = Generation(generation, table, name, rows, source.as_of, source.model, dict(properties), write_id)
        replaced = before.write_id if before else None
        may_replace = lambda present: (present.write_id if present else None) == replaced  # noqa: E731
        try:
            visible = self.log.publish(new, may_replace)
        except AlureError:
            target.delete(f"write_id = '{write_id}'")
            raise
        for gone in {write_id, replaced} - {visible.write_id, None}:
            target.delete(f"write_id = '{gone}'")
        return visible

    def _whole_schema(self, table: str, first: pa.RecordBatch | pa.Table) -> pa.Schema:
        if table == "graph":
            ids = _id_type(first, "user_id")
            shape = [("user_id", ids), ("country", pa.string()), ("generation", pa.string()), ("graph", pa.string())]
            shape += [("neighbor_ids", pa.list_(ids)), ("similarities", FLOATS)]
        else:
            items = pa.list_(_id_type(first, "item_ids"))
            shape = [("country", pa.string()), ("generation", pa.string()), ("item_ids", items), ("scores", FLOATS)]
            if table == "candidates":
                shape.insert(0, ("user_id", _id_type(first, "user_id")))
                shape += [("blend", pa.string()), ("reasons", STRINGS), ("graphs", STRINGS)]
        return pa.schema([*shape, ("write_id", pa.string())])

    def _read_whole(
        self, target: DataTable, chosen: Generation, columns: list[str], users: Sequence[Any] | None
    ) -> pa.Table:
        where = _write_of(chosen)
        if users is not None:
            wanted = [self._as_id(user) for user in users]
            where = where & ds.field("user_id").isin(pa.array([u.as_py() for u in wanted], self.user_id_type()))
        return _sorted(target.table(where, columns))

    def _iter_whole(
        self, target: DataTable, chosen: Generation, columns: list[str], batch_rows: int = 32_768
    ) -> Iterator[pa.RecordBatch]:
        return target.scan(_write_of(chosen), columns, batch_rows)

    # ---- quarantine

    def write_quarantine(self, origin: str, rows: Sequence[str], reason: str) -> None:
        """Keep refused `rows` (JSON text, one each) with where they came from and why they were refused."""
        count = len(rows)
        data = pa.table({"origin": [origin] * count, "row": list(rows), "reason": [reason] * count})
        self.quarantine.append_stream(data.schema, data.to_batches())

    def read_quarantine(self) -> pa.Table:
        schema = pa.schema([("origin", pa.string()), ("row", pa.string()), ("reason", pa.string())])
        return self.quarantine.open().to_pyarrow_table() if self.quarantine.exists() else schema.empty_table()


def _of(generation: str, country: str | None = None) -> ds.Expression:
    where = ds.field("generation") == generation
    return where if country is None else where & (ds.field("country") == country)


def _write_of(chosen: Generation) -> ds.Expression:
    return _of(chosen.generation) & (ds.field("write_id") == chosen.write_id)


def _unit_key(generation: str, unit: str) -> str:
    return f"{generation}/{unit}"


def _embedding_schema(ids: pa.DataType) -> pa.Schema:
    types = {"user_id": ids, "embedding": FLOATS, "as_of": pa.int64(), "num_events": pa.int64()}
    types["refreshed_at"] = pa.timestamp("us", "UTC")
    return pa.schema([(name, types.get(name, pa.string())) for name in EMBEDDING_COLUMNS])


def _id_type(rows: pa.RecordBatch | pa.Table, column: str) -> pa.DataType:
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


def _conform(rows: pa.RecordBatch | pa.Table, schema: pa.Schema, constants: Mapping[str, str]) -> pa.Table:
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


def _check_unit(rows: pa.Table, unit: str) -> None:
    for name in EMBEDDING_COLUMNS:
        if rows[name].null_count:
            raise ValueError(f"unit {unit}: expected no nulls in {name}, got {rows[name].null_count}")
    if not len(rows):
        return
    for name, found in (
        ("model", pc.unique(rows["model"])),
        ("as_of", pc.unique(rows["as_of"])),
        ("width of embedding", pc.unique(pc.list_value_length(rows["embedding"]))),
    ):
        if len(found) > 1:
            raise ValueError(f"unit {unit}: expected one {name}, got {found.to_pylist()}")
    if len(pc.unique(rows["user_id"])) != len(rows):
        raise ValueError(
            f"unit {unit}: expected each user once, got {len(rows) - len(pc.unique(rows['user_id']))} again"
        )
    if pc.any(pc.equal(rows["country"], "")).as_py():
        raise ValueError(f"unit {unit}: expected every user to have a country, got an empty name")


def _flat(lists: pa.Array) -> np.ndarray:
    return lists.flatten().to_numpy(zero_copy_only=False)


def _sorted(rows: pa.Table) -> pa.Table:
    order = _order(rows)
    return rows if order is None else rows.take(order)


def _order(rows: pa.Table) -> np.ndarray | None:
    """What sorts `rows` by (country, user_id); None where they are sorted, as one writer leaves them."""
    order = pc.sort_indices(rows, sort_keys=[("country", "ascending"), ("user_id", "ascending")]).to_numpy()
    return order if (order[1:] < order[:-1]).any() else None
