"""The publication log: a table of a generation is visible once its row is here, all of it at once.

One append publishes. Publications are totally ordered by `sequence`: each is a Delta application transaction of the log
made against a snapshot that holds the one before, so of two publishers at once one commits and the other looks again.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction

from alure.engine.errors import AlureError, InputError
from alure.engine.store.delta import COMMIT_ATTEMPTS, DataTable
from alure.engine.store.location import Location

TABLES = ("embeddings", "graph", "candidates", "popularity", "clusters")

LOG_SCHEMA = pa.schema(
    [
        ("sequence", pa.int64()),
        ("generation", pa.string()),
        ("table", pa.string()),
        ("name", pa.string()),
        ("rows", pa.int64()),
        ("as_of", pa.int64()),
        ("model", pa.string()),
        ("published_at", pa.timestamp("us", "UTC")),
        ("properties", pa.string()),
        ("write_id", pa.string()),
        ("withdrawn", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Generation:
    """One published table of one generation. `name`: the graph's or the blend's; "" for the other tables.

    as_of: unix seconds. model: the digest of the model that made the embeddings. properties: JSON-able (k and d of
    embeddings, the configuration and figures of the others). `sequence` and `published_at` are given by the log;
    `write_id` tells the rows of this publication from those of one it replaced. withdrawn: by a rollback; its rows
    are there until a vacuum.
    """

    generation: str
    table: str
    name: str = ""
    rows: int = 0
    as_of: int = 0
    model: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)
    write_id: str = ""
    withdrawn: bool = False
    sequence: int = -1
    published_at: datetime | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.generation, self.table, self.name)

    @property
    def space(self) -> str:
        """Digest of the model whose space the embeddings are in: their own model's, unless that is aligned."""
        found: str = self.properties.get("space", self.model)
        return found

    def same_content(self, other: "Generation") -> bool:
        mine = (self.key, self.rows, self.as_of, self.model, _canonical(self.properties))
        return mine == (other.key, other.rows, other.as_of, other.model, _canonical(other.properties))


class GenerationLog:
    def __init__(self, path: Location) -> None:
        self.log = DataTable(path, partition_by=[])
        self._last_read: tuple[tuple[str, int], list[Generation]] | None = None
        self._now: tuple[object, list[Generation]] = (None, [])

    def create(self) -> None:
        self.log.ensure(LOG_SCHEMA)

    def _rows(self, snapshot: DeltaTable) -> list[Generation]:
        """In order. A version of the log never changes; on S3 reading it takes three requests a publication."""
        version, last = (str(snapshot.metadata().id), snapshot.version()), self._last_read
        if last is None or last[0] != version:
            rows = self.log.dataset(snapshot).to_table().sort_by("sequence").to_pylist()
            last = self._last_read = version, [_from_row(row) for row in rows]
        return last[1]

    def _rows_now(self) -> list[Generation]:
        """In order. The table is opened, which takes 15 ms, only where it has another newest commit than last time."""
        newest = self.log.newest_commit()
        if newest is None or newest != self._now[0]:
            self._now = newest, self._rows(self.log.open())
        return self._now[1]

    def published(self, table: str | None = None) -> list[Generation]:
        """What is visible, in order of publication: of every (generation, table, name) its newest publication."""
        newest = _newest(self._rows_now())
        return [row for row in newest if not row.withdrawn and table in (None, row.table)]

    def withdrawn(self) -> list[Generation]:
        """What a rollback hid: publications whose newest row says so; `published_at` is when."""
        return [row for row in _newest(self._rows_now()) if row.withdrawn]

    def find(self, generation: str, table: str, name: str = "") -> Generation | None:
        return next((row for row in self.published(table) if row.key == (generation, table, name)), None)

    def publish(self, new: Generation, may_replace: Callable[[Generation | None], bool]) -> Generation:
        """Append `new`, which makes it visible, unless what is visible already has the same content.

        may_replace: asked, in the very snapshot that the append is made against, whether the present publication of
        the same key (None: there is none) may give way to `new`.
        Returns the publication that is visible afterwards. Raises AlureError where another publisher was first.
        """
        visible = [new]

        def decide(newest: list[Generation]) -> list[Generation]:
            present = next((row for row in newest if row.key == new.key and not row.withdrawn), None)
            if may_replace(present):
                return [new]
            assert present is not None
            if not present.same_content(new):
                raise AlureError(
                    f"generation {new.generation}: {_called(new)} was published meanwhile by another process, with "
                    "other content; nothing was replaced. Run again to write it anew"
                )
            visible[0] = present
            return []

        return (self.append(decide) or visible)[0]

    def append(self, decide: Callable[[list[Generation]], list[Generation]]) -> list[Generation]:
        """Append, in one commit, what `decide` makes of the newest publication of every key (withdrawn ones too).

        A lost race asks `decide` again. Returns what was appended, with its sequence numbers.
        """
        for _ in range(COMMIT_ATTEMPTS):
            snapshot = self.log.open()
            rows = self._rows(snapshot)
            chosen = decide(_newest(rows))
            if not chosen:
                return []
            first = rows[-1].sequence + 1 if rows else 0
            table = _to_rows(chosen, first)
            once = CommitProperties(app_transactions=[Transaction("publish", first)])
            if self.log.commit(snapshot, table, once):
                return [_from_row(row) for row in table.to_pylist()]
        raise AlureError(f"{self.log.path}: lost {COMMIT_ATTEMPTS} races to publish; run again")

    def require(self, generation: "str | Generation | None", table: str, name: str = "") -> Generation:
        """The publication asked for, or the newest one (None). Raises InputError that lists what there is.

        One that was looked up before is taken as it is, without reading the log.
        """
        if isinstance(generation, Generation):
            return generation
        published = self.published(table)
        of_name = [row for row in published if row.name == name]
        if generation is None and of_name:
            return of_name[-1]
        found = next((row for row in of_name if row.generation == generation), None)
        if found is not None:
            return found
        what = f"{table} {name!r}" if name else table
        wanted = f"generation {generation!r} of {what}" if generation is not None else f"any generation of {what}"
        raise InputError(f"{self.log.path.parent}: expected {wanted} to be published; {_listing(published)}")


def _listing(published: list[Generation]) -> str:
    if not published:
        return "nothing of this table is published yet"
    shown = [f"{row.generation}{f' ({row.name})' if row.name else ''}" for row in published[-10:]]
    return f"published: {', '.join(shown)}"


def _called(generation: Generation) -> str:
    return f"{generation.table} {generation.name!r}" if generation.name else generation.table


def _canonical(properties: Mapping[str, Any]) -> str:
    return json.dumps(properties, sort_keys=True)


def _newest(rows: list[Generation]) -> list[Generation]:
    """Of each key its last row, in order of publication."""
    newest: dict[tuple[str, str, str], Generation] = {}
    for row in rows:
        newest.pop(row.key, None)
        newest[row.key] = row
    return list(newest.values())


def _from_row(row: dict[str, Any]) -> Generation:
    return Generation(**{**row, "properties": json.loads(row["properties"])})


def _to_rows(generations: list[Generation], first: int) -> pa.Table:
    now = datetime.now(UTC)
    rows = [
        {
            **{name: getattr(generation, name) for name in LOG_SCHEMA.names},
            "sequence": first + place,
            "published_at": now,
            "properties": _canonical(generation.properties),
        }
        for place, generation in enumerate(generations)
    ]
    return pa.Table.from_pylist(rows, schema=LOG_SCHEMA)
