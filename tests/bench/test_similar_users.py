"""Similar users' items as candidates: counted as a loop counts them, and nothing held out is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alure.bench.quality import similar_users
from alure.bench.quality.results import Results
from alure.bench.quality.similar_users import NEAR, Visits
from alure.engine.config import DAY
from alure.engine.errors import InputError

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 90)), min_size=1, max_size=40)


def visits_from(events: list[tuple[int, int, int]]) -> Visits:
    users, items, days = (np.array(column, np.int64) for column in zip(*events))
    rows = pa.table({"user_id": users, "item_id": items, "timestamp": days * DAY})
    return similar_users.visits_of(rows, np.arange(5), np.arange(7), np.full(5, -1))


@given(EVENTS)
def test_similarities_are_those_of_a_loop(events: list[tuple[int, int, int]]) -> None:
    visits = visits_from(events)
    had = [{item for user, item, _ in events if user == u} for u in range(5)]
    last = {(user, item): max(d for u, i, d in events if (u, i) == (user, item)) for user, item, _ in events}
    counts = {item: sum(item in items for items in had) for item in range(7)}
    near, common = np.zeros((5, 5)), np.zeros((5, 5))
    for a in range(5):
        for b in range(5):
            for item in had[a] & had[b]:
                weight = np.log(5 / counts[item]) ** 2
                common[a, b] += weight
                near[a, b] += weight * np.exp(-abs(last[a, item] - last[b, item]) * DAY / NEAR)
    for expected, found in ((common, similar_users.common_items(visits)), (near, similar_users.near_in_time(visits))):
        norms = np.sqrt(np.maximum(np.diag(expected), 1e-12))
        assert np.allclose(found, expected / norms[:, None] / norms, atol=1e-5)


@given(EVENTS, st.integers(0, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_ranks_are_those_of_a_loop(
    events: list[tuple[int, int, int]], seed: int, k: int, popular: bool, fades: bool
) -> None:
    rng = np.random.default_rng(seed)
    visits = visits_from(events)
    wanted = rng.integers(-1, 7, 5)
    had = [{item for user, item, _ in events if user == u} for u in range(5)]
    for user in range(5):
        if wanted[user] in had[user]:
            wanted[user] = -1
    visits = visits.keep(np.ones(len(events), bool), wanted)
    similar = rng.permutation(25).reshape(5, 5).astype(np.float32) / 25  # no two alike
    users = np.array([0, 1, 3, 4])
    most = max(max(sum(i in had[u] for u in users) for i in range(7)), 1)
    expected = []
    for user in users[wanted[users] >= 0]:
        row = {int(other): 0.0 if other == user else float(similar[user, other]) for other in users}
        nearest = sorted(row, key=lambda other: -row[other])[:k]
        own = max((day for u, _, day in events if u == user), default=0)
        scores = dict.fromkeys(range(7), 0.0)
        for other in nearest:
            for i in had[other]:
                day = max(day for u, item, day in events if (u, item) == (other, i))
                scores[i] += row[other] * (np.exp(-abs(day - own) * DAY / NEAR) if fades else 1.0)
        if popular:
            best = max(scores.values()) or 1.0
            scores = {i: s / best + sum(i in had[u] for u in users) / most for i, s in scores.items()}
        left = {i: np.float32(s) for i, s in scores.items() if i not in had[user]}
        score = left[int(wanted[user])]
        if score <= 0:
            expected.append(7.0)
        else:
            apart = [s - score for s in left.values()]
            better, equal = sum(s > 1e-6 for s in apart), sum(abs(s) <= 1e-6 for s in apart)
            expected.append(better + (equal - 1) / 2)
    found = similar_users.ranks_of(similar, visits, users, k, fades, with_popularity=popular)
    # scores that differ by less than float32 tells apart may take half a place from each other
    assert found == pytest.approx(expected, abs=1.0 if popular or fades else 1e-9)


@given(EVENTS)
def test_what_is_wanted_is_new_and_nothing_from_then_on_is_known(events: list[tuple[int, int, int]]) -> None:
    whole = visits_from(events)
    rows = similar_users.last_new(whole)
    asked = whole.keep(np.ones(len(events), bool), np.zeros(5, np.int64))
    earlier = similar_users.without_the_last(asked)
    for user in range(5):
        own = [(day, item) for u, item, day in sorted(events, key=lambda e: e[2]) if u == user]
        if not own:
            assert rows[user] == -1
            continue
        time = whole.times[rows[user]]
        kept = earlier.items[earlier.users == user].tolist()
        assert sorted(kept) == sorted(item for day, item in own if day * DAY < time)
        if earlier.wanted[user] >= 0:
            assert earlier.wanted[user] not in kept


def small_data(folder: Path) -> Path:
    """40 shoppers and 40 visitors of two cities, each with a taste for one half of the items."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 10)
    items = 20 * (users % 2) + rng.integers(0, 20, len(users))
    events = {"user_id": users, "item_id": items, "timestamp": 1_700_000_000 + rng.integers(0, 90 * DAY, len(users))}
    for name in ("retail_rocket", "checkins"):
        (folder / name).mkdir()
    shop = pa.table(events | {"source": ["view"] * len(users)})
    pq.write_table(shop, folder / "retail_rocket" / "events.parquet")
    missing = [
        next(20 * (u % 2) + i for i in range(20) if 20 * (u % 2) + i not in items[users == u]) for u in range(40)
    ]
    pq.write_table(pa.table({"user_id": np.arange(40), "item_id": missing}), folder / "retail_rocket" / "test.parquet")
    cities = np.where(users < 20, "US", "BR")
    visits = pa.table(events | {"source": ["checkin"] * len(users), "country": cities})
    pq.write_table(visits, folder / "checkins" / "events.parquet")
    return folder


def test_a_run_leaves_a_row_a_set_and_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = similar_users.SETTINGS["training"] | {"steps": 2, "batch_users": 16}
    monkeypatch.setattr(similar_users, "SETTINGS", similar_users.SETTINGS | {"training": training})
    data, results = small_data(tmp_path), Results(tmp_path / "results", "similar-users")
    similar_users.run(data, results, (0,))
    rows = results.rows()
    assert [row["variant"] for row in rows] == ["retail_rocket", "checkins"]
    assert set(rows[1]["places"]) == {"US", "BR"}
    rates = rows[0]["places"][""]["hit_rate"]
    assert rates["items, 15 users"]["50"] == 1.0  # there are 40 items
    page = similar_users.section(results)
    assert f"| popularity | {rates['popularity']['10']:.4f} |" in page
    assert "US HR@50" in page
    similar_users.run(data, results, (0,))
    assert results.rows() == rows


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"retail_rocket/events\.parquet does not exist"):
        similar_users.run(tmp_path, Results(tmp_path, "similar-users"), (0,))
