"""The quality experiments: order of ratings, rows that are not measured twice, and the page."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from alure.bench.quality import ml_1m, new_friends
from alure.bench.quality.results import Results
from alure.engine.errors import InputError


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=20))
def test_distinct_times_keep_the_order_and_move_as_little_as_a_loop(ratings: list[tuple[int, int]]) -> None:
    ratings.sort()
    users, times = (np.array(column, np.int64) for column in zip(*ratings))
    found = ml_1m.distinct_times(users, times)
    last: dict[int, int] = {}
    for user, time, got in zip(users.tolist(), times.tolist(), found.tolist()):
        last[user] = max(time, last[user] + 1) if user in last else time
        assert got == last[user]


def small_data(folder: Path) -> Path:
    """ml-1m's files with 6 users and 8 films; the order within a second is that of `position`."""
    home = folder / "ml-1m"
    home.mkdir()
    users = np.repeat(np.arange(6), 6)
    items = (np.repeat(np.arange(6), 6) + np.tile(np.arange(6), 6)) % 8
    columns = {"user_id": users, "item_id": items, "timestamp": users * 0 + 1_000, "position": np.tile(np.arange(6), 6)}
    shuffled = np.random.default_rng(0).permutation(36)
    pq.write_table(pa.table({name: column[shuffled] for name, column in columns.items()}), home / "events.parquet")
    valid = {"user_id": np.arange(6), "item_id": (np.arange(6) + 6) % 8, "timestamp": np.full(6, 1_000)}
    pq.write_table(pa.table(valid), home / "valid.parquet")
    pq.write_table(pa.table({"user_id": np.arange(6), "item_id": (np.arange(6) + 7) % 8}), home / "test.parquet")
    return folder


def test_ml_1m_runs_once_and_fills_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = small_data(tmp_path), Results(tmp_path / "results", "ml-1m")
    monkeypatch.setattr(ml_1m, "TRAINING", {**ml_1m.TRAINING, "steps": 3, "validate_every": 3})
    log = ml_1m.make_log(data / "ml-1m", tmp_path)
    films = log.items.item_ids.to_numpy()[np.array(log.source("rating").item)].reshape(6, 7)
    assert np.array_equal(films, (np.arange(6)[:, None] + np.arange(7)) % 8)
    ml_1m.run(data, results, seeds=(0, 1))
    ml_1m.run(data, results, seeds=(0, 1))
    rows = results.rows()
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["test"]["users"] == 6
    assert rows[0]["test"]["items"] == 8
    page = ml_1m.section(results)
    assert f"seed 1 | {rows[1]['test']['hit_rate']['10']['value']:.4f}" in page
    assert "of 2 seeds" in page
    monkeypatch.setattr(ml_1m, "TRAINING", {**ml_1m.TRAINING, "steps": 2, "validate_every": 2})
    assert "seed 1" not in ml_1m.section(results)  # of other settings
    assert results.find("next event", 0, ml_1m.settings_now()) is None


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"events\.parquet does not exist"):
        ml_1m.run(tmp_path, Results(tmp_path, "ml-1m"), seeds=(0,))


def test_new_friends_recall_is_that_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    size, city = 80, range(10, 80)
    known, wanted = (sp.csr_matrix(generator.random((size, size)) < share) for share in (0.05, 0.1))
    wanted = sp.csr_matrix(wanted.astype(float) - wanted.multiply(known).astype(float))
    wanted.setdiag(0)
    wanted.eliminate_zeros()
    scores = generator.random((70, 70)).astype(np.float32)
    expected = []
    for user in city:
        friends = set(known[user].indices.tolist()) | {user}
        ranked = sorted((v for v in city if v not in friends), key=lambda v: -scores[user - 10, v - 10])
        relevant = {v for v in wanted[user].indices.tolist() if v in city}
        if relevant:
            expected.append(len(relevant & set(ranked[: new_friends.K])) / len(relevant))
    found = new_friends.recalls(scores, known.astype(float), wanted, city)
    np.testing.assert_allclose(found, expected)


def test_page_ranks_of_friends_are_no_measure() -> None:
    """A path 0 – 1 – 2 – 3: user 0's best candidate is 2, with score 1; its friend 1 has none."""
    path = sp.csr_matrix(np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]], float))
    scores = new_friends.page_ranks(path, range(4))
    assert scores[0, 2] == pytest.approx(1.0)
    assert scores[0, 1] == 0
    assert 0 < scores[0, 3] < 1
