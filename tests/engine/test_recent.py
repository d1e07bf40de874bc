"""Events in memory after a log's end: joined to the log they are the log of all of them; bounded; refused where bad."""

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from support.events import DAY, START, make_events, random_table

from alure.engine.errors import InputError
from alure.engine.events import Events, RecentEvents

SNAPSHOT = START + 20 * DAY
ITEMS = pa.table({"item_id": 5_000 + np.arange(60), "account_id": np.arange(60) % 7})


def rich_table(seed: int = 0) -> pa.Table:
    """All that an event may have: missing accounts, vectors of some, rows twice, users of no country."""
    table, rng = random_table(num_events=1_200, seed=seed), np.random.default_rng(seed + 1)
    drop = pa.array(rng.random(1_200) < 0.3)
    dense = [None if rng.random() < 0.2 else row for row in rng.random((1_200, 3), np.float32)]
    codes = [None if rng.random() < 0.2 else row for row in rng.integers(0, 9, (1_200, 2))]
    for name in ("account_id", "event_type", "country"):
        column = table[name].combine_chunks()
        table = table.set_column(
            table.schema.get_field_index(name), name, pc.if_else(drop, pa.scalar(None, column.type), column)
        )
    table = table.append_column("dense", pa.array(dense, pa.list_(pa.float32())))
    table = table.append_column("semantic_ids", pa.array(codes, pa.list_(pa.int64())))
    return pa.concat_tables([table, table.slice(0, 150), table.slice(900, 150)])


def until(table: pa.Table, time: int) -> pa.Table:
    return table.filter(pc.less_equal(table["timestamp"], time))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Events, Events, pa.Table]:
    """The log up to the snapshot, that of everything, and everything."""
    folder, table = tmp_path_factory.mktemp("logs"), rich_table()
    nightly = make_events(folder, until(table, SNAPSHOT), ITEMS, "nightly")
    return nightly, make_events(folder, table, ITEMS, "whole"), table


@pytest.mark.parametrize("max_events", [None, 0, 3, 8])
def test_joined_to_the_log_it_is_the_log_of_all(logs: tuple[Events, Events, pa.Table], max_events: int | None) -> None:
    nightly, whole, table = logs
    assert whole.manifest.semantic_codes == pc.max(pc.list_flatten(table["semantic_ids"])).as_py() + 1
    recent = RecentEvents(nightly, SNAPSHOT, 10_000)
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    added = [recent.add(shuffled.slice(first, 97)) for first in range(0, len(table), 97)]
    late = int((table["timestamp"].to_numpy() > SNAPSHOT).sum())
    assert (sum(a.added for a in added), sum(a.before_snapshot for a in added)) == (late, len(table) - late)
    users = whole.users["user_id"].to_pylist()
    for as_of in (SNAPSHOT, SNAPSHOT + DAY + 7, START + 31 * DAY):
        for user in users:
            rows = recent.read([user], SNAPSHOT, as_of)
            found = recent.join(int(nightly.user_indices([user])[0]), rows, as_of, max_events)
            found.check_integrity()
            expected = whole.batch(whole.user_indices([user]), as_of, max_events)
            for name, sequence in expected.sequences.items():
                for column in fields(sequence):
                    a, b = getattr(found.sequences[name], column.name), getattr(sequence, column.name)
                    assert a is None if b is None else torch.equal(a, b), (user, name, column.name)


def test_a_user_the_log_does_not_know(logs: tuple[Events, Events, pa.Table]) -> None:
    nightly, *_ = logs
    recent = RecentEvents(nightly, SNAPSHOT, 10)
    account = int(nightly.source("comment").account[0])  # of somebody else's event, which does not count
    item = nightly.items.item_ids[int(np.flatnonzero(nightly.items.accounts == account)[0])].as_py()
    other = (account + 1) % nightly.manifest.num_accounts
    row = {"user_id": 7, "timestamp": SNAPSHOT + 1, "item_id": item, "source": "comment", "account_id": None}
    own = {**row, "timestamp": SNAPSHOT + 10, "account_id": nightly.accounts["account_id"][other].as_py()}
    recent.add(pa.Table.from_pylist([row, {**row, "timestamp": SNAPSHOT + 9}, own]))
    batch = recent.join(-1, recent.read([7], 0, SNAPSHOT + 10), SNAPSHOT + 10)
    batch.check_integrity()
    assert {name: s.total for name, s in batch.sequences.items()} == {"ad_click": 0, "comment": 3, "video_view": 0}
    assert batch.sequences["comment"].counts.tolist() == [1, 2, 1]
    assert batch.sequences["comment"].accounts.tolist() == [account, account, other]


def small(nightly: Events, capacity: int) -> RecentEvents:
    return RecentEvents(nightly, SNAPSHOT, capacity)


def feed(recent: RecentEvents, rows: list[tuple[int, int, int]]) -> None:
    """(user, seconds after the snapshot, item)."""
    user, second, item = (list(column) for column in zip(*rows))
    times = [SNAPSHOT + s for s in second]
    items = [5_000 + i for i in item]
    recent.add(pa.table({"user_id": user, "timestamp": times, "item_id": items, "source": ["ad_click"] * len(rows)}))


@pytest.mark.parametrize("capacity", [1, 2, 7, 50])
def test_the_newest_to_come_are_kept(logs: tuple[Events, Events, pa.Table], capacity: int) -> None:
    """Against a list: rows of random users in random portions, some larger than the capacity; all times differ."""
    recent, rng = small(logs[0], capacity), np.random.default_rng(capacity)
    came: list[tuple[int, int, int]] = []
    for portion in rng.integers(1, 2 * capacity + 2, 25):
        times = rng.permutation(1_000)[:portion] + 1_000 * len(came) + 1
        rows = [(int(rng.integers(5)), int(t), int(rng.integers(60))) for t in times]
        feed(recent, rows)
        came += rows
        kept = came[-capacity:]
        assert len(recent) == len(kept)
        assert len(recent._newest) == len({user for user, *_ in kept})  # nothing stays of whom nothing is kept
        middle = SNAPSHOT + sorted(t for _, t, _ in kept)[len(kept) // 2]
        found = recent.read([0, 9, 3], SNAPSHOT, middle)
        for place, user in enumerate([0, 9, 3]):
            expected = sorted((t, item) for u, t, item in kept if u == user and SNAPSHOT + t <= middle)
            own = slice(found.offsets[place], found.offsets[place + 1])
            times, items = found.columns["timestamp"][own] - SNAPSHOT, found.columns["item"][own]
            assert list(zip(times.tolist(), items.tolist())) == expected


def test_a_window_of_time_is_open_below(logs: tuple[Events, Events, pa.Table]) -> None:
    recent = small(logs[0], 9)
    feed(recent, [(1, 10, 0), (1, 20, 1), (1, 30, 2)])
    found = recent.read([1], SNAPSHOT + 10, SNAPSHOT + 20)
    assert found.columns["item"].tolist() == [1]


def test_a_bot_is_read_in_part(logs: tuple[Events, Events, pa.Table], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alure.engine.events.recent.MOST_A_USER", 3)
    recent = small(logs[0], 100)
    feed(recent, [(1, second, second % 60) for second in range(1, 60)])
    feed(recent, [(2, 5, 5)])
    found = recent.read([1, 2], SNAPSHOT, SNAPSHOT + 99)
    assert found.columns["timestamp"].tolist() == [SNAPSHOT + s for s in (57, 58, 59, 5)]


def test_unknown_items_and_times_of_other_types(logs: tuple[Events, Events, pa.Table]) -> None:
    recent = small(logs[0], 9)
    moments = [datetime.fromtimestamp(SNAPSHOT + 1.9, UTC), datetime.fromtimestamp(SNAPSHOT, UTC)] * 2
    rows = pa.table({
        "user_id": pa.array([1, 1, 2, 2], pa.int32()), "timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
        "item_id": [5_000, 5_000, 9, 5_001], "source": pa.array(["comment"] * 4).dictionary_encode(),
    })  # fmt: skip
    assert recent.add(rows.to_batches()[0]) == (1, 2, 1)
    assert recent.add(rows.slice(0, 0)) == (0, 0, 0)
    assert recent.read([1], 0, 2 * SNAPSHOT).columns["timestamp"].tolist() == [SNAPSHOT + 1]


GOOD: dict[str, Any] = {"user_id": [1], "timestamp": [SNAPSHOT + 1], "item_id": [5_000], "source": ["ad_click"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": ["a"]}, "user_id: expected ids of type int64 as the users of the log, got string"),
        ({"user_id": pa.array([None], pa.int64())}, "user_id: expected a value in every row, got nulls"),
        ({"item_id": [0.5]}, "item_id: expected ids of type int64"),
        ({"timestamp": ["now"]}, "timestamp: expected unix seconds or a timestamp, got string"),
        ({"timestamp": [-1]}, "expected unix seconds from 0"),
        ({"timestamp": [1_790_000_000_000]}, "got 1790000000000; milliseconds?"),
        ({"source": ["adclick"]}, "source: 'adclick' is not in the log; it has ad_click, comment, video_view"),
        ({"source": pa.array([None], pa.string())}, "source: expected a value in every row, got nulls"),
        ({"source": None}, "expected a column source, got user_id, timestamp, item_id"),
        ({"event_type": ["buy"]}, "event_type: 'buy' is not in the log; it has click, conversion, view"),
        ({"event_typ": ["click"]}, "column 'event_typ': .* the nearest is 'event_type'"),
        ({"value": [float("nan")]}, "value: expected finite numbers"),
        ({"value": ["a lot"]}, "value: expected float"),
        ({"dense": [[1.0]]}, "dense: expected 3 values in source ad_click, got 1"),
        ({"dense": [[1.0, float("inf"), 0.0]]}, "dense: expected finite numbers"),
        ({"semantic_ids": [[1, -7]]}, "codes of at least 0"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_added(
    logs: tuple[Events, Events, pa.Table], change: dict[str, Any], message: str
) -> None:
    recent = small(logs[0], 9)
    columns = {name: column for name, column in {**GOOD, **change}.items() if column is not None}
    with pytest.raises(InputError, match=message):
        recent.add(pa.table(columns))
    assert len(recent) == 0
    assert recent.add(pa.table(GOOD)).added == 1


def test_what_is_no_table_or_no_capacity(logs: tuple[Events, Events, pa.Table]) -> None:
    with pytest.raises(InputError, match=r"expected a pyarrow.Table or RecordBatch, got list"):
        small(logs[0], 9).add([GOOD])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="capacity: expected at least 1 event, got 0"):
        small(logs[0], 0)
    twice = pa.table(GOOD).append_column("value", pa.array([1.0])).append_column("value", pa.array([2.0]))
    with pytest.raises(InputError, match=r"column 'value': expected each of .* at most once"):
        small(logs[0], 9).add(twice)
