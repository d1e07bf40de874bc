"""Reading an event log: batches against a loop in plain Python, hold-outs, engagements, stories, keys."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import DAY, START, make_events, random_events, random_table

from alure.engine.errors import InputError
from alure.engine.events import EventBatch, Events, stable_keys
from alure.engine.events.reader import order_by


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    table = random_table(num_events=1_500)
    rng = np.random.default_rng(3)
    table = table.append_column("dense", pa.array(list(rng.random((1_500, 3), np.float32)), pa.list_(pa.float32())))
    codes = pa.array(list(rng.integers(0, 9, (1_500, 2))), pa.list_(pa.int64()))
    return make_events(tmp_path_factory.mktemp("log"), table.append_column("semantic_ids", codes))


COLUMNS = {
    "timestamps": "timestamp", "items": "item", "accounts": "account", "categories": "category",
    "event_types": "event_type", "values": "value", "counts": "count", "utc_offsets": "utc_offset",
    "dense": "dense", "semantic_ids": "semantic_ids",
}  # fmt: skip


def rows_wanted(events: Events, source: str, user: int, as_of: int, max_events: int | None) -> list[int]:
    c = events.source(source)
    rows = [r for r in range(c.offsets[user], c.offsets[user + 1]) if c.timestamp[r] <= as_of]
    return rows if max_events is None else rows[max(0, len(rows) - max_events) :]


def check_batch(events: Events, users: list[int], as_of: list[int], max_events: int | None, batch: EventBatch) -> None:
    batch.check_integrity()
    assert batch.users.tolist() == users
    assert batch.as_of.tolist() == as_of
    assert list(batch.sequences) == events.manifest.sources
    for source, sequence in batch.sequences.items():
        rows = [rows_wanted(events, source, u, t, max_events) for u, t in zip(users, as_of)]
        assert sequence.lengths.tolist() == [len(r) for r in rows]
        flat = np.array([r for user in rows for r in user], np.int64)
        for ours, theirs in COLUMNS.items():
            tensor, column = getattr(sequence, ours), getattr(events.source(source), theirs)
            expected = torch.float32 if ours in ("values", "dense") else torch.int64
            assert tensor.dtype == expected
            assert np.array_equal(tensor.numpy(), column[flat])


@settings(max_examples=60)
@given(data=st.data())
def test_batches_equal_a_loop(events: Events, data: st.DataObject) -> None:
    users = data.draw(st.lists(st.integers(0, events.num_users - 1), max_size=12))
    moment = st.integers(START - 1, START + 31 * DAY)
    some = events.source("comment").timestamp
    moment |= st.sampled_from([int(t) + d for t in some[:50] for d in (-1, 0, 1)])
    as_of = data.draw(st.lists(moment, min_size=len(users), max_size=len(users)))
    most = data.draw(st.sampled_from([None, 0, 1, 3, 10**6]))
    batch = events.batch(np.array(users, np.int64), np.array(as_of, np.int64), most)
    check_batch(events, users, as_of, most, batch)


def test_a_range_of_users_at_one_time(events: Events) -> None:
    last = events.manifest.last_timestamp
    for users, as_of in (
        (range(events.num_users), last),
        (range(3, 9), 2**62),
        (range(5), START + 5 * DAY),
        (range(0), 0),
    ):
        batch = events.batch(users, as_of)
        check_batch(events, list(users), [as_of] * len(users), None, batch)
    assert events.batch(range(events.num_users), last).total == events.manifest.num_events


def test_a_user_alone_equals_the_user_in_a_batch(events: Events) -> None:
    as_of = START + 20 * DAY
    whole = events.batch(range(events.num_users), as_of, 5)
    for user in (0, 7, events.num_users - 1):
        alone = events.batch(np.array([user]), as_of, 5)
        for source, sequence in alone.sequences.items():
            among = whole.sequences[source]
            begin, end = among.offsets[user : user + 2].tolist()
            assert torch.equal(sequence.timestamps, among.timestamps[begin:end])
            assert torch.equal(sequence.values, among.values[begin:end])


def test_batches_own_their_memory(events: Events) -> None:
    batch = events.batch(range(events.num_users), events.manifest.last_timestamp)
    for sequence in batch.sequences.values():
        for ours in COLUMNS:
            getattr(sequence, ours).zero_()
    again = events.batch(range(events.num_users), events.manifest.last_timestamp)
    again.check_integrity()
    assert int(again.sequences["comment"].timestamps.min()) >= START


@pytest.mark.parametrize(
    ("users", "as_of", "message"),
    [
        (np.array([-1]), START, "users: expected indices below 40, got -1 to -1"),
        (np.array([40]), START, "users: expected indices"),
        (np.array([[1]]), START, r"users: expected shape \[B\]"),
        (np.array([1]), 1.5e9, "as_of: expected integer seconds"),
        (np.array([1]), np.array([START, START]), "as_of: expected integer seconds"),
    ],
)
def test_wrong_requests(events: Events, users: np.ndarray, as_of: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        events.batch(users, as_of)


def test_wrong_user_dtypes_and_lengths(events: Events) -> None:
    with pytest.raises(ValueError, match="max_events: expected at least 0"):
        events.batch(range(2), START, -1)
    with pytest.raises(ValueError, match="users: expected integer indices"):
        events.batch(np.array([1.5]), START)
    with pytest.raises(ValueError, match="users: expected integer indices"):
        events.batch(np.array([True, False]), START)
    assert len(events.batch(np.array([]), START)) == 0


def broken(batch: EventBatch) -> Iterator[tuple[str, EventBatch]]:
    from dataclasses import replace

    def with_comment(**changes: torch.Tensor) -> EventBatch:
        return replace(batch, sequences={**batch.sequences, "comment": replace(s, **changes)})

    s = batch.sequences["comment"]
    yield "later than its user's as_of", replace(batch, as_of=batch.as_of - 60 * DAY)
    yield "never decrease", with_comment(timestamps=s.timestamps.flip(0))
    yield "offsets: expected shape", with_comment(offsets=s.offsets[1:])
    yield "last offset", with_comment(offsets=torch.where(s.offsets == s.offsets[-1], s.total - 1, s.offsets))
    yield r"items: expected \d+ rows", with_comment(items=s.items[1:])
    yield "items: expected at least 0", with_comment(items=s.items - 10_000)
    yield "counts: expected at least 1", with_comment(counts=s.counts * 0)
    yield "values: expected finite", with_comment(values=s.values * float("nan"))
    yield "two \\[B\\] tensors", replace(batch, users=batch.users[1:])


def test_integrity_finds_what_is_broken(events: Events) -> None:
    batch = events.batch(range(events.num_users), events.manifest.last_timestamp)
    for message, bad in broken(batch):
        with pytest.raises(ValueError, match=message):
            bad.check_integrity()


def test_moving_keeps_everything(events: Events) -> None:
    batch = events.batch(range(4), START + 20 * DAY)
    moved = batch.to("meta")
    assert moved.users.device.type == "meta"
    for source, sequence in moved.sequences.items():
        assert sequence.dense is not None
        assert sequence.dense.shape == (batch.sequences[source].total, 3)
        assert all(getattr(sequence, ours).device.type == "meta" for ours in COLUMNS)
    batch.to(torch.device("cpu")).check_integrity()


def test_one_event(tmp_path: Path) -> None:
    events = make_events(tmp_path, [{"user_id": "🙂", "timestamp": 0, "item_id": 2**63 - 1}])
    batch = events.batch(range(1), 0)
    batch.check_integrity()
    sequence = batch.sequences["events"]
    assert sequence.timestamps.tolist() == [0]
    assert sequence.accounts.tolist() == sequence.categories.tolist() == sequence.event_types.tolist() == [-1]
    assert sequence.values.tolist() == [0.0]
    assert sequence.counts.tolist() == [1]
    assert sequence.dense is sequence.semantic_ids is sequence.utc_offsets is None
    assert events.batch(range(1), -1).total == 0
    assert events.engagements(0).items.tolist() == [0]
    assert events.after(-1).to_pylist() == [
        {
            "user_id": "🙂",
            "item_id": 2**63 - 1,
            "timestamp": 0,
            "source": "events",
            "event_type": None,
            "account_id": None,
        }
    ]
    assert events.after(0).num_rows == 0
    assert events.story("🙂")[0]["item_id"] == 2**63 - 1


def test_seconds_of_this_decade_stay_apart(tmp_path: Path) -> None:
    rows = [{"user_id": 1, "timestamp": 1_790_000_001 + t, "item_id": t} for t in range(2)]
    sequence = make_events(tmp_path, rows).batch(range(1), 1_790_000_001).sequences["events"]
    assert sequence.timestamps.tolist() == [1_790_000_001]


def test_changing_one_user_leaves_the_others_alone(tmp_path: Path) -> None:
    table = random_table(num_events=400)
    more = random_table(num_events=100, seed=5)
    more = more.set_column(0, "user_id", pa.array([1_003] * 100)).set_column(
        more.schema.get_field_index("country"), "country", pa.array(["US"] * 100)
    )
    one = make_events(tmp_path, table, name="one")
    two = make_events(tmp_path, pa.concat_tables([table, more]), name="two")
    a, b = (e.batch(range(40), START + 40 * DAY) for e in (one, two))
    user = int(one.user_indices([1_003])[0])
    for source, s in a.sequences.items():
        for u in set(range(40)) - {user}:
            mine, other = (slice(*x.offsets[u : u + 2].tolist()) for x in (s, b.sequences[source]))
            for ours in ("timestamps", "items", "values", "counts", "utc_offsets"):
                assert torch.equal(getattr(s, ours)[mine], getattr(b.sequences[source], ours)[other])


# ---------------------------------------------------------------- engagements, hold-out, story


def test_history_and_holdout_split_the_log(events: Events) -> None:
    as_of = START + 21 * DAY
    history, future = events.engagements(as_of), events.after(as_of)
    assert len(history.items) + future.num_rows == events.manifest.num_events
    assert history.offsets[-1] == len(history.items)
    assert history.items.dtype == np.int32
    assert (history.timestamps <= as_of).all()
    assert min(future.column("timestamp").to_pylist()) > as_of
    batch = events.batch(range(events.num_users), as_of)
    for user in range(events.num_users):
        mine = slice(*history.offsets[user : user + 2])
        assert (np.diff(history.timestamps[mine]) >= 0).all()
        expected = []
        for s in batch.sequences.values():
            own = slice(*s.offsets[user : user + 2].tolist())
            expected += zip(s.timestamps[own].tolist(), s.items[own].tolist(), s.event_types[own].tolist())
        got = zip(*(column[mine].tolist() for column in (history.timestamps, history.items, history.event_types)))
        assert sorted(got) == sorted(expected)


def test_holdout_keeps_original_ids(events: Events) -> None:
    table = random_table(num_events=1_500)
    as_of, until = START + 21 * DAY, START + 25 * DAY
    held = events.after(as_of, until, ["ad_click"]).to_pylist()
    rows = [r for r in table.to_pylist() if as_of < r["timestamp"] <= until and r["source"] == "ad_click"]
    keys = ["user_id", "item_id", "timestamp", "source", "event_type", "account_id"]
    assert sorted(tuple(r[k] for k in keys) for r in held) == sorted(tuple(r[k] for k in keys) for r in rows)
    assert events.after(until, as_of).num_rows == 0
    assert events.after(10**12).schema == events.after(0).schema


def test_engagements_are_of_ad_sources_unless_named(tmp_path: Path) -> None:
    events = make_events(tmp_path, random_table(), ad_sources=["ad_click"])
    counts = events.manifest.source_counts
    assert len(events.engagements(2**60).items) == counts["ad_click"]
    assert len(events.engagements(2**60, ["comment", "ad_click"]).items) == counts["ad_click"] + counts["comment"]
    assert len(events.engagements(0).items) == 0
    with pytest.raises(InputError, match="source: 'nope' is not in the log; it has ad_click"):
        events.engagements(0, ["nope"])


@pytest.mark.parametrize("span", [3, 10**9, 2**62])
def test_merging_sources_keeps_their_order_at_equal_times(span: int) -> None:
    rng = np.random.default_rng(span % 97)
    user, timestamp = rng.integers(0, 9, 500), rng.integers(0, span, 500)
    assert order_by(user, timestamp).tolist() == np.lexsort((timestamp, user)).tolist()
    assert order_by(user[:0], timestamp[:0]).tolist() == []


def test_counts_of_events_a_user(events: Events) -> None:
    as_of = START + 9 * DAY
    batch = events.batch(range(events.num_users), as_of)
    expected = sum(s.lengths for s in batch.sequences.values())
    assert events.num_events(as_of).tolist() == expected.tolist()  # type: ignore[union-attr]
    assert events.num_events().tolist() == events.users.column("num_events").to_pylist()
    assert events.num_events(users=np.array([3, 3])).tolist() == [events.num_events()[3]] * 2


def test_a_story_has_original_ids_newest_first(events: Events) -> None:
    rows = sorted(
        (r for r in random_table(num_events=1_500).to_pylist() if r["user_id"] == 1_005), key=lambda r: r["timestamp"]
    )
    story = events.story("1005", limit=10)
    assert len(story) == 10
    assert [e["timestamp"] for e in story] == [r["timestamp"] for r in rows[::-1][:10]]
    for told, r in zip(story, rows[::-1]):
        keys = ("source", "item_id", "event_type", "account_id", "category_id")
        assert {k: told[k] for k in keys} == {k: r[k] for k in keys}
        assert told["value"] == pytest.approx(r["value"])
    assert events.story(1_005, limit=10) == story
    assert len(events.story(1_005, limit=10**6)) == len(rows)
    with pytest.raises(InputError, match=r"user: 99 is not in .*its users are like 1000, 1002"):
        events.story(99)
    with pytest.raises(InputError, match="'bob' is not a number"):
        events.story("bob")


def test_ids_to_indices(events: Events) -> None:
    users = events.users.column("user_id")
    assert events.user_indices(users).tolist() == list(range(events.num_users))
    assert events.user_indices([1_001, 5, 1_001]).tolist()[1:] == [-1, events.user_indices([1_001])[0]]
    assert events.item_indices(pa.array([5_000, 1], pa.int32())).tolist() == [0, -1]
    assert events.item_indices([]).tolist() == []


# ---------------------------------------------------------------- keys


def test_keys_are_those_of_the_published_hashes() -> None:
    # SplitMix64's first output for the seeds 0 and 1 (Vigna's reference code), without the top bit
    mask = 2**63 - 1
    assert stable_keys(pa.array([0, 1])).tolist() == [0xE220A8397B1DCDAF & mask, 0x910A2DEC89025CC1 & mask]
    # b2sum -l 64 of "", "abc"
    digests = [bytes.fromhex("e4a6a0577479b2b4"), bytes.fromhex("d8bb14d833d59559")]
    assert stable_keys(pa.array(["", "abc"])).tolist() == [int.from_bytes(d, "little") & mask for d in digests]


def test_keys_know_neither_order_nor_width_nor_missing_ones() -> None:
    ids = [5, 2**63 - 1, -(2**63), 0, -1]
    keys = stable_keys(pa.array(ids)).tolist()
    assert stable_keys(pa.array(ids[::-1])).tolist() == keys[::-1]
    assert len(set(keys)) == 5
    assert min(keys) >= 0
    assert stable_keys(pa.array([5, None], pa.int8())).tolist() == [keys[0], -1]
    assert stable_keys(pa.chunked_array([["a"], [None, "a"]])).tolist()[1] == -1
    assert stable_keys(pa.array([], pa.string())).tolist() == []
    with pytest.raises(TypeError, match="ids: expected integers or strings"):
        stable_keys(pa.array([1.5]))


def test_the_same_id_has_the_same_key_in_any_log(tmp_path: Path) -> None:
    one, two = random_events(tmp_path / "one"), random_events(tmp_path / "two", seed=9, num_items=200)
    keys = [dict(zip(e.items.item_ids.to_pylist(), e.items.keys.tolist())) for e in (one, two)]
    shared = keys[0].keys() & keys[1].keys()
    assert len(shared) > 50
    assert all(keys[0][item] == keys[1][item] for item in shared)
    accounts = one.accounts.column("key").to_numpy()
    assert (one.items.account_keys == accounts[one.items.accounts]).all()
