"""Original ids to dense indices, in DuckDB: the tables `users`, `items`, `accounts`, `categories`, `event_types`,
`sources` and `country_names`.

Every order is by value, never by arrival, so the same rows in any order make the same log.
"""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alure.engine.errors import AlureError, InputError
from alure.engine.events.columns import ColumnWriter
from alure.engine.events.keys import stable_keys
from alure.engine.events.manifest import Country

MAX_INDEX = 2**31 - 1
NO_COUNTRY = "all"
MOST_COUNTRIES = 5_000  # each is a folder in every generation
MOST_EVENT_TYPES = 2**15 - 1  # an index of int16
ITEM_ROWS = 65_536  # items a record batch


@dataclass(frozen=True)
class Indices:
    num_users: int
    num_items: int
    num_accounts: int
    num_categories: int
    event_types: list[str]
    countries: list[Country]
    users_of_several_countries: int


def build_indices(con: duckdb.DuckDBPyConnection, sources: list[str], has_items: bool) -> Indices:
    """From the staged rows; `sources` in the log's order."""
    con.execute("CREATE VIEW good_events AS SELECT * FROM event_rows WHERE reason IS NULL")
    if has_items:
        con.execute("CREATE VIEW good_items AS SELECT * FROM item_rows WHERE reason IS NULL")
    con.execute("CREATE TABLE sources (source VARCHAR, index SMALLINT)")
    con.executemany("INSERT INTO sources VALUES (?, ?)", [[source, i] for i, source in enumerate(sources)])
    con.execute(
        "CREATE TABLE country_names AS "
        "SELECT country, CAST(row_number() OVER (ORDER BY country) - 1 AS INTEGER) AS index "
        "FROM (SELECT DISTINCT country FROM good_events WHERE country IS NOT NULL)"
    )
    check_few(con, "country_names", "country", MOST_COUNTRIES)
    several = index_users(con)
    index_items(con, has_items)
    con.execute(
        "CREATE TABLE event_types AS "
        "SELECT event_type, TRY_CAST(row_number() OVER (ORDER BY event_type) - 1 AS SMALLINT) AS index "
        "FROM (SELECT DISTINCT event_type FROM good_events WHERE event_type IS NOT NULL)"
    )
    check_few(con, "event_types", "event_type", MOST_EVENT_TYPES)
    sizes = {table: count(con, table) for table in ("users", "items", "accounts", "categories")}
    for table, size in sizes.items():
        if size > MAX_INDEX:
            raise AlureError(f"{table}: {size:,} is more than an index can hold ({MAX_INDEX:,}); split the log")
    countries = con.execute(
        "SELECT country, min(index), count(*) FROM users GROUP BY country ORDER BY country"
    ).fetchall()
    event_types = con.execute("SELECT event_type FROM event_types ORDER BY index").fetchall()
    return Indices(
        num_users=sizes["users"],
        num_items=sizes["items"],
        num_accounts=sizes["accounts"],
        num_categories=sizes["categories"],
        event_types=[event_type for (event_type,) in event_types],
        countries=[Country(name=c, first_user=first, num_users=n) for c, first, n in countries],
        users_of_several_countries=several,
    )


def count(con: duckdb.DuckDBPyConnection, table: str) -> int:
    ((rows,),) = con.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(rows)


def check_few(con: duckdb.DuckDBPyConnection, table: str, column: str, most: int) -> None:
    """Raise InputError where a column that names groups has as many values as one that names things."""
    found = count(con, table)
    if found > most:
        some = con.execute(f"SELECT {column} FROM {table} ORDER BY {column} LIMIT 3").fetchall()
        raise InputError(
            f"column {column}: expected at most {most:,} values, got {found:,}, such as "
            f"{', '.join(value for (value,) in some)}; name another column with --map {column}=COLUMN"
        )


def index_users(con: duckdb.DuckDBPyConnection) -> int:
    """Users by (country, user_id); one of several countries belongs to the latest. Returns how many those are."""
    con.execute(
        "CREATE TEMP TABLE user_countries AS "
        "SELECT user_id, country, max(timestamp) AS latest FROM good_events GROUP BY user_id, country"
    )
    con.execute(
        "CREATE TABLE users AS "
        "SELECT *, CAST(row_number() OVER (ORDER BY country, user_id) - 1 AS INTEGER) AS index FROM "
        f"(SELECT user_id, COALESCE(country, '{NO_COUNTRY}') AS country FROM user_countries QUALIFY row_number() OVER "
        "(PARTITION BY user_id ORDER BY (country IS NOT NULL) DESC, latest DESC, country) = 1)"
    )
    several = "SELECT user_id FROM user_countries WHERE country IS NOT NULL GROUP BY user_id HAVING count(*) > 1"
    return count(con, f"({several})")


def index_items(con: duckdb.DuckDBPyConnection, has_items: bool) -> None:
    """Items by item_id, of events and items file; account and category from the file, else from the latest event."""
    given = "SELECT item_id, account_id, category_id, title, dense, semantic_ids FROM good_items"
    if not has_items:
        given = (
            "SELECT item_id, account_id, category_id, NULL::VARCHAR AS title, NULL::FLOAT[] AS dense, "
            "NULL::INTEGER[] AS semantic_ids FROM good_events WHERE false"
        )
    con.execute(f"CREATE TEMP VIEW given_items AS {given}")
    con.execute("CREATE TEMP TABLE item_ids AS SELECT item_id FROM good_events UNION SELECT item_id FROM given_items")
    for column in ("account_id", "category_id"):
        con.execute(
            f"CREATE TEMP TABLE latest_{column} AS SELECT item_id, {column} FROM (SELECT item_id, {column}, "
            f"max(timestamp) AS latest FROM good_events WHERE {column} IS NOT NULL GROUP BY item_id, {column}) "
            f"QUALIFY row_number() OVER (PARTITION BY item_id ORDER BY latest DESC, {column}) = 1"
        )
    for table, column in (("accounts", "account_id"), ("categories", "category_id")):
        con.execute(
            f"CREATE TABLE {table} AS SELECT {column}, "
            f"CAST(row_number() OVER (ORDER BY {column}) - 1 AS INTEGER) AS index FROM ("
            f"SELECT {column} FROM good_events WHERE {column} IS NOT NULL "
            f"UNION SELECT {column} FROM given_items WHERE {column} IS NOT NULL)"
        )
    con.execute(
        "CREATE TABLE items AS SELECT i.item_id, CAST(row_number() OVER (ORDER BY i.item_id) - 1 AS INTEGER) AS index, "
        "COALESCE(a.index, -1) AS account, COALESCE(c.index, -1) AS category FROM item_ids i "
        "LEFT JOIN given_items g ON g.item_id = i.item_id "
        "LEFT JOIN latest_account_id la ON la.item_id = i.item_id "
        "LEFT JOIN latest_category_id lc ON lc.item_id = i.item_id "
        "LEFT JOIN accounts a ON a.account_id = COALESCE(g.account_id, la.account_id) "
        "LEFT JOIN categories c ON c.category_id = COALESCE(g.category_id, lc.category_id)"
    )


def write_users(con: duckdb.DuckDBPyConnection, out: Path, num_events: np.ndarray) -> None:
    table = con.sql("SELECT user_id, country FROM users ORDER BY index").to_arrow_table()
    pq.write_table(table.append_column("num_events", pa.array(num_events)), out / "users.parquet", compression="zstd")


def write_items(con: duckdb.DuckDBPyConnection, out: Path, num_events: np.ndarray, dims: tuple[int, int]) -> int:
    """items.parquet, accounts.parquet, categories.parquet and items/*.npy. dims: (dense_dim, semantic_levels).

    Returns the largest semantic id + 1.
    """
    codes = 0
    arrays = out / "items"
    arrays.mkdir()
    keys = {}
    for table, column in (("accounts", "account_id"), ("categories", "category_id")):
        ids = con.sql(f"SELECT {column} FROM {table} ORDER BY index").to_arrow_table()
        keys[table] = stable_keys(ids.column(column))
        pq.write_table(ids.append_column("key", pa.array(keys[table])), out / f"{table}.parquet", compression="zstd")
    items = con.sql(
        "SELECT i.item_id, i.account, i.category, g.title FROM items i "
        "LEFT JOIN given_items g ON g.item_id = i.item_id ORDER BY i.index"
    ).to_arrow_table()
    items = items.add_column(3, "num_events", pa.array(num_events))
    pq.write_table(items, out / "items.parquet", compression="zstd")
    save_keys(arrays / "key.npy", stable_keys(items.column("item_id")))
    for table, column, file in (("accounts", "account", "account_key"), ("categories", "category", "category_key")):
        index = items.column(column).to_numpy()
        save_keys(arrays / f"{file}.npy", np.append(keys[table], -1)[index])
    for column, width, dtype, missing in (("dense", dims[0], "<f4", 0), ("semantic_ids", dims[1], "<i4", -1)):
        if not width:
            continue
        lists = con.sql(
            f"SELECT g.{column} FROM items i LEFT JOIN given_items g ON g.item_id = i.item_id ORDER BY i.index"
        )
        with ColumnWriter(arrays / f"{column}.npy", dtype, width) as writer:
            for batch in lists.to_arrow_reader(ITEM_ROWS):
                rows = matrix(batch.column(0), width, missing)
                writer.append(rows)
                if column == "semantic_ids":
                    codes = max(codes, int(rows.max()) + 1)
    return codes


def save_keys(path: Path, keys: np.ndarray) -> None:
    np.save(path, keys.astype("<i8"), allow_pickle=False)


def matrix(lists: pa.ListArray, width: int, missing: float) -> np.ndarray:
    """[n, width] of a list column whose lists have `width` elements, or are null or empty: `missing`."""
    values = lists.flatten().to_numpy(zero_copy_only=False)
    whole = np.asarray(lists.is_valid()) & (np.asarray(lists.value_lengths().fill_null(0)) == width)
    rows = np.full((len(lists), width), missing, dtype=values.dtype)
    rows[whole] = values.reshape(-1, width)
    return rows
