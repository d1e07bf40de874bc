"""Rows that are left out: counted by reason, and kept in a Delta table with where they came from."""

from pathlib import Path

import duckdb
import pyarrow as pa
from deltalake import write_deltalake

from alure.engine.errors import AlureError
from alure.engine.events.inputs import Inputs
from alure.engine.events.staging import json_value, name, scan, text

SCHEMA = pa.schema([("origin", pa.string()), ("row_number", pa.int64()), ("row", pa.string()), ("reason", pa.string())])
BATCH_ROWS = 65_536
# Copies of a good row and rows of sources nobody asked for say nothing about the input's health.
HARMLESS = ("duplicate", "duplicate_item", "unknown_source")


def count_reasons(con: duckdb.DuckDBPyConnection, table: str) -> tuple[int, dict[str, int]]:
    """All rows of a staged table, and the bad ones by reason."""
    counts = dict(con.execute(f"SELECT reason, count(*) FROM {table} GROUP BY reason").fetchall())
    total = sum(counts.values())
    counts.pop(None, None)
    return total, dict(sorted(counts.items()))


def write_quarantine(con: duckdb.DuckDBPyConnection, folder: Path, staged: dict[str, Inputs]) -> None:
    """The Delta table `folder`: origin (file), row_number in it, row (JSON as it came), reason.

    staged: table (`event_rows`, `item_rows`): the files it was made from. An empty table where nothing is bad.
    """
    parts = []
    for table, inputs in staged.items():
        if not count_reasons(con, table)[1]:
            continue
        bad = f"(SELECT origin, row_number, reason FROM {table} WHERE reason IS NOT NULL)"
        for group in inputs.groups:
            row = ", ".join(
                f"{text(column)}: {json_value(f'i.{name(column)}', type_)}" for column, type_ in group.columns
            )
            parts.append(
                f"SELECT b.origin, b.row_number, CAST(to_json({{{row}}}) AS VARCHAR) AS row, b.reason "
                f"FROM {scan(group)} i JOIN {bad} b ON i.filename = b.origin AND i.file_row_number = b.row_number"
            )
    if not parts:
        write_deltalake(folder, pa.RecordBatchReader.from_batches(SCHEMA, []), mode="overwrite")
        return
    rows = con.sql(f"SELECT * FROM ({' UNION ALL '.join(parts)}) ORDER BY origin, row_number")
    write_deltalake(folder, rows.to_arrow_reader(BATCH_ROWS).cast(SCHEMA), mode="overwrite")


def check_share(total: int, reasons: dict[str, int], most: float, quarantine: Path, what: str) -> None:
    """Raise AlureError where more than the share `most` of `total` rows is bad."""
    harmful = {reason: count for reason, count in reasons.items() if reason not in HARMLESS}
    bad = sum(harmful.values())
    if bad <= most * total:
        return
    top = sorted(harmful.items(), key=lambda pair: -pair[1])[:5]
    raise AlureError(
        f"{what}: {bad:,} of {total:,} rows ({bad / total:.1%}) are bad, more than max_quarantine_share ({most:.1%}): "
        f"{', '.join(f'{reason} {count:,}' for reason, count in top)}; every one is in the Delta table {quarantine} "
        "with its reason: mend the input, or raise max_quarantine_share"
    )
