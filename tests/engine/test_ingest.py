"""Ingest against a model in plain Python, and against everything that can be wrong with an input."""

import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.events import START, make_events, random_items, random_table, write_rows

from alure.engine.config import EventsConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events, IngestReport, ingest

LATEST = 2 * START


def run(tmp_path: Path, rows: Any, **options: Any) -> tuple[Events, IngestReport]:
    inputs = write_rows(tmp_path / "input" / "events.parquet", rows)
    config = EventsConfig(inputs=[inputs], **{"latest": LATEST, "max_quarantine_share": 1.0, **options})
    report = ingest(config, tmp_path / "log")
    return Events.open(tmp_path / "log"), report


def row(**changes: Any) -> dict[str, Any]:
    return {"user_id": 1, "timestamp": START, "source": "ad_click", "item_id": 7, **changes}


def quarantined(folder: Path) -> list[dict[str, Any]]:
    return DeltaTable(folder).to_pyarrow_table().to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the log itself, without what names its inputs or holds times."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".npy", ".parquet")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if "quarantine" not in p.parts}


# ---------------------------------------------------------------- the model


def as_float32(value: float | None) -> float:
    return 0.0 if value is None else float(np.float32(value)) + 0.0


def reason_of(event: dict[str, Any]) -> str | None:
    timestamp, value = event["timestamp"], event["value"]
    checks = {
        "null_user": event["user_id"] is None,
        "null_timestamp": timestamp is None,
        "null_item": event["item_id"] is None,
        "negative_timestamp": timestamp is not None and timestamp < 0,
        "future_timestamp": timestamp is not None and timestamp > LATEST,
        "null_source": event["source"] is None,
        "value_not_finite": value is not None and not math.isfinite(value),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def latest(events: list[dict[str, Any]], key: str, column: str) -> dict[Any, Any]:
    """Per value of `key`, the newest non-null `column`; the smallest of equally new ones."""
    best: dict[Any, tuple[int, Any]] = {}
    for event in events:
        if event[column] is not None:
            known = best.get(event[key])
            if known is None or event["timestamp"] > known[0] or (event["timestamp"], event[column]) == (
                known[0], min(known[1], event[column]),
            ):  # fmt: skip
                best[event[key]] = (event["timestamp"], event[column])
    return {key: value for key, (_, value) in best.items()}


def model_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    reasons: dict[str, int] = {}
    good = []
    for event in rows:
        reason = reason_of(event)
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            good.append(event)
    country, account = latest(good, "user_id", "country"), latest(good, "item_id", "account_id")
    category = latest(good, "item_id", "category_id")
    users = sorted({(country.get(e["user_id"], "all"), e["user_id"]) for e in good})
    sequences: dict[tuple[str, Any], list[tuple[Any, ...]]] = {}
    for event in good:
        full = (
            event["timestamp"],
            event["item_id"],
            event["event_type"],
            event["account_id"] if event["account_id"] is not None else account.get(event["item_id"]),
            event["category_id"] if event["category_id"] is not None else category.get(event["item_id"]),
            as_float32(event["value"]),
            event["utc_offset"] or 0,
            event["country"],
        )
        sequences.setdefault((event["source"], event["user_id"]), []).append(full)
    for key, events in sequences.items():
        unique = sorted(set(events), key=lambda e: tuple((v is not None, v if v is not None else 0) for v in e))
        if len(unique) < len(events):
            reasons["duplicate"] = reasons.get("duplicate", 0) + len(events) - len(unique)
        seen: dict[Any, int] = {}
        counted = []
        for event in unique:
            what = ("account", event[3]) if event[3] is not None else ("category", event[4])
            what = what if what[1] is not None else ("item", event[1])
            seen[what] = seen.get(what, 0) + 1
            counted.append((*event[:7], seen[what]))
        sequences[key] = counted
    return {"users": users, "sequences": sequences, "reasons": reasons, "account": account, "category": category}


def read_back(events: Events) -> dict[str, Any]:
    items = events.items.item_ids.to_pylist()
    accounts = [*events.accounts.column("account_id").to_pylist(), None]
    categories = [*events.categories.column("category_id").to_pylist(), None]
    types = [*events.manifest.event_types, None]
    users = list(zip(events.users.column("country").to_pylist(), events.users.column("user_id").to_pylist()))
    sequences: dict[tuple[str, Any], list[tuple[Any, ...]]] = {}
    for source in events.manifest.sources:
        c = events.source(source)
        for index, (_, user) in enumerate(users):
            for r in range(int(c.offsets[index]), int(c.offsets[index + 1])):
                event = (
                    int(c.timestamp[r]),
                    items[c.item[r]],
                    None if c.event_type is None else types[c.event_type[r]],
                    None if c.account is None else accounts[c.account[r]],
                    None if c.category is None else categories[c.category[r]],
                    0.0 if c.value is None else float(c.value[r]),
                    0 if c.utc_offset is None else int(c.utc_offset[r]),
                    int(c.count[r]),
                )
                sequences.setdefault((source, user), []).append(event)
    known = [(items[i], a, c) for i, (a, c) in enumerate(zip(events.items.accounts, events.items.categories))]
    return {
        "users": users,
        "sequences": sequences,
        "reasons": events.manifest.quarantine,
        "account": {item: accounts[a] for item, a, _ in known if a >= 0},
        "category": {item: categories[c] for item, _, c in known if c >= 0},
    }


def rows_of(ids: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    event = st.fixed_dictionaries(
        {
            "user_id": st.one_of(st.none(), ids),
            "timestamp": st.one_of(st.integers(START, START + 3), st.sampled_from([None, -1, 0, LATEST, LATEST + 1])),
            "source": st.sampled_from(["ad_click", "a/b", "..", None]),
            "item_id": st.one_of(st.none(), ids),
            "account_id": st.one_of(st.none(), ids),
            "category_id": st.sampled_from([None, "x", "Ä"]),
            "country": st.sampled_from([None, "DE", "US"]),
            "event_type": st.sampled_from([None, "click", "view"]),
            "value": st.sampled_from([None, 0.0, -0.0, 1.5, math.nan, math.inf]),
            "utc_offset": st.sampled_from([None, 0, -3600]),
        }
    )
    # copies of some rows beside the rows: duplicates are frequent, in any order
    return st.lists(event, max_size=40).flatmap(lambda rows: st.permutations(rows + rows[: len(rows) // 3]))


SCHEMAS = {
    "int": (pa.int64(), st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 12345])),
    "string": (pa.string(), st.sampled_from(["", "a", "é", "日本", "🙂", "a\u0000b", "'quoted\"", "Z"])),
}


@pytest.mark.parametrize("kind", ["int", "string"])
def test_round_trip_equals_a_model_in_plain_python(kind: str) -> None:
    id_type, ids = SCHEMAS[kind]
    schema = pa.schema(
        [("user_id", id_type), ("timestamp", pa.int64()), ("source", pa.string()), ("item_id", id_type),
         ("account_id", id_type), ("category_id", pa.string()), ("country", pa.string()), ("event_type", pa.string()),
         ("value", pa.float64()), ("utc_offset", pa.int32())]
    )  # fmt: skip

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows_of(ids))
    def check(rows: list[dict[str, Any]]) -> None:
        some = {"user_id": ids, "item_id": ids}
        first = dict.fromkeys(schema.names) | row() | dict.fromkeys(some, "a" if kind == "string" else 1)
        rows = [first, *rows]
        with tempfile.TemporaryDirectory() as folder:
            events, _ = run(Path(folder), pa.Table.from_pylist(rows, schema))
            expected, got = model_of(rows), read_back(events)
            assert got == expected
            assert len(quarantined(Path(folder) / "log" / "quarantine")) == sum(expected["reasons"].values())

    check()


# ---------------------------------------------------------------- order


def test_the_order_of_rows_and_files_leaves_no_trace(tmp_path: Path) -> None:
    table = random_table(num_events=3_000, num_items=20)
    dense = np.random.default_rng(1).standard_normal((3_000, 3)).astype(np.float32)
    table = table.append_column("dense", pa.array(list(dense), pa.list_(pa.float32())))
    times = START + np.arange(3_000) % 5  # most times are shared by many events
    table = table.set_column(1, "timestamp", pa.array(times))
    logs = []
    for seed in (None, 1, 2):
        order = np.arange(3_000) if seed is None else np.random.default_rng(seed).permutation(3_000)
        folder = tmp_path / f"input-{seed}"
        parts = np.array_split(order, 1 if seed is None else 3)
        inputs = [write_rows(folder / f"{9 - i}.parquet", table.take(pa.array(part))) for i, part in enumerate(parts)]
        ingest(EventsConfig(inputs=inputs), tmp_path / f"log-{seed}")
        logs.append(contents(tmp_path / f"log-{seed}"))
    assert logs[0] == logs[1] == logs[2]
    assert len(logs[0]) > 20


def test_unsorted_events_come_out_sorted(tmp_path: Path) -> None:
    events, _ = run(tmp_path, [row(timestamp=START + t, item_id=t) for t in (5, 1, 4, 1_000, 0)])
    assert (events.source("ad_click").timestamp - START).tolist() == [0, 1, 4, 5, 1_000]


def test_many_users_and_one_giant_span_record_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alure.engine.events.ordering.BATCH_ROWS", 64)
    rng = random.Random(0)
    rows = [
        row(user_id=rng.choice([3] * 5 + list(range(60))), timestamp=START + t // 3, item_id=t) for t in range(6_000)
    ]
    events, _ = run(tmp_path, pa.Table.from_pylist(rows))
    c = events.source("ad_click")
    lengths = dict(zip(events.users.column("user_id").to_pylist(), np.diff(c.offsets).tolist()))
    assert lengths == {u: sum(r["user_id"] == u for r in rows) for u in {r["user_id"] for r in rows}}
    assert events.users.column("num_events").to_pylist() == np.diff(c.offsets).tolist()
    for user in range(events.num_users):
        assert (np.diff(c.timestamp[c.offsets[user] : c.offsets[user + 1]]) >= 0).all()
    assert sorted(c.item.tolist()) == list(range(6_000))


# ---------------------------------------------------------------- quarantine


def test_each_bad_row_is_kept_with_its_reason(tmp_path: Path) -> None:
    extra = {"dense": [1.0, 2.0], "semantic_ids": [1, 2, 3], "value": 1.0}
    bad = {
        "null_user": row(user_id=None),
        "null_timestamp": row(timestamp=None),
        "null_item": row(item_id=None),
        "negative_timestamp": row(timestamp=-5),
        "future_timestamp": row(timestamp=LATEST + 1),
        "null_source": row(source=None),
        "unknown_source": row(source="mystery"),
        "dense_wrong_length": row(dense=[1.0]),
        "dense_not_finite": row(dense=[1.0, math.nan]),
        "value_not_finite": row(value=math.inf),
        "semantic_ids_wrong_length": row(semantic_ids=[1, 2]),
        "semantic_ids_out_of_range": row(semantic_ids=[1, -2, 3]),
    }
    rows = [{**extra, **row(item_id=i)} for i in range(20)] + [{**extra, **r} for r in bad.values()]
    rows.append({**extra, **row(item_id=3)})
    events, report = run(tmp_path, rows, sources=["ad_click"])
    assert report.quarantine == dict.fromkeys(sorted([*bad, "duplicate"]), 1) == events.manifest.quarantine
    assert report.num_events == 20
    assert report.rows == 33
    table = quarantined(tmp_path / "log" / "quarantine")
    assert [entry["row_number"] for entry in table] == list(range(20, 33))
    assert [entry["reason"] for entry in table] == [*bad, "duplicate"]
    assert {entry["origin"] for entry in table} == {str(tmp_path / "input" / "events.parquet")}
    assert json.loads(table[4]["row"]) == {**extra, **bad["future_timestamp"]}
    assert json.loads(table[12]["row"])["item_id"] == 3


@pytest.mark.parametrize("vector", [[math.inf, 1.0], [None, 1.0], [1e300, 1.0]])
def test_vectors_that_are_not_finite_float32(tmp_path: Path, vector: list[float | None]) -> None:
    table = pa.table(
        {
            "user_id": [1, 2, 3],
            "timestamp": [START] * 3,
            "item_id": [1, 2, 3],
            "dense": pa.array([[1.0, 2.0], None, vector], pa.list_(pa.float64())),
        }
    )
    events, report = run(tmp_path, table)
    assert report.quarantine == {"dense_not_finite": 1}
    dense = events.source("events").dense
    assert dense is not None
    assert dense.tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_numbers_that_do_not_fit_are_not_taken_for_missing_ones(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": pa.array([1, 2**64 - 1, 3, 4], pa.uint64()),
            "timestamp": pa.array([START] * 4, pa.uint32()),
            "item_id": pa.array([1, 1, 2**63, 1], pa.uint64()),
            "value": [1.0, 1.0, 1.0, 1e300],
        }
    )
    _, report = run(tmp_path, table)
    reasons = {"user_id_out_of_range": 1, "item_id_out_of_range": 1, "value_not_finite": 1}
    assert report.quarantine == reasons
    assert report.num_events == 1


def test_too_many_bad_rows_stop_the_job_and_are_kept(tmp_path: Path) -> None:
    rows = [row(item_id=i) for i in range(8)] + [row(user_id=None)] * 2
    with pytest.raises(AlureError, match=r"2 of 10 rows \(20.0%\).*null_user 2.*log.quarantine") as caught:
        run(tmp_path, rows, max_quarantine_share=0.1)
    assert not isinstance(caught.value, InputError)
    assert not (tmp_path / "log").exists()
    assert [entry["reason"] for entry in quarantined(tmp_path / "log.quarantine")] == ["null_user"] * 2
    run(tmp_path, rows, max_quarantine_share=0.2)
    assert not (tmp_path / "log.quarantine").exists()


def test_copies_and_unasked_sources_do_not_stop_the_job(tmp_path: Path) -> None:
    rows = [row()] * 5 + [row(source="other", item_id=i) for i in range(5)]
    _, report = run(tmp_path, rows, sources=["ad_click"], max_quarantine_share=0.0)
    assert report.quarantine == {"duplicate": 4, "unknown_source": 5}
    assert report.num_events == 1


def test_rows_that_differ_in_any_column_are_no_copies(tmp_path: Path) -> None:
    full = row(event_type="click", account_id=1, category_id=1, value=1.0, utc_offset=0, country="DE", dense=[1.0])
    changes: list[dict[str, Any]] = [
        {}, {"event_type": "view"}, {"account_id": 2}, {"category_id": 2}, {"value": 2.0}, {"utc_offset": 1},
        {"country": "US"}, {"dense": [2.0]}, {"source": "b"}, {"user_id": 2}, {"timestamp": START + 1}, {"item_id": 8},
    ]  # fmt: skip
    _, report = run(tmp_path, [{**full, **change} for change in changes])
    assert report.quarantine == {}
    assert report.num_events == len(changes)


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


# ---------------------------------------------------------------- report


def test_the_report_is_json_and_adds_up(tmp_path: Path) -> None:
    table = random_table(num_events=500)
    report = ingest(EventsConfig(inputs=[write_rows(tmp_path / "a.parquet", table)]), tmp_path / "log")
    again = IngestReport.model_validate_json(report.model_dump_json())
    assert again == report == IngestReport.read(tmp_path / "log")
    assert sum(s.events for s in report.sources.values()) == report.num_events == 500 - sum(report.quarantine.values())
    for source in report.sources.values():
        assert sum(source.histogram) == report.num_users
        assert source.p50 <= source.p90 <= source.p99 <= source.longest < 2 ** (len(source.histogram) - 1)
        assert source.longest >= 2 ** (len(source.histogram) - 2)
    assert report.num_bytes > 10_000
    assert set(report.seconds) == {"validate", "index", "order", "items", "quarantine"}


def test_the_items_of_the_world_helper_fit(tmp_path: Path) -> None:
    events = make_events(tmp_path, random_table(), random_items())
    assert events.items.dense is not None
    assert events.items.dense.shape == (60, 8)


def test_a_wrong_memory_limit_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"events.memory_limit: 'plenty'"):
        run(tmp_path, [row()], memory_limit="plenty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input"]


def test_spills_go_where_they_are_sent_and_leave_nothing(tmp_path: Path) -> None:
    run(tmp_path, random_table(), temp_directory=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input", "log", "scratch"]
