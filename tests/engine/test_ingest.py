"""Ingest against a model in plain Python, and against everything that can be wrong with an input."""

import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.events import START, make_events, random_items, random_table, write_rows
from support.ingest import LATEST, contents, quarantined, row, run

from alure.engine.config import EventsConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events, IngestReport, ingest

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

    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
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
    assert set(report.seconds) == {"validate", "index", "order", "items", "quarantine", "fingerprints"}


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
