"""The evaluation's metrics beside scikit-learn's, and parts of the truth beside their definitions."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from support.model import DAY, START, LogParts, SourceRows, write_log
from support.store import unit

from alure.engine.config import EvaluationConfig
from alure.engine.evaluation import evaluate, metrics
from alure.engine.evaluation.slices import deciles
from alure.engine.evaluation.truth import relevance
from alure.engine.events import Events
from alure.engine.store import EmbeddingStore, Generation

seeds = st.integers(0, 2**32 - 1)


def both_classes(generator: np.random.Generator, n: int) -> np.ndarray:
    labels = (generator.random(n) < 0.3).astype(np.float64)
    labels[:2] = (0, 1)
    return generator.permutation(labels)


@given(seeds, st.integers(2, 200))
def test_entropy_and_its_normalisation(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    labels, p = both_classes(generator, n), generator.uniform(1e-3, 1 - 1e-3, n)
    loss = sklearn.metrics.log_loss(labels, p)
    assert metrics.log_loss(labels, p).mean() == pytest.approx(loss, rel=1e-12)
    base = sklearn.metrics.log_loss(labels, np.full(n, labels.mean()))
    assert metrics.normalized_entropy(labels, p) == pytest.approx(loss / base, rel=1e-12)


@given(seeds, st.integers(2, 200), st.sampled_from([1, 2, 5, None]))
def test_auc_with_and_without_ties(seed: int, n: int, levels: int | None) -> None:
    generator = np.random.default_rng(seed)
    labels, scores = both_classes(generator, n), generator.random(n)
    scores = scores if levels is None else np.floor(scores * levels)
    expected = sklearn.metrics.roc_auc_score(labels, scores)
    assert metrics.auc(labels, scores) == pytest.approx(expected, abs=1e-12)
    assert metrics.auc(labels, -scores) == pytest.approx(1 - expected, abs=1e-12)
    rows = generator.integers(0, max(1, n // 3), n)
    samples = metrics.bootstrap_auc(rows, labels, scores, 3, seed=1)
    (times,) = metrics.resamples(int(rows.max()) + 1, 3, seed=1)
    for found, drawn in zip(samples, times):
        weights = drawn[rows]
        if not (weights * labels).any() or not (weights * (1 - labels)).any():
            assert np.isnan(found)
            continue
        assert found == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights), abs=1e-12)


@pytest.mark.parametrize("labels", [[], [0, 0], [1]])
def test_auc_of_one_class_is_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="both classes"):
        metrics.auc(np.array(labels), np.ones(len(labels)))


@given(seeds, st.integers(1, 8), st.integers(2, 30), st.integers(1, 40))
def test_full_rankings(seed: int, users: int, items: int, k: int) -> None:
    """Every item is ranked for every user. Recall of sets, NDCG, and the hit rate of one held-out item a user."""
    generator = np.random.default_rng(seed)
    scores = generator.permutation(users * items).reshape(users, items).astype(np.float64)  # no ties
    wanted = generator.random((users, items)) < 0.2
    wanted[np.arange(users), generator.integers(0, items, users)] = True
    order = np.argsort(-scores, axis=1)
    ranks = np.argsort(order, axis=1)
    row, item = np.nonzero(wanted)
    pairs, found = metrics.hits_of_lists(
        np.repeat(np.arange(users), items), order.ravel(), np.tile(np.arange(items), users), row * items + item, items
    )
    hits, relevant = (row[pairs], found), wanted.sum(1)
    ndcg = [sklearn.metrics.ndcg_score(wanted[u : u + 1], scores[u : u + 1], k=k) for u in range(users)]
    np.testing.assert_allclose(metrics.ndcg(*hits, relevant, k), ndcg, rtol=1e-12)
    recall = sklearn.metrics.recall_score(wanted, ranks < k, average="samples")
    assert metrics.recall(*hits, relevant, k).mean() == pytest.approx(recall, abs=1e-12)
    one = generator.integers(0, items, users)
    hit = metrics.hit_rate(np.arange(users), ranks[np.arange(users), one], np.ones(users, int), k).mean()
    if items > 2 and k < items:
        expected = sklearn.metrics.top_k_accuracy_score(one, scores, k=k, labels=np.arange(items))
        assert hit == pytest.approx(expected, abs=1e-12)
    else:
        assert hit == np.mean(ranks[np.arange(users), one] < k)


# ---- parts of the truth


@given(st.lists(st.integers(0, 9), max_size=60))
def test_deciles_keep_order_and_equals_together(values: list[int]) -> None:
    found = deciles(np.array(values, np.int64))
    assert len(found) == len(values)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert ((found >= 0) & (found < 10)).all()
    for value in set(values):
        assert len(set(found[np.array(values) == value].tolist())) == 1


def test_deciles_of_distinct_values_are_tenths() -> None:
    shuffled = np.random.default_rng(0).permutation(50)
    assert np.bincount(deciles(shuffled)).tolist() == [5] * 10
    assert deciles(shuffled).tolist() == (shuffled // 5).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 users of 1 to 20 clicks and as many views on 40 ads up to day 9, and a store with one candidate set."""
    folder, generator = tmp_path_factory.mktemp("slices"), np.random.default_rng(0)
    sizes = np.arange(1, 21)
    user = np.repeat(np.arange(20), sizes)
    item = np.minimum(generator.geometric(0.1, len(user)), 40) - 1
    time = START + generator.integers(0, 9 * DAY, len(user))
    later = SourceRows(np.array([0, 0, 19]), np.full(3, START + 10 * DAY), np.array([39, 38, 39]), np.ones(3, int))
    rows = [np.concatenate(pair) for pair in zip((user, time, item), (later.user, later.timestamp, later.item))]
    click = SourceRows(*rows, np.ones(len(rows[0]), int))
    view = SourceRows(user, time, 39 - item, np.zeros(len(user), int))
    events = write_log(folder / "events", LogParts(20, 40, {"click": click, "view": view}, ["view", "click"]))
    store = EmbeddingStore(folder / "store", create=True)
    as_of = START + 9 * DAY
    users = unit(np.arange(20), as_of=as_of)
    place = users.schema.get_field_index("num_events")
    store.write_unit("g", "0", users.set_column(place, "num_events", pa.array(events.num_events(as_of))))
    store.publish(Generation("g", "embeddings", "", 20, as_of, "m", {"k": 2, "d": 2}))
    lists = [generator.permutation(40)[:15].tolist() for _ in range(20)]
    candidates = pa.table(
        {"user_id": np.arange(20), "country": ["BR"] * 20, "item_ids": pa.array(lists, pa.list_(pa.int64())),
         "scores": pa.array([[1.0] * 15] * 20, pa.list_(pa.float32())), "reasons": [["exact"] * 15] * 20,
         "graphs": [["alure"] * 15] * 20}
    )  # fmt: skip
    store.write_candidates("g", "alure", candidates.to_batches(), {})
    truth = pa.table({"user_id": np.repeat(np.arange(20), 4), "item_id": generator.integers(0, 41, 80)})  # 40: unknown
    pq.write_table(truth, folder / "truth.parquet")
    return folder


def test_slices_equal_brute_force(world: Path) -> None:
    events, store = Events.open(world / "events"), EmbeddingStore(world / "store")
    config = EvaluationConfig(k=[3, 10], bootstrap=50, cold_events=14)
    report = evaluate(store, world / "truth.parquet", config, events=events)
    truth = pq.read_table(world / "truth.parquet").to_pydict()
    wanted = set(zip(truth["user_id"], truth["item_id"]))
    lists = {row["user_id"]: row["item_ids"] for row in store.read_candidates().to_pylist()}
    clicks, cut = events.source("click"), START + 9 * DAY
    popularity = np.bincount(clicks.item[clicks.timestamp <= cut], minlength=41)
    items = sorted({item for _, item in wanted})
    tenth = dict(zip(items, deciles(popularity[items])))

    def expected(kept: set[tuple[int, int]], k: int) -> float:
        users = sorted({user for user, _ in kept})
        mine = {user: {item for owner, item in kept if owner == user} for user in users}
        return float(np.mean([len(mine[user] & set(lists[user][:k])) / len(mine[user]) for user in users]))

    (figures,) = report.sets
    cold = {pair for pair in wanted if pair[0] < 7}  # 2 · (user + 1) events, user 0 with 2 more after the snapshot
    parts = {("users", "cold"): cold, ("users", "warm"): wanted - cold}
    parts |= {("popularity", str(d + 1)): {p for p in wanted if tenth[p[1]] == d} for d in range(10)}
    assert sum(bool(kept) for kept in parts.values()) > 8
    for (kind, name), kept in parts.items():
        said, found = report.slices[kind][name], figures["slices"][kind][name]
        assert (said["pairs"], said["users"]) == (len(kept), len({user for user, _ in kept})), (kind, name)
        for k in (3, 10):
            value = found["recall"][str(k)]
            assert value is None if not kept else value["value"] == pytest.approx(expected(kept, k)), (kind, name)
    assert report.slices["users"]["cold"]["most_events"] == 14
    known = [part for part in report.slices["popularity"].values() if part["items"]]
    assert sum(part["items"] for part in known) == len(items)
    assert [part["least_engagements"] for part in known] == sorted(part["least_engagements"] for part in known)
    assert known[0]["least_engagements"] == 0  # the item that the log does not know is of the least popular
    bare = evaluate(store, world / "truth.parquet", config)
    assert "event log" in bare.reasons["slices by popularity"]
    assert bare.sets[0]["slices"]["users"] == figures["slices"]["users"]
    assert set(bare.slices) == {"users"}


def test_pairs_know_their_user_and_item() -> None:
    rows = pa.table({"user_id": [5, 5, 9, 7], "item_id": [3, 1, 3, 3]})
    wanted = relevance(rows, pa.array([9, 5]), None)
    found = {(wanted.users[u], wanted.items[int(i)].as_py()) for u, i in zip(wanted.pair_users, wanted.pair_items)}
    assert found == {(1, 3), (1, 1), (0, 3)}
