"""First pass, in DuckDB: read every row once, bring it to our columns, and give each bad row its reason.

Makes the tables `event_rows` and `item_rows`: our columns, `reason` (null = good), `origin` (file) and `row_number` in
it.
"""

import glob
from dataclasses import dataclass, field

import duckdb
import pyarrow as pa

from alure.engine.errors import AlureError, InputError
from alure.engine.events.inputs import ID_COLUMNS, FileGroup, InputFile, Inputs, first_line

# Later than this (year 5138) is no second: what stands there is milliseconds or finer.
LAST_SECOND = 100_000_000_000
FUTURE = "future_timestamp"
SQL_TYPES = {
    "user_id": "BIGINT", "timestamp": "BIGINT", "source": "VARCHAR", "item_id": "BIGINT", "account_id": "BIGINT",
    "category_id": "BIGINT", "country": "VARCHAR", "event_type": "VARCHAR", "value": "FLOAT", "utc_offset": "INTEGER",
    "dense": "FLOAT[]", "semantic_ids": "INTEGER[]", "title": "VARCHAR",
}  # fmt: skip
# Bytes of a country's or a source's name: percent-encoded, it has to fit into the 255 of a folder's.
LONGEST_NAME = 80
# Columns whose cast may fail; `unfit_…` tells a value that does not fit from one that was missing from the start.
CAST_COLUMNS = (*ID_COLUMNS, "value", "utc_offset", "dense", "semantic_ids")


@dataclass(frozen=True)
class Rules:
    """What a good row is."""

    latest: int = LAST_SECOND  # seconds
    sources: tuple[str, ...] | None = None  # None: all
    only_source: str | None = None  # the name of the one source where the input has no such column
    dense_dims: dict[str, int] = field(default_factory=dict)  # source ("" for items): length of its dense vectors
    semantic_levels: dict[str, int] = field(default_factory=dict)


def text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def scan(group: FileGroup, files: tuple[InputFile, ...] | None = None) -> str:
    """read_parquet(...) of the group, with `filename` and `file_row_number`."""
    members = group.files if files is None else files
    paths = ", ".join(text(glob.escape(str(file.path))) for file in members)
    partitions = "hive_partitioning = false"
    if keys := members[0].partitions:
        types = dict(group.columns)
        listed = ", ".join(f"{name(k)}: {'BIGINT' if pa.types.is_integer(types[k]) else 'VARCHAR'}" for k in keys)
        partitions = f"hive_partitioning = true, hive_types = {{{listed}}}"
    return f"read_parquet([{paths}], filename = true, file_row_number = true, {partitions})"


def sql_type(ours: str, kinds: dict[str, str]) -> str:
    return "VARCHAR" if ours in ID_COLUMNS and kinds.get(ours) == "string" else SQL_TYPES[ours]


def seconds(column: str, type_: pa.DataType) -> str:
    """Unix seconds, rounded down; a number too large for int64 becomes the largest one."""
    if not pa.types.is_timestamp(type_):
        return f"CASE WHEN {column} IS NOT NULL THEN COALESCE(TRY_CAST({column} AS BIGINT), {2**63 - 1}) END"
    ticks, per_second = ticks_of(column, type_)
    return f"{ticks} // {per_second} - CAST({ticks} % {per_second} < 0 AS BIGINT)"  # // rounds towards 0


def ticks_of(column: str, type_: pa.TimestampType) -> tuple[str, int]:
    """A timestamp as a number, as DuckDB reads it, and how many make a second."""
    return (f"epoch_ns({column})", 10**9) if type_.unit == "ns" else (f"epoch_us({column})", 10**6)


def json_value(column: str, type_: pa.DataType) -> str:
    """A column for a row's JSON. DuckDB 2.0 dies of the text of a timestamp near −2⁶³, so that is its number."""
    if not pa.types.is_timestamp(type_):
        return column
    ticks, _ = ticks_of(column, type_)
    return f"CASE WHEN {ticks} < {-922 * 10**16} THEN CAST({ticks} AS VARCHAR) ELSE CAST({column} AS VARCHAR) END"


def normalised(group: FileGroup, known: list[str], kinds: dict[str, str], rules: Rules) -> str:
    """SELECT of our columns out of the group's files, not judged yet."""
    columns = []
    for ours in known:
        type_ = sql_type(ours, kinds)
        if ours in group.names:
            theirs = name(group.names[ours])
            expression = f"TRY_CAST({theirs} AS {type_})"
            unfit = f"({expression} IS NULL AND {theirs} IS NOT NULL)"
            if ours == "timestamp":
                expression = seconds(theirs, group.types[ours])
            if ours == "country":
                expression = f"NULLIF({expression}, '')"
        else:
            absent = text(rules.only_source) if ours == "source" and rules.only_source is not None else "NULL"
            expression, unfit = f"CAST({absent} AS {type_})", "false"
        columns.append(f"{expression} AS {ours}")
        if ours in CAST_COLUMNS:
            columns.append(f"{unfit} AS unfit_{ours}")
    return f"SELECT {', '.join(columns)}, filename AS origin, file_row_number AS row_number FROM {scan(group)}"


def vector_rules(kinds: dict[str, str], rules: Rules, source: str) -> list[tuple[str, str]]:
    def expected(lengths: dict[str, int]) -> str:
        cases = " ".join(f"WHEN {text(key)} THEN {length}" for key, length in lengths.items())
        return f"(CASE {source} {cases} ELSE 0 END)" if cases else "0"

    findings = []
    if "dense" in kinds:
        finite = "isfinite(list_sum(CAST(dense AS DOUBLE[]))) AND list_count(dense) = len(dense)"
        findings += [
            (f"len(dense) <> {expected(rules.dense_dims)}", "dense_wrong_length"),
            (f"unfit_dense OR (len(dense) > 0 AND NOT COALESCE({finite}, false))", "dense_not_finite"),
        ]
    if "semantic_ids" in kinds:
        whole = "list_min(semantic_ids) >= 0 AND list_count(semantic_ids) = len(semantic_ids)"
        bad = f"unfit_semantic_ids OR (len(semantic_ids) > 0 AND NOT COALESCE({whole}, false))"
        findings += [
            (f"len(semantic_ids) <> {expected(rules.semantic_levels)}", "semantic_ids_wrong_length"),
            (bad, "semantic_ids_out_of_range"),
        ]
    return findings


def event_findings(kinds: dict[str, str], rules: Rules) -> list[tuple[str, str]]:
    """(condition, reason): the first that holds is the row's reason."""
    findings = [
        ("unfit_user_id", "user_id_out_of_range"),
        ("user_id IS NULL", "null_user"),
        ("timestamp IS NULL", "null_timestamp"),
        ("unfit_item_id", "item_id_out_of_range"),
        ("item_id IS NULL", "null_item"),
        ("timestamp < 0", "negative_timestamp"),
        (f"timestamp > {min(rules.latest, LAST_SECOND)}", FUTURE),
        ("source IS NULL", "null_source"),
        (f"strlen(source) > {LONGEST_NAME}", "source_too_long"),
        (f"strlen(country) > {LONGEST_NAME}", "country_too_long"),
    ]
    if rules.sources is not None:
        findings.append((f"source NOT IN ({', '.join(text(s) for s in rules.sources)})", "unknown_source"))
    findings += [
        ("unfit_account_id", "account_id_out_of_range"),
        ("unfit_category_id", "category_id_out_of_range"),
        ("unfit_utc_offset", "utc_offset_out_of_range"),
        ("unfit_value OR NOT isfinite(value)", "value_not_finite"),
    ]
    return findings + vector_rules(kinds, rules, "source")


def item_findings(kinds: dict[str, str], rules: Rules) -> list[tuple[str, str]]:
    findings = [
        ("unfit_item_id", "item_id_out_of_range"),
        ("item_id IS NULL", "null_item"),
        ("unfit_account_id", "account_id_out_of_range"),
        ("unfit_category_id", "category_id_out_of_range"),
    ]
    return findings + vector_rules(kinds, rules, "''")


def stage(
    con: duckdb.DuckDBPyConnection, table: str, inputs: Inputs, known: list[str], rules: Rules,
    findings: list[tuple[str, str]],
) -> None:  # fmt: skip
    """CREATE TABLE of all rows of `inputs` with our columns and their reason; reads every file once."""
    parts = " UNION ALL ".join(normalised(group, known, inputs.kinds, rules) for group in inputs.groups)
    cases = " ".join(f"WHEN {condition} THEN {text(reason)}" for condition, reason in findings)
    columns = f"{', '.join(known)}, CASE {cases} END AS reason, origin, row_number"
    read(con, f"CREATE TABLE {table} AS SELECT {columns} FROM ({parts})", inputs)


def usual_lengths(
    con: duckdb.DuckDBPyConnection, inputs: Inputs, column: str, source: str | None, rules: Rules
) -> dict[str, int]:
    """Per source, the most frequent length above 0 of a list column (the shorter of two equally frequent)."""
    parts = []
    for group in inputs.groups:
        if column in group.names:
            by = "''" if source is None else name(group.names[source]) if source in group.names else "NULL"
            if source is not None and source not in group.names and rules.only_source is not None:
                by = text(rules.only_source)
            parts.append(
                f"SELECT CAST({by} AS VARCHAR) AS source, len({name(group.names[column])}) AS length FROM {scan(group)}"
            )
    if not parts:
        return {}
    counted = (
        f"SELECT source, length, count(*) AS n FROM ({' UNION ALL '.join(parts)}) "
        "WHERE length > 0 AND source IS NOT NULL GROUP BY ALL"
    )
    best = (
        f"SELECT source, length FROM ({counted}) "
        "QUALIFY row_number() OVER (PARTITION BY source ORDER BY n DESC, length) = 1"
    )
    return dict(read(con, best, inputs).fetchall())


def read(con: duckdb.DuckDBPyConnection, sql: str, inputs: Inputs) -> duckdb.DuckDBPyConnection:
    """Run a query over the input files; where it fails, say which file is to blame."""
    try:
        return con.execute(sql)
    except duckdb.OutOfMemoryException as error:
        raise AlureError(f"ingest ran out of memory: {first_line(error)}; raise events.memory_limit") from None
    except duckdb.Error as error:
        blame_file(con, inputs)
        raise AlureError(f"ingest failed in DuckDB: {first_line(error)}") from error


def blame_file(con: duckdb.DuckDBPyConnection, inputs: Inputs) -> None:
    for group in inputs.groups:
        for file in group.files:
            for ours, theirs in group.names.items():
                try:
                    con.execute(f"SELECT max(hash({name(theirs)})) FROM {scan(group, (file,))}").fetchall()
                except duckdb.Error as error:
                    if isinstance(error, duckdb.ConversionException) and pa.types.is_timestamp(group.types[ours]):
                        raise InputError(
                            f"input: {file.path}: column {theirs}: a time in milliseconds lies beyond the years that "
                            "microseconds reach (290,308 BC to 294,246); mend that row, or store int64 seconds: a "
                            "number that is no second goes to quarantine"
                        ) from None
                    raise InputError(f"input: {file.path} is damaged or cannot be read: {first_line(error)}") from None
