"""`ingest`: raw event tables in, an event log out. Out of core, atomic, and a no-op where nothing has changed."""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from alure.engine.config import EventsConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events.fingerprints import FINGERPRINTS_FILE
from alure.engine.events.indices import Indices, build_indices, count, write_items, write_users
from alure.engine.events.inputs import EVENT_COLUMNS, ID_COLUMNS, ITEM_COLUMNS, Inputs, first_line, nearest, read_inputs
from alure.engine.events.manifest import FORMAT_VERSION, MANIFEST_FILE, IdType, Manifest
from alure.engine.events.ordering import SourceShape, Written, write_sequences
from alure.engine.events.quarantine import check_share, count_reasons, write_quarantine
from alure.engine.events.reader import Events
from alure.engine.events.replacing import building, check_replaceable, publish, recover
from alure.engine.events.report import REPORT_FILE, IngestReport, SourceReport
from alure.engine.events.staging import (
    FUTURE,
    LAST_SECOND,
    Rules,
    event_findings,
    item_findings,
    stage,
    usual_lengths,
)
from alure.engine.progress import say, track

ONLY_SOURCE = "events"  # the one source of a log without that column
MOST_SOURCES = 256  # each is a module of the model; a column of thousands of values is no source


def ingest(config: EventsConfig, out: Path | str) -> IngestReport:
    """Validate, sort and group the events of `config.inputs` into the event log `out`.

    Bad rows go to the Delta table `out`/quarantine with a reason. Where the same inputs (paths, sizes, times) were
    ingested with the same options before, nothing is done and the report says `unchanged`. `out` is replaced as a whole
    at the very end, so a killed ingest leaves what was there.

    Raises InputError where the input as a whole cannot be read, AlureError where more than `max_quarantine_share` of
    its rows are bad (they are then in the Delta table `out`.quarantine). Copies of a row that equal it in every column
    read, and rows of sources not asked for, are quarantined too but do not count towards that share.
    """
    for name, given in (("sources", config.sources), ("ad_sources", config.ad_sources)):
        if given == []:
            raise InputError(f"events.{name}: expected at least one source, got []; leave it out to take all")
    out = Path(out)
    recover(out)
    check_replaceable(out)
    events = read_inputs(config.inputs, EVENT_COLUMNS, ("user_id", "timestamp", "item_id"), config.columns)
    items = None
    if config.items is not None:
        items = read_inputs([config.items], ITEM_COLUMNS, ("item_id",), item_mapping(config, config.items))
        events, items = with_same_ids(events, items)
    fingerprint = fingerprint_of(config, events, items)
    if is_log_of(out, fingerprint):
        say(f"ingest: {out} is up to date: the same inputs with the same options made it")
        return IngestReport.read(out).model_copy(update={"unchanged": True})
    with building(out) as folder:
        report = Ingest(config, events, items, out, folder).run(fingerprint)
        publish(folder, out)
    for note in report.notes:
        say(f"ingest: {note}")
    if report.ignored_columns:
        named = ", ".join(report.ignored_columns)
        say(f"ingest: columns that are not read: {named}; --map, or events.columns, says which of ours they are")
    return report


def item_mapping(config: EventsConfig, items: Path) -> dict[str, str]:
    """The events' mapping as far as the items file has those columns; its own names otherwise."""
    groups = read_inputs([items], {}, (), {}).groups
    theirs = {column for group in groups for column, _ in group.columns}
    return {ours: name for ours, name in config.columns.items() if ours in ITEM_COLUMNS and name in theirs}


def with_same_ids(events: Inputs, items: Inputs) -> tuple[Inputs, Inputs]:
    """Both with the id types of either, which must not contradict each other."""
    for column in ID_COLUMNS:
        first, second = events.kinds.get(column), items.kinds.get(column)
        if first and second and first != second:
            raise InputError(
                f"column {column} has mixed types: {first} in {events.files[0].path}, {second} in "
                f"{items.files[0].path}; convert one of them"
            )
    ids = {column: kind for column, kind in {**items.kinds, **events.kinds}.items() if column in ID_COLUMNS}
    return replace(events, kinds={**ids, **events.kinds}), replace(items, kinds={**ids, **items.kinds})


def fingerprint_of(config: EventsConfig, events: Inputs, items: Inputs | None) -> str:
    """Of what decides the log's content: the files' identities and the options."""
    files = [[file.identity for file in inputs.files] for inputs in (events, items) if inputs is not None]
    elsewhere = {"inputs", "items", "social", "memory_limit", "temp_directory"}
    options = config.model_dump(mode="json", exclude=elsewhere)
    return hashlib.sha256(json.dumps([FORMAT_VERSION, files, options], sort_keys=True).encode()).hexdigest()


def with_future(fingerprint: str, future_rows: int) -> str:
    """The log's, whose content the inputs decide together with the day: rows of the future become good ones."""
    return hashlib.sha256(f"{fingerprint} {future_rows}".encode()).hexdigest() if future_rows else fingerprint


def is_log_of(out: Path, fingerprint: str) -> bool:
    if not (out / MANIFEST_FILE).is_file() or not (out / REPORT_FILE).is_file():
        return False
    try:
        manifest = Manifest.read(out)
    except InputError:
        return False  # damaged, or of another format: made anew
    return not manifest.is_due() and manifest.fingerprint == with_future(
        fingerprint, manifest.quarantine.get(FUTURE, 0)
    )


@contextmanager
def connect(config: EventsConfig, folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in memory; what exceeds the limit spills to a folder that is removed at the end.

    A database file instead would be compressed and checkpointed for nothing: globo took 8.4 s with one, 4.7 s without.
    """
    home = config.temp_directory or folder
    home.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=home))
    options = {"memory_limit": config.memory_limit, "temp_directory": str(work / "spill"), "TimeZone": "UTC"}
    try:
        try:
            con = duckdb.connect(":memory:", config={**options, "autoinstall_known_extensions": "false"})
        except duckdb.Error as error:
            raise InputError(f"events.memory_limit: {config.memory_limit!r}: {first_line(error)}") from None
        with con:
            yield con
    except duckdb.OutOfMemoryException as error:
        raise AlureError(f"ingest ran out of memory: {first_line(error)}; raise events.memory_limit") from None
    except duckdb.Error as error:
        raise AlureError(f"ingest failed in DuckDB: {first_line(error)}") from error
    finally:
        shutil.rmtree(work)


class Ingest:
    """One run, step by step; `folder` becomes the log."""

    def __init__(self, config: EventsConfig, events: Inputs, items: Inputs | None, out: Path, folder: Path) -> None:
        self.config, self.events, self.items, self.out, self.folder = config, events, items, out, folder
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.notes = [*events.hints, *(items.hints if items else ())]
        self.rules, self.item_rules = Rules(), Rules()
        self.rows = 0
        self.next_timestamp: int | None = None  # the earliest of the future

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 3)

    def run(self, fingerprint: str) -> IngestReport:
        with connect(self.config, self.folder) as con:
            with self.step("validate"):
                self.validate(con)
            with self.step("index"):
                sources = self.find_sources(con)
                indices = build_indices(con, sources, self.items is not None)
                shapes = self.find_shapes(con, sources)
            with self.step("order"), track("Ordering events", count(con, "good_events"), "events") as bar:
                written = write_sequences(con, shapes, indices, self.folder, bar)
            with self.step("items"):
                write_users(con, self.folder, np.sum(written.lengths, axis=0))
                dims = self.item_rules.dense_dims.get("", 0), self.item_rules.semantic_levels.get("", 0)
                codes = write_items(con, self.folder, written.item_events, dims)
                written.semantic_codes = max(written.semantic_codes, codes)
            with self.step("quarantine"):
                reasons = self.quarantine(con, written)
        manifest = self.manifest(shapes, indices, written, reasons, fingerprint)
        manifest.write(self.folder)
        with self.step("fingerprints"):
            np.save(self.folder / FINGERPRINTS_FILE, Events.open(self.folder).fingerprints(), allow_pickle=False)
        report = self.report(manifest, indices, written)
        report.write(self.folder)
        return report

    def staged(self) -> dict[str, Inputs]:
        return {"event_rows": self.events} | ({"item_rows": self.items} if self.items else {})

    def validate(self, con: duckdb.DuckDBPyConnection) -> None:
        """Stage all rows with their reasons; stop here where too many are bad."""
        sources = self.config.sources
        only = None
        if "source" not in self.events.kinds:
            if sources and len(sources) > 1:
                raise InputError(
                    f"{self.events.files[0].path}: column source is missing, and events.sources names {len(sources)}; "
                    "name the column with --map source=COLUMN"
                )
            only = sources[0] if sources else ONLY_SOURCE
        self.rules = Rules(
            latest=int(time.time()) if self.config.latest is None else self.config.latest,
            sources=None if sources is None else tuple(sources),
            only_source=only,
        )
        self.rules = replace(
            self.rules,
            dense_dims=usual_lengths(con, self.events, "dense", "source", self.rules),
            semantic_levels=usual_lengths(con, self.events, "semantic_ids", "source", self.rules),
        )
        known = list(EVENT_COLUMNS)
        stage(con, "event_rows", self.events, known, self.rules, event_findings(self.events.kinds, self.rules))
        self.rows, reasons = count_reasons(con, "event_rows")
        if not self.rows:
            raise InputError(f"input: {self.events.files[0].path} has no rows, nor has any other file given")
        self.check_unit(con)
        ((self.next_timestamp,),) = con.execute(
            f"SELECT min(timestamp) FROM event_rows WHERE reason = '{FUTURE}' AND timestamp <= {LAST_SECOND}"
        ).fetchall()
        self.check_health(con, self.rows, reasons, "events")
        if self.items is not None:
            self.item_rules = Rules(
                dense_dims=usual_lengths(con, self.items, "dense", None, self.rules),
                semantic_levels=usual_lengths(con, self.items, "semantic_ids", None, self.rules),
            )
            findings = item_findings(self.items.kinds, self.item_rules)
            stage(con, "item_rows", self.items, list(ITEM_COLUMNS), self.item_rules, findings)
            con.execute(
                "UPDATE item_rows SET reason = 'duplicate_item' WHERE rowid IN "
                "(SELECT rowid FROM item_rows WHERE reason IS NULL "
                "QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY origin, row_number) > 1)"
            )
            item_rows, reasons = count_reasons(con, "item_rows")
            self.check_health(con, item_rows, reasons, "items")

    def check_unit(self, con: duckdb.DuckDBPyConnection) -> None:
        """Whole seconds are expected; a column of milliseconds would all be future."""
        ((late, known, largest),) = con.execute(
            f"SELECT count(*) FILTER (timestamp > {LAST_SECOND}), count(timestamp), max(timestamp) FROM event_rows"
        ).fetchall()
        if late * 2 > known:
            unit, factor = ("milliseconds", "1,000") if largest < 10**14 else ("microseconds", "1,000,000")
            if largest >= 10**17:
                unit, factor = "nanoseconds", "1,000,000,000"
            raise InputError(
                f"{self.events.files[0].path}: column timestamp: expected unix seconds, got values like {largest} that "
                f"look like {unit}; divide them by {factor}, or store them as an Arrow timestamp"
            )

    def check_health(self, con: duckdb.DuckDBPyConnection, rows: int, reasons: dict[str, int], what: str) -> None:
        quarantine = self.out.with_name(self.out.name + ".quarantine")
        try:
            check_share(rows, reasons, self.config.max_quarantine_share, quarantine, what)
        except AlureError:
            table = {"events": "event_rows", "items": "item_rows"}[what]
            write_quarantine(con, quarantine, {table: self.staged()[table]})
            raise
        if (quarantine / "_delta_log").is_dir() and what == "events":
            shutil.rmtree(quarantine)  # of a run that stopped, now overtaken

    def find_sources(self, con: duckdb.DuckDBPyConnection) -> list[str]:
        """The log's sources in order: as configured, else sorted. A configured one may be empty."""
        found = con.execute("SELECT DISTINCT source FROM event_rows WHERE reason IS NULL ORDER BY source").fetchall()
        present = [source for (source,) in found]
        if not present:
            seen = con.execute("SELECT DISTINCT source FROM event_rows WHERE source IS NOT NULL LIMIT 20").fetchall()
            named = f"its sources are {', '.join(sorted(s for (s,) in seen))}" if seen else "none names a source"
            raise InputError(f"input: no good row is left of {self.rows:,}; {named}, asked for: {self.config.sources}")
        if len(present) > MOST_SOURCES:
            raise InputError(
                f"column source: expected at most {MOST_SOURCES} values, got {len(present):,}, such as "
                f"{', '.join(present[:3])}; name another column with --map source=COLUMN"
            )
        sources = list(dict.fromkeys(self.config.sources or present))
        empty = [source for source in sources if source not in present]
        if empty:
            self.notes.append(f"sources without an event: {', '.join(empty)}")
        for source in self.config.ad_sources or []:
            if source not in sources:
                near = nearest(source, sources)
                raise InputError(
                    f"events.ad_sources: {source!r} is not a source of the input; it has {', '.join(sources)}"
                    + (f"; the nearest is {near}" if near else "")
                )
        return sources

    def find_shapes(self, con: duckdb.DuckDBPyConnection, sources: list[str]) -> list[SourceShape]:
        """Which columns each source has: those with at least one value."""
        optional = ("event_type", "value", "utc_offset", "dense", "semantic_ids")
        counted = con.execute(
            f"SELECT source, {', '.join(f'count({c})' for c in optional)} FROM good_events GROUP BY source"
        ).fetchall()
        present = {source: {c for c, n in zip(optional, counts) if n} for source, *counts in counted}
        shared = [c for c, table in (("account", "accounts"), ("category", "categories")) if count(con, table)]
        shapes = []
        for source in sources:
            dims = self.rules.dense_dims.get(source, 0), self.rules.semantic_levels.get(source, 0)
            own = present.get(source, set())
            own -= {c for c, width in zip(("dense", "semantic_ids"), dims) if not width}
            columns = (*shared, *(c for c in optional if c in own))
            shapes.append(SourceShape(source, columns, *(w if c in own else 0 for c, w in zip(optional[3:], dims))))
        return shapes

    def quarantine(self, con: duckdb.DuckDBPyConnection, written: Written) -> dict[str, int]:
        """Mark the duplicates, write the quarantine table, and count everything in it by reason."""
        if written.duplicates:
            copies = pa.table({"row": pa.array(np.concatenate(written.duplicates))})
            con.register("copies", copies)
            con.execute("UPDATE event_rows SET reason = 'duplicate' FROM copies WHERE event_rows.rowid = copies.row")
            con.unregister("copies")
        write_quarantine(con, self.folder / "quarantine", self.staged())
        reasons: dict[str, int] = {}
        for table in self.staged():
            for reason, rows in count_reasons(con, table)[1].items():
                reasons[reason] = reasons.get(reason, 0) + rows
        return dict(sorted(reasons.items()))

    def manifest(
        self, shapes: list[SourceShape], indices: Indices, written: Written, reasons: dict[str, int], fingerprint: str
    ) -> Manifest:
        def id_type(column: str) -> IdType:
            return "string" if self.events.kinds.get(column) == "string" else "int64"

        sources = [shape.name for shape in shapes]
        return Manifest(
            sources=sources,
            ad_sources=[s for s in sources if self.config.ad_sources is None or s in self.config.ad_sources],
            event_types=indices.event_types,
            num_users=indices.num_users,
            num_items=indices.num_items,
            num_accounts=indices.num_accounts,
            num_categories=indices.num_categories,
            num_events=sum(int(lengths.sum()) for lengths in written.lengths),
            first_timestamp=written.first_timestamp,
            last_timestamp=written.last_timestamp,
            dense_dim=self.item_rules.dense_dims.get("", 0),
            semantic_levels=self.item_rules.semantic_levels.get("", 0),
            semantic_codes=written.semantic_codes,
            event_dense_dims={s.name: s.dense_dim for s in shapes if s.dense_dim},
            event_semantic_levels={s.name: s.semantic_levels for s in shapes if s.semantic_levels},
            countries=indices.countries,
            source_counts={s.name: int(lengths.sum()) for s, lengths in zip(shapes, written.lengths)},
            quarantine=reasons,
            user_id_type=id_type("user_id"),
            item_id_type=id_type("item_id"),
            account_id_type=id_type("account_id") if indices.num_accounts else None,
            category_id_type=id_type("category_id") if indices.num_categories else None,
            fingerprint=with_future(fingerprint, reasons.get(FUTURE, 0)),
            next_timestamp=self.next_timestamp if self.config.latest is None else None,
        )

    def report(self, manifest: Manifest, indices: Indices, written: Written) -> IngestReport:
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        return IngestReport(
            out=self.out,
            rows=self.rows,
            num_events=manifest.num_events,
            num_users=manifest.num_users,
            num_items=manifest.num_items,
            num_accounts=manifest.num_accounts,
            num_categories=manifest.num_categories,
            users_by_country={country.name: country.num_users for country in manifest.countries},
            users_of_several_countries=indices.users_of_several_countries,
            first_timestamp=manifest.first_timestamp,
            last_timestamp=manifest.last_timestamp,
            sources={s: SourceReport.of_lengths(lengths) for s, lengths in zip(manifest.sources, written.lengths)},
            quarantine=manifest.quarantine,
            quarantine_table=self.out / "quarantine",
            ignored_columns=sorted({*self.events.ignored, *(self.items.ignored if self.items else ())}),
            notes=self.notes,
            seconds=self.seconds,
            total_seconds=round(time.monotonic() - self.started, 3),
            num_bytes=size,
        )
