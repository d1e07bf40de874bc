"""What may come in: files, folders and Delta tables, columns and their types, times, sources, countries, items."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from support.events import START, make_events, random_table, write_rows
from support.ingest import contents, quarantined, row, run

from alure.engine.config import EventsConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events, ingest

# ---------------------------------------------------------------- inputs as a whole


def test_missing_file_and_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.parquet does not exist"):
        ingest(EventsConfig(inputs=[tmp_path / "nowhere.parquet"]), tmp_path / "log")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no .parquet file"):
        ingest(EventsConfig(inputs=[tmp_path / "empty"]), tmp_path / "log")
    with pytest.raises(InputError, match="got none"):
        ingest(EventsConfig(), tmp_path / "log")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"events.parquet has no rows"):
        run(tmp_path, pa.table({"user_id": pa.array([], pa.int64()), "timestamp": pa.array([], pa.int64()),
                                "item_id": pa.array([], pa.int64())}))  # fmt: skip
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("text", [b"", b"user_id,timestamp,item_id\n1,2,3\n", b"PAR1" + b"\0" * 50])
def test_what_is_not_parquet_is_named(tmp_path: Path, text: bytes) -> None:
    good = write_rows(tmp_path / "good.parquet", [row()])
    (tmp_path / "bad.parquet").write_bytes(text)
    with pytest.raises(InputError, match=r"bad.parquet is not a readable Parquet file"):
        ingest(EventsConfig(inputs=[good, tmp_path / "bad.parquet"]), tmp_path / "log")


def test_a_damaged_page_is_blamed_on_its_file(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.parquet", random_table())
    bad = write_rows(tmp_path / "bad.parquet", random_table(seed=1))
    data = bytearray(bad.read_bytes())
    data[4:3_000] = bytes(255 - b for b in data[4:3_000])  # the footer stays readable
    bad.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"bad.parquet is damaged"):
        ingest(EventsConfig(inputs=[good, bad]), tmp_path / "log")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.parquet", "good.parquet"]


def test_a_missing_column_is_named_with_the_nearest_and_the_option(tmp_path: Path) -> None:
    rows = [{"userid": 1, "timestamp": START, "item_id": 1}]
    with pytest.raises(InputError, match=r"column user_id is missing.*nearest is userid: use --map user_id=userid"):
        run(tmp_path, rows)
    with pytest.raises(InputError, match=r"column uid \(mapped from user_id\) is missing.*has userid, timestamp"):
        run(tmp_path, rows, columns={"user_id": "uid"})
    with pytest.raises(InputError, match=r"'itemid' is not a column of the schema.*nearest is item_id"):
        run(tmp_path, rows, columns={"itemid": "x"})
    events, _ = run(tmp_path, rows, columns={"user_id": "userid"})
    assert events.manifest.sources == ["events"]
    assert events.users.column("user_id").to_pylist() == [1]


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("user_id", [1.5], "expected int or string for user_id, got double"),
        ("item_id", [b"x"], "expected int or string for item_id, got binary"),
        ("timestamp", [1.7e9], "expected int or timestamp for timestamp, got double; convert it to int64 seconds"),
        ("timestamp", ["2026-01-01"], "expected int or timestamp"),
        ("dense", [1.0], "expected list of float or list of int for dense, got double"),
        ("semantic_ids", [[1.5]], "expected list of int for semantic_ids"),
        ("value", ["much"], "expected float or int for value, got string"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, column: str, values: list[Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        run(tmp_path, pa.Table.from_pylist([row(**{column: values[0]})]))


def test_mixed_ids_name_both_files_and_types(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.parquet", [row()])
    two = write_rows(tmp_path / "two.parquet", [row(user_id="1")])
    with pytest.raises(InputError, match=r"user_id has mixed types: int in .*one.parquet, string in .*two.parquet"):
        ingest(EventsConfig(inputs=[one, two]), tmp_path / "log")
    items = write_rows(tmp_path / "items.parquet", [{"item_id": "7"}])
    with pytest.raises(InputError, match=r"item_id has mixed types: int in .*one.parquet, string in .*items.parquet"):
        ingest(EventsConfig(inputs=[one], items=items), tmp_path / "log")


def test_files_of_different_schemas_make_one_log(tmp_path: Path) -> None:
    folder = tmp_path / "input"
    write_rows(folder / "a.parquet", [row(account_id=4)])
    write_rows(folder / "deep" / "b.parquet", pa.table({
        "item_id": pa.array([8], pa.int16()), "source": pa.array(["view"]).dictionary_encode(),
        "timestamp": pa.array([START + 1], pa.timestamp("s")), "user_id": pa.array([2], pa.uint8()), "junk": [{"a": 1}],
    }))  # fmt: skip
    write_rows(folder / "_ignored" / "c.parquet", [row(user_id=99)])
    report = ingest(EventsConfig(inputs=[folder]), tmp_path / "log")
    events = Events.open(tmp_path / "log")
    assert events.users.column("user_id").to_pylist() == [1, 2]
    assert events.manifest.sources == ["ad_click", "view"]
    assert events.manifest.last_timestamp == START + 1
    assert report.ignored_columns == ["junk"]


def test_strings_of_every_arrow_kind(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": pa.array(["é", "b", "b"], pa.large_string()),
            "timestamp": [START] * 3,
            "source": pa.array(["x", "x", "y"]).dictionary_encode(),
            "item_id": pa.array(["日", "p", "日"]).dictionary_encode(),
        }
    )
    events, _ = run(tmp_path, table)
    assert events.users.column("user_id").to_pylist() == ["b", "é"]
    assert events.items.item_ids.to_pylist() == ["p", "日"]
    assert events.manifest.user_id_type == "string"


def test_ignored_columns_are_named_once_with_a_hint(tmp_path: Path) -> None:
    _, report = run(tmp_path, [row(counrty="DE", session=1)])
    assert report.ignored_columns == ["counrty", "session"]
    assert report.notes == ["column counrty is not read; if it is country, use --map country=counrty"]


def test_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in" / "a.parquet", [row()])
    report = ingest(EventsConfig(inputs=[file, tmp_path / "in", file]), tmp_path / "log")
    assert report.rows == 1


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York", "+05:30"])
def test_arrow_timestamps_become_unix_seconds(tmp_path: Path, unit: str, zone: str | None) -> None:
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    ticks = [START * per_second, START * per_second + per_second - 1, -1, None]
    table = pa.table(
        {
            "user_id": [1, 2, 3, 4],
            "timestamp": pa.array(ticks, pa.timestamp(unit, zone)),
            "item_id": [1, 2, 3, 4],
        }
    )
    events, report = run(tmp_path, table)
    assert events.source("events").timestamp.tolist() == [START, START]
    assert report.quarantine == {"negative_timestamp": 1, "null_timestamp": 1}


@pytest.mark.parametrize(("factor", "unit"), [(10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")])
def test_times_that_are_no_seconds_are_told(tmp_path: Path, factor: int, unit: str) -> None:
    with pytest.raises(InputError, match=f"look like {unit}; divide them by {factor:,}"):
        run(tmp_path, [row(timestamp=START * factor), row(timestamp=START * factor + 1)])


def test_a_few_times_in_milliseconds_are_bad_rows(tmp_path: Path) -> None:
    _, report = run(tmp_path, [row(timestamp=START * 1_000), row(), row(timestamp=START + 1)], latest=10**15)
    assert report.quarantine == {"future_timestamp": 1}


@pytest.mark.parametrize("unit", ["us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC"])
def test_times_at_the_ends_of_int64_are_bad_rows(tmp_path: Path, unit: str, zone: str | None) -> None:
    """NumPy's NaT, say, which some writers leave as a number. Two others are DuckDB's infinities, which are no time."""
    good = START * {"us": 10**6, "ns": 10**9}[unit]
    times = pa.array([-(2**63), 1 - 2**63, 2**63 - 1, good, -1, 0], pa.int64()).cast(pa.timestamp(unit, zone))
    table = pa.table({"user_id": range(6), "timestamp": times, "item_id": range(6)})
    events, report = run(tmp_path, table)
    assert events.source("events").timestamp.tolist() == [START, 0]
    assert report.quarantine == {"null_timestamp": 2, "negative_timestamp": 2}
    kept = [json.loads(entry["row"])["timestamp"] for entry in quarantined(tmp_path / "log" / "quarantine")]
    assert kept[0] == str(-(2**63))
    assert kept[3].startswith("1969-12-31 23:59:59.999")


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_milliseconds_that_microseconds_cannot_hold_are_told(tmp_path: Path, unit: str) -> None:
    """NumPy's NaT as a number, say: DuckDB cannot read the column at all, and the file was called damaged."""
    far = {"s": 400_000 * 365 * 86_400, "ms": -(2**63)}[unit]
    times = pa.array([far, 0], pa.int64()).cast(pa.timestamp(unit))
    table = pa.table({"user_id": [1, 2], "timestamp": times, "item_id": [1, 2]})
    with pytest.raises(InputError, match="column timestamp: a time in milliseconds lies beyond the years"):
        run(tmp_path, table)


def test_the_future_begins_now_by_default(tmp_path: Path) -> None:
    _, report = run(tmp_path, [row(), row(timestamp=9 * 10**9)], latest=None)
    assert report.quarantine == {"future_timestamp": 1}


# ---------------------------------------------------------------- sources, countries


def test_source_names_may_be_hostile_paths(tmp_path: Path) -> None:
    names = ["..", ".", "", "a/b", "%2E", "ünï", "it's", 'say "x"', "A;DROP TABLE users"]
    events, _ = run(tmp_path, [row(source=name, item_id=i) for i, name in enumerate(names)])
    assert events.manifest.sources == sorted(names)
    for i, name in enumerate(names):
        assert events.source(name).item.tolist() == [i]
    assert all(
        p.is_dir() and p.parent == tmp_path / "log" / "sources" for p in (tmp_path / "log" / "sources").iterdir()
    )


def test_sources_keep_the_configured_order_and_may_be_empty(tmp_path: Path) -> None:
    events, report = run(tmp_path, [row(source="b"), row(source="a")], sources=["c", "b", "a"], ad_sources=["b"])
    assert events.manifest.sources == ["c", "b", "a"]
    assert events.manifest.ad_sources == ["b"]
    assert report.sources["c"].events == 0
    assert report.notes == ["sources without an event: c"]
    assert events.source("c").offsets.tolist() == [0, 0]


def test_sources_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no good row is left of 1; its sources are ad_click, asked for: .'ad_clik'"):
        run(tmp_path, [row()], sources=["ad_clik"])
    with pytest.raises(InputError, match=r"ad_sources: 'ad_clik' is not a source .* nearest is ad_click"):
        run(tmp_path, [row()], ad_sources=["ad_clik"])
    with pytest.raises(InputError, match=r"column source is missing, and events.sources names 2"):
        run(tmp_path, [{"user_id": 1, "timestamp": START, "item_id": 1}], sources=["a", "b"])


def test_without_source_and_country(tmp_path: Path) -> None:
    events, report = run(tmp_path, [{"user_id": 1, "timestamp": START, "item_id": 1}], sources=["clicks"])
    assert events.manifest.sources == ["clicks"]
    assert report.users_by_country == {"all": 1}
    assert events.manifest.country("all").users == range(1)
    with pytest.raises(InputError, match="'DE' is not in the log; it has all"):
        events.manifest.country("DE")


def test_users_belong_to_their_latest_country(tmp_path: Path) -> None:
    rows = [
        row(user_id=1, country="US"), row(user_id=1, country="DE", timestamp=START + 1),
        row(user_id=1, country=None, timestamp=START + 2), row(user_id=2, country="US"), row(user_id=3),
    ]  # fmt: skip
    events, report = run(tmp_path, rows)
    assert events.users.select(["country", "user_id"]).to_pylist() == [
        {"country": "DE", "user_id": 1}, {"country": "US", "user_id": 2}, {"country": "all", "user_id": 3},
    ]  # fmt: skip
    assert report.users_of_several_countries == 1
    assert [c.first_user for c in events.manifest.countries] == [0, 1, 2]


def test_a_column_of_thousands_of_values_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column source: expected at most 256 values, got 300"):
        run(tmp_path, [row(source=f"url {i}") for i in range(300)])


@pytest.mark.parametrize(("column", "most"), [("country", 5_000), ("event_type", 32_767)])
def test_a_column_of_more_values_than_groups(tmp_path: Path, column: str, most: int) -> None:
    def table(values: int) -> pa.Table:
        names = {name: np.arange(values) for name in ("user_id", "item_id", column)}
        return pa.table({**names, "timestamp": np.full(values, START)})

    with pytest.raises(InputError, match=f"column {column}: expected at most {most:,} values, got {most + 1:,}"):
        run(tmp_path, table(most + 1))
    events, _ = run(tmp_path, table(most))
    assert events.num_users == most


def test_an_empty_country_is_none(tmp_path: Path) -> None:
    events, report = run(tmp_path, [row(country=""), row(country="DE", item_id=8), row(user_id=2, country="")])
    assert events.users["country"].to_pylist() == ["DE", "all"]
    assert not report.quarantine
    assert report.users_of_several_countries == 0


def test_names_too_long_for_a_folder_are_bad_rows(tmp_path: Path) -> None:
    names = ["é" * 40, "é" * 40 + "e"]  # 80 and 81 bytes
    rows = [row(user_id=i, country=name) for i, name in enumerate(names)]
    rows += [row(user_id=i, source=name) for i, name in enumerate(names)]
    events, report = run(tmp_path, rows)
    assert report.quarantine == {"country_too_long": 1, "source_too_long": 1}
    assert events.manifest.sources == ["ad_click", names[0]]
    assert events.users["country"].to_pylist() == [names[0]]


# ---------------------------------------------------------------- items


def test_items_give_accounts_titles_and_vectors(tmp_path: Path) -> None:
    items = [
        {
            "item_id": 7,
            "account_id": 70,
            "category_id": "x",
            "title": "seven",
            "dense": [1.0, 2.0],
            "semantic_ids": [3, 1],
        },
        {"item_id": 9, "account_id": 90, "category_id": "y", "title": "nine", "dense": None, "semantic_ids": [0, 4]},
    ]
    for item, codes in zip(items, ([3, 1], [0, 4])):
        item["semantic_ids"] = codes
    rows = [row(account_id=71), row(item_id=8, account_id=80), row(item_id=8, account_id=81, timestamp=START + 1)]
    events = make_events(tmp_path, rows, items)
    table = events.items
    assert table.item_ids.to_pylist() == [7, 8, 9]
    assert table.num_events.tolist() == [1, 2, 0]
    assert table.table.column("title").to_pylist() == ["seven", None, "nine"]
    accounts = events.accounts.column("account_id").to_pylist()
    assert [accounts[a] for a in table.accounts] == [70, 81, 90]
    assert table.categories.tolist() == [0, -1, 1]
    assert table.category_keys[1] == -1
    assert table.dense is not None
    assert table.semantic_ids is not None
    assert table.dense.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert table.semantic_ids.tolist() == [[3, 1], [-1, -1], [0, 4]]
    m = events.manifest
    assert (m.dense_dim, m.semantic_levels, m.semantic_codes, m.num_items) == (2, 2, 5, 3)
    account = events.source("ad_click").account
    assert account is not None
    assert [accounts[a] for a in account] == [71, 80, 81]  # an event's own account comes first


def test_bad_items_are_kept_with_their_reason(tmp_path: Path) -> None:
    items = [
        {"item_id": 7, "dense": [1.0, 2.0], "title": "first"},
        {"item_id": 7, "dense": [3.0, 4.0], "title": "second"},
        {"item_id": 8, "dense": [1.0]},
        {"item_id": None, "dense": [1.0, 2.0]},
        {"item_id": 9, "dense": [1.0, math.nan]},
        {"item_id": 10, "dense": [5.0, 6.0]},
    ]
    events = make_events(tmp_path, [row()], items)
    assert events.manifest.quarantine == {
        "dense_not_finite": 1, "dense_wrong_length": 1, "duplicate_item": 1, "null_item": 1
    }  # fmt: skip
    assert events.items.table.column("title").to_pylist() == ["first", None]
    assert {entry["row_number"] for entry in quarantined(tmp_path / "events" / "quarantine")} == {1, 2, 3, 4}
    with pytest.raises(AlureError, match="items: 3 of 6 rows"):
        make_events(tmp_path, [row()], items, name="strict", max_quarantine_share=0.4)
    assert len(quarantined(tmp_path / "strict.quarantine")) == 4


def test_items_follow_the_mapping_where_it_fits(tmp_path: Path) -> None:
    rows = [{"user_id": 1, "timestamp": START, "ad": 7, "shop": 1}]
    for names in ({"item_id": 7, "account_id": 5}, {"ad": 7, "account_id": 5}, {"ad": 7, "shop": 5}):
        events = make_events(
            tmp_path, rows, [names], name=f"log-{'-'.join(names)}", columns={"item_id": "ad", "account_id": "shop"}
        )
        assert events.accounts.column("account_id").to_pylist() == [1, 5]
        assert events.items.accounts.tolist() == [1]


def test_vectors_of_events_belong_to_their_source(tmp_path: Path) -> None:
    rows = [
        row(source="a", dense=[1.0, 2.0], semantic_ids=[1]), row(source="a", item_id=8, dense=None),
        row(source="b", dense=[1.0, 2.0, 3.0]), row(source="b", item_id=8, dense=[1.0, 2.0]),
        row(source="b", item_id=9, dense=[4.0, 5.0, 6.0]), row(source="c"),
    ]  # fmt: skip
    events, report = run(tmp_path, rows)
    assert report.quarantine == {"dense_wrong_length": 1}
    assert events.manifest.event_dense_dims == {"a": 2, "b": 3}
    assert events.manifest.event_semantic_levels == {"a": 1}
    a, b, c = (events.source(s) for s in "abc")
    assert a.dense is not None
    assert b.dense is not None
    assert a.semantic_ids is not None
    assert a.dense.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert a.semantic_ids.tolist() == [[1], [-1]]
    assert b.dense.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert c.dense is None
    assert b.semantic_ids is None


# ---------------------------------------------------------------- Delta, partitions


def test_delta_tables_and_partitions(tmp_path: Path) -> None:
    table = random_table(num_events=200)
    write_deltalake(tmp_path / "plain", table)
    write_deltalake(tmp_path / "parts", table, partition_by=["source", "account_id"])
    write_deltalake(tmp_path / "twice", table)
    write_deltalake(tmp_path / "twice", table, mode="overwrite")  # the old files stay in the folder
    pq.write_to_dataset(table, tmp_path / "hive", partition_cols=["source", "country"])
    write_rows(tmp_path / "file.parquet", table)
    logs = {}
    for name in ("plain", "parts", "twice", "hive", "file.parquet"):
        ingest(EventsConfig(inputs=[tmp_path / name]), tmp_path / "logs" / name)
        logs[name] = contents(tmp_path / "logs" / name)
    assert all(log == logs["file.parquet"] for log in logs.values())


def test_paths_and_partitions_of_odd_names(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(source=s, item_id=i) for i, s in enumerate(["a/b", "ü =%2F", "c d"])])
    folder = tmp_path / "odd *? é"
    write_deltalake(folder / "delta", table, partition_by=["source"])
    file = write_rows(folder / "it's [1]*.parquet", table)
    for inputs in (folder / "delta", file):
        ingest(EventsConfig(inputs=[inputs]), folder / "log")
        events = Events.open(folder / "log")
        assert events.manifest.sources == ["a/b", "c d", "ü =%2F"]
        assert [events.source(s).item.tolist() for s in events.manifest.sources] == [[0], [2], [1]]
    with pytest.raises(InputError, match="cannot lie under a path with"):
        ingest(EventsConfig(inputs=[file]), folder / "log [1]")


@pytest.mark.parametrize("folder", ["Zq", "country=FR"])
def test_delta_partitions_that_only_the_log_knows_are_refused(tmp_path: Path, folder: str) -> None:
    table = pa.table({"user_id": [1], "timestamp": [START], "item_id": [3], "country": ["DE"]})
    path = tmp_path / "delta"
    write_deltalake(path, table, partition_by=["country"])
    (path / "country=DE").rename(path / folder)
    commit = path / "_delta_log" / f"{0:020}.json"
    commit.write_text(commit.read_text().replace('"path":"country=DE', f'"path":"{folder}'))
    with pytest.raises(InputError, match="expected a folder country=DE, as the Delta table's log has it"):
        ingest(EventsConfig(inputs=[path]), tmp_path / "log")


def test_a_delta_table_within_a_folder_is_read_by_its_log(tmp_path: Path) -> None:
    """Its folder still has the files of deleted rows, which came back."""
    table = random_table(num_events=20)
    (tmp_path / "logs" / "old").mkdir(parents=True)
    write_deltalake(tmp_path / "logs" / "day" / "table", table.slice(0, 12))
    write_deltalake(tmp_path / "logs" / "day" / "table", table.slice(0, 5), mode="overwrite")
    pq.write_table(table.slice(12), tmp_path / "logs" / "old" / "a.parquet")
    write_deltalake(tmp_path / "alone" / "table", table.slice(0, 5))
    for folder, rows in (("logs", 5 + 8), ("alone", 5)):
        assert ingest(EventsConfig(inputs=[tmp_path / folder], latest=2 * START), tmp_path / "log").rows == rows


def test_delta_features_that_hide_rows_are_refused(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "table", random_table(num_events=10))
    log = tmp_path / "table" / "_delta_log" / "00000000000000000000.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "protocol" in line:
            line["protocol"] = {
                "minReaderVersion": 3, "minWriterVersion": 7,
                "readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"],
            }  # fmt: skip
    log.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(InputError, match="uses deletionVectors, which is not supported"):
        ingest(EventsConfig(inputs=[tmp_path / "table"]), tmp_path / "log")


def test_no_source_at_all(tmp_path: Path) -> None:
    for option in ("sources", "ad_sources"):
        with pytest.raises(InputError, match=f"events.{option}: expected at least one source"):
            run(tmp_path, [row()], **{option: []})


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", [row()])
    with pytest.raises(InputError, match=r"out: .*a.parquet/deep cannot be made: Not a directory"):
        ingest(EventsConfig(inputs=[file]), file / "deep" / "log")
