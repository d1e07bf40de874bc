"""Evaluation against brute force, and against everything that can be wrong with a truth file."""

import json
import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alure.engine.config import EvaluationConfig
from alure.engine.errors import InputError
from alure.engine.evaluation import evaluate, metrics, ranking
from alure.engine.evaluation.truth import read_truth
from alure.engine.store import EmbeddingStore, Generation

AS_OF = 1_000_000
GENERATION = "19700112T134640Z-test"


# ---- metrics against brute force


def brute_force(lists: list[list[int]], relevant: list[set[int]], k: int) -> dict[str, np.ndarray]:
    """Metrics of each user straight from their definitions."""
    recalls, hits, ndcgs = [], [], []
    for items, wanted in zip(lists, relevant):
        top = list(dict.fromkeys(items))  # an item counts once, at its best rank
        ranks = [items.index(i) for i in top if i in wanted and items.index(i) < k]
        recalls.append(len(ranks) / len(wanted))
        hits.append(float(bool(ranks)))
        ideal = sum(1 / math.log2(r + 2) for r in range(min(len(wanted), k)))
        ndcgs.append(sum(1 / math.log2(r + 2) for r in ranks) / ideal)
    return {"recall": np.array(recalls), "hit_rate": np.array(hits), "ndcg": np.array(ndcgs)}


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 12), max_size=9), st.sets(st.integers(0, 12), min_size=1, max_size=6)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 10),
)
def test_ranking_metrics_equal_brute_force(people: list[tuple[list[int], set[int]]], k: int) -> None:
    lists, relevant = [p[0] for p in people], [p[1] for p in people]
    users = np.repeat(np.arange(len(lists)), [len(x) for x in lists])
    items = np.array([i for x in lists for i in x], dtype=np.int64)
    ranks = np.array([r for x in lists for r in range(len(x))], dtype=np.int64)
    keys = np.array(sorted(u * 13 + i for u, w in enumerate(relevant) for i in w))
    shuffled = np.random.default_rng(0).permutation(len(items))
    pairs, found = metrics.hits_of_lists(users[shuffled], items[shuffled], ranks[shuffled], keys, 13)
    hits = keys[pairs] // 13, found
    counts = np.array([len(w) for w in relevant])
    expected = brute_force(lists, relevant, k)
    np.testing.assert_allclose(metrics.recall(*hits, counts, k), expected["recall"])
    np.testing.assert_allclose(metrics.hit_rate(*hits, counts, k), expected["hit_rate"])
    np.testing.assert_allclose(metrics.ndcg(*hits, counts, k), expected["ndcg"])


def test_a_perfect_list_has_ndcg_one_and_an_empty_one_zero() -> None:
    counts = np.array([3, 2])
    users, ranks = np.array([0, 0, 0]), np.array([0, 1, 2])
    np.testing.assert_allclose(metrics.ndcg(users, ranks, counts, 3), [1.0, 0.0])
    np.testing.assert_allclose(metrics.recall(users, ranks, counts, 10), [1.0, 0.0])  # k beyond the list


def test_coverage_and_its_ninety_percent() -> None:
    counts = np.array([90, 5, 5, 0, 0, 0, 0, 0, 0, 0])
    assert metrics.coverage(counts) == 0.3
    assert metrics.p90_coverage(counts) == 0.1  # one item fills 90 % of the entries
    assert metrics.p90_coverage(np.ones(10, int)) == 0.9
    assert metrics.p90_coverage(np.zeros(10, int)) == 0.0


def test_normalized_entropy_in_closed_form() -> None:
    labels = np.array([1, 0, 0, 0])
    assert metrics.normalized_entropy(labels, np.full(4, 0.25)) == pytest.approx(1.0)  # the base rate itself
    p = np.array([0.7, 0.2, 0.1, 0.4])
    loss = -(math.log(0.7) + math.log(0.8) + math.log(0.9) + math.log(0.6)) / 4
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert metrics.normalized_entropy(labels, p) == pytest.approx(loss / entropy)
    assert np.isfinite(metrics.log_loss(labels, np.array([0.0, 1.0, 1.0, 1.0]))).all()  # certainly wrong, yet finite


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1]])
def test_normalized_entropy_of_one_class_is_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="both classes"):
        metrics.normalized_entropy(np.array(labels), np.full(len(labels), 0.5))


def test_bootstrap_has_the_width_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).random((2_000, 2))
    samples = metrics.bootstrap_means(values, 2_000, seed=3, chunk=10_000)  # many blocks
    found = metrics.interval(values[:, 0].mean(), samples[:, 0])
    assert found.low < found.value < found.high
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * values[:, 0].std() / math.sqrt(2_000), rel=0.08)
    np.testing.assert_array_equal(samples, metrics.bootstrap_means(values, 2_000, seed=3, chunk=10_000))


def test_bootstrap_is_paired_across_columns() -> None:
    values = np.random.default_rng(1).random((300, 1))
    samples = metrics.bootstrap_means(np.hstack([values + 0.25, values]), 200, seed=0)
    np.testing.assert_allclose(samples[:, 0] - samples[:, 1], 0.25)


# ---- the parts of NE


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=8),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=8),
)
def test_rank_of_pairs_counts_what_is_not_later(shown: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    shown = sorted(shown)
    pairs, times = (np.array([s[i] for s in shown], dtype=np.int64) for i in (0, 1))
    wanted_pairs, wanted_times = (np.array([w[i] for w in wanted], dtype=np.int64) for i in (0, 1))
    found = ranking._rank_of(pairs, times, wanted_pairs, wanted_times)
    assert found.tolist() == [sum(s <= w for s in shown) for w in wanted]


def test_logistic_regression_finds_planted_weights_and_a_stationary_point() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 3)) * [1.0, 5.0, 0.2] + [0.0, 3.0, -1.0]
    logit = 0.8 * x[:, 0] - 0.2 * x[:, 1] + 1.0
    y = (rng.random(len(x)) < 1 / (1 + np.exp(-logit))).astype(float)
    weights, means, scales = ranking.fit_logistic(x, y)
    np.testing.assert_allclose(weights[1:] / scales, [0.8, -0.2, 0.0], atol=0.15)
    z = np.hstack([np.ones((len(x), 1)), (x - means) / scales])
    gradient = z.T @ (ranking.predict((weights, means, scales), x) - y) + np.array([1e-6, 1, 1, 1]) * weights
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_logistic_regression_survives_constant_and_duplicate_features() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1))
    y = (x[:, 0] + rng.normal(size=400) > 0).astype(float)
    model = ranking.fit_logistic(np.hstack([x, x, np.ones((400, 1))]), y)
    assert all(np.isfinite(part).all() for part in model)


def test_audience_cosine_equals_brute_force_and_leaves_the_user_out() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 4))
    owners, keys = rng.integers(0, 6, 40), rng.integers(-1, 4, 40)
    weights = rng.random(40)
    users, of_keys = rng.integers(0, 6, 25), rng.integers(-1, 6, 25)  # 4 and 5: nobody engaged
    found = ranking.audience_cosine(vectors, owners, keys, weights, users, of_keys)
    for user, key, cosine in zip(users, of_keys, found):
        others = (keys == key) & (owners != user)
        if key < 0 or not others.any():
            assert cosine == 0
            continue
        audience = (weights[others, None] * vectors[owners[others]]).sum(0)
        expected = audience @ vectors[user] / np.linalg.norm(audience) / np.linalg.norm(vectors[user])
        assert cosine == pytest.approx(expected)


def test_audience_cosine_of_nothing() -> None:
    none = np.empty(0, np.int64)
    assert len(ranking.audience_cosine(np.ones((2, 3)), none, none, np.empty(0), none, none)) == 0
    one = np.array([0])
    assert ranking.audience_cosine(np.ones((2, 3)), one, one, np.ones(1), one, one)[0] == 0  # the only engager is asked


# ---- a store by hand


def make_store(path: Path, lists: dict[str, dict[int, list[int]]], countries: dict[int, str]) -> EmbeddingStore:
    """Users with one-hot embeddings, candidate sets `lists` {name: {user: items}}, no log."""
    store = EmbeddingStore(path, create=True)
    users = sorted(countries, key=lambda u: (countries[u], u))
    n = len(users)
    rows = pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "country": [countries[u] for u in users],
            "embedding": pa.array(np.eye(n, 4, dtype=np.float32).tolist(), pa.list_(pa.float32())),
            "as_of": pa.array([AS_OF] * n, pa.int64()),
            "model": ["m"] * n,
            "num_events": pa.array([1] * n, pa.int64()),
            "refreshed_at": pa.array([datetime.now(UTC)] * n, pa.timestamp("us", "UTC")),
        }
    )
    store.write_unit(GENERATION, "all", rows)
    store.publish(Generation(GENERATION, "embeddings", rows=n, as_of=AS_OF, model="m", properties={"k": 1, "d": 4}))
    for name, of_user in lists.items():
        table = pa.table(
            {
                "user_id": pa.array(list(of_user), pa.int64()),
                "country": [countries.get(u, "?") for u in of_user],
                "item_ids": pa.array(list(of_user.values()), pa.list_(pa.int64())),
                "scores": pa.array([[1.0] * len(x) for x in of_user.values()], pa.list_(pa.float32())),
                "reasons": pa.array([["exact"] * len(x) for x in of_user.values()], pa.list_(pa.string())),
                "graphs": pa.array([["alure"] * len(x) for x in of_user.values()], pa.list_(pa.string())),
            }
        )
        store.write_candidates(GENERATION, name, table.to_batches(), {})
    return store


def add_popularity(store: EmbeddingStore, lists: dict[str, list[int]]) -> None:
    table = pa.table(
        {
            "country": list(lists),
            "item_ids": pa.array(list(lists.values()), pa.list_(pa.int64())),
            "scores": pa.array([[1.0] * len(x) for x in lists.values()], pa.list_(pa.float32())),
        }
    )
    store.write_popularity(GENERATION, table, {})


def write_truth(
    path: Path, rows: list[tuple], names: tuple[str, ...] = ("user_id", "item_id", "timestamp", "event_type")
) -> Path:
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    kinds = {"user_id": pa.int64(), "item_id": pa.int64(), "item": pa.int64(), "timestamp": pa.int64()}
    pq.write_table(pa.table({n: pa.array(v, kinds.get(n, pa.string())) for n, v in columns.items()}), path)
    return path


COUNTRIES = {1: "A", 2: "A", 3: "B", 4: "B"}
LISTS = {
    "alure": {1: [10, 11, 12], 2: [12, 10], 3: []},
    "social": {1: [12], 2: [11, 13], 3: [10], 4: [13]},
    "alure+social": {1: [10, 12, 11], 2: [12, 11, 10, 13], 3: [10], 4: [13]},
}


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    made = make_store(tmp_path / "store", LISTS, COUNTRIES)
    add_popularity(made, {"A": [12, 10, 11], "B": [13]})
    return made


def test_every_set_equals_brute_force(store: EmbeddingStore, tmp_path: Path) -> None:
    later = AS_OF + 5
    truth = write_truth(
        tmp_path / "truth.parquet",
        [(1, 10, later, "click"), (1, 10, later, "conversion"), (1, 99, later, "click"), (2, 13, later, "click"),
         (3, 10, later, "click"), (4, 13, later, "view"), (8, 10, later, "click")],
    )  # fmt: skip
    config = EvaluationConfig(k=[2, 1, 3], bootstrap=20)
    report = evaluate(store, truth, config)
    wanted = {1: {10, 99}, 2: {13}, 3: {10}}  # user 4 only viewed; 8 is nobody
    assert report.users == 3
    assert report.k == [1, 2, 3]
    assert report.truth["unknown_users"] == report.truth["unknown_user_rows"] == 1
    assert report.truth["repeated_rows"] == 1
    assert report.truth["pairs"] == 4
    everything = {**LISTS, "popularity": {u: {"A": [12, 10, 11], "B": [13]}[c] for u, c in COUNTRIES.items()}}
    assert {s["name"] for s in report.sets} == set(everything)
    for figures in report.sets:
        lists = [everything[figures["name"]].get(u, []) for u in wanted]
        for k in report.k:
            expected = brute_force(lists, list(wanted.values()), k)
            for metric, values in expected.items():
                assert figures["metrics"][metric][str(k)]["value"] == pytest.approx(values.mean()), (figures["name"], k)
            shown = {i for items in everything[figures["name"]].values() for i in items[:k]}
            assert figures["coverage"][str(k)] == pytest.approx(len(shown) / 4)  # ads 10 to 13
    pairs = {(d["set"], d["baseline"]) for d in report.differences}
    assert ("alure", "popularity") in pairs
    assert ("alure+social", "social") in pairs
    assert ("social", "alure") not in pairs
    by_name = {s["name"]: s for s in report.sets}
    assert by_name["alure"]["users_with_candidates"] == 2
    assert by_name["social"]["users_with_candidates"] == 3
    one = next(
        d
        for d in report.differences
        if (d["set"], d["baseline"], d["metric"], d["k"]) == ("alure", "social", "recall", 1)
    )
    values = [s["metrics"]["recall"]["1"]["value"] for s in (by_name["alure"], by_name["social"])]
    assert one["value"] == pytest.approx(values[0] - values[1])
    assert one["low"] <= one["value"] <= one["high"]
    assert json.loads(json.dumps(asdict(report), allow_nan=False)) == asdict(report)


def test_same_seed_same_report(store: EmbeddingStore, tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.parquet", [(1, 10, AS_OF + 1, "click"), (2, 13, AS_OF + 1, "click")])
    config = EvaluationConfig(k=[2], bootstrap=50)
    assert asdict(evaluate(store, truth, config, seed=3)) == asdict(evaluate(store, truth, config, seed=3))


def test_what_happened_before_the_snapshot_is_no_truth(store: EmbeddingStore, tmp_path: Path) -> None:
    rows = [
        (1, 10, AS_OF, "click"),
        (1, 11, AS_OF - 9, "click"),
        (2, 13, AS_OF + 1, "click"),
        (None, 10, AS_OF + 1, "click"),
    ]
    report = evaluate(store, write_truth(tmp_path / "t.parquet", rows), EvaluationConfig(k=[2], bootstrap=10))
    assert report.users == 1
    assert report.truth["not_after_as_of"] == 2
    assert report.truth["null_id"] == 1
    assert report.truth["rows"] == 4


def test_truth_of_ids_alone_is_enough(store: EmbeddingStore, tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.parquet", [(1, 10), (2, 13)], ("user_id", "item_id"))
    report = evaluate(store, truth, EvaluationConfig(k=[3], bootstrap=10))
    social = next(s for s in report.sets if s["name"] == "social")
    assert report.users == 2
    assert social["metrics"]["recall"]["3"]["value"] == 0.5
    assert "reason" in report.ne["ctr"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no rows"),
        ([(1, 10, AS_OF + 1, "view")], "no engagement"),
        ([(77, 10, AS_OF + 1, "click")], "none of the truth's 1 users"),
        ([(1, 10, AS_OF - 1, "click")], "not_after_as_of"),
    ],
)
def test_nothing_to_measure_says_why(store: EmbeddingStore, tmp_path: Path, rows: list[tuple], reason: str) -> None:
    report = evaluate(store, write_truth(tmp_path / "t.parquet", rows), EvaluationConfig(k=[2], bootstrap=10))
    assert reason in report.reasons["recall"]
    assert report.differences == []
    assert all(s["metrics"]["recall"]["2"] is None for s in report.sets)
    assert all(s["coverage"]["2"] is not None for s in report.sets)  # needs no truth
    json.dumps(asdict(report), allow_nan=False)


def test_no_candidates_yet(tmp_path: Path) -> None:
    bare = make_store(tmp_path / "bare", {}, COUNTRIES)
    report = evaluate(bare, write_truth(tmp_path / "t.parquet", [(1, 10, AS_OF + 1, "click")]), EvaluationConfig())
    assert report.sets == []
    assert "alure retrieve" in report.reasons["recall"]


def test_truth_types_choose_what_counts(store: EmbeddingStore, tmp_path: Path) -> None:
    truth = write_truth(tmp_path / "t.parquet", [(1, 10, AS_OF + 1, "click"), (2, 13, AS_OF + 1, "conversion")])
    report = evaluate(store, truth, EvaluationConfig(k=[2], bootstrap=10, truth_types=["conversion"]))
    assert report.users == 1
    with pytest.raises(InputError, match=r"none of the types like.*click"):
        evaluate(store, truth, EvaluationConfig(k=[2], truth_types=["like"]))


def test_bad_truth_files_are_named(store: EmbeddingStore, tmp_path: Path) -> None:
    missing = write_truth(tmp_path / "m.parquet", [(1, 10)], ("user_id", "item"))
    with pytest.raises(InputError, match=r"expected a column item_id, got .*; the nearest is 'item', rename it"):
        evaluate(store, missing, EvaluationConfig())
    with pytest.raises(InputError, match="does not exist"):
        evaluate(store, tmp_path / "nowhere.parquet", EvaluationConfig())
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot be read as Parquet or Delta"):
        evaluate(store, broken, EvaluationConfig())
    strings = tmp_path / "strings.parquet"
    pq.write_table(pa.table({"user_id": ["a"], "item_id": [1]}), strings)
    with pytest.raises(InputError, match="expected ids of type int64"):
        evaluate(store, strings, EvaluationConfig())


def test_timestamps_of_any_arrow_type(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    times = pa.array([AS_OF * 1_000 - 1, AS_OF * 1_000 + 1_500], pa.timestamp("ms", "UTC"))
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": [1, 2], "timestamp": times}), path)
    found = read_truth(path, AS_OF, None)
    assert found.table["timestamp"].to_pylist() == [AS_OF + 1]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pa.array(["2026-01-01"] * 3), "expected unix seconds or a timestamp, got string"),
        (pa.array([1.5] * 3), "column timestamp: .* truncated"),
        (pa.array([20_000] * 3, pa.date32()), "expected unix seconds or a timestamp, got date32"),
        (pa.array([1_790_000_000_000] * 2 + [None]), "expected unix seconds, got .*; milliseconds"),
    ],
)
def test_times_of_the_truth_that_are_no_seconds(tmp_path: Path, times: pa.Array, message: str) -> None:
    """Milliseconds would all be after the snapshot, those before it too."""
    pq.write_table(pa.table({"user_id": [1, 2, 3], "item_id": [1, 2, 3], "timestamp": times}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=message):
        read_truth(tmp_path / "t.parquet", AS_OF, None)


def test_a_truth_in_parts(tmp_path: Path) -> None:
    """Numbers too large for int64, and columns that only the folders' names or some files have."""
    for source in ("ad_click", "comment"):
        (tmp_path / f"source={source}").mkdir()
    ids = pa.array([1, 2**63 + 1, 3], pa.uint64())
    times = pa.array([AS_OF - 1, AS_OF + 1, 2**64 - 1], pa.uint64())
    table = pa.table({"user_id": ids, "item_id": ids, "timestamp": times})
    pq.write_table(table, tmp_path / "source=ad_click" / "b.parquet")
    pq.write_table(table.drop(["timestamp"]), tmp_path / "source=comment" / "a.parquet")
    found = read_truth(tmp_path, AS_OF, ["ad_click"])
    assert found.table["user_id"].to_pylist() == [3]
    assert found.table["timestamp"].to_pylist() == [None]
    assert found.counts == {"rows": 6, "null_id": 2, "not_after_as_of": 1, "not_an_ad_source": 2}


def test_rows_of_other_sources_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(
        pa.table({"user_id": [1, 2, 3], "item_id": [1, 2, 3], "source": ["ad_click", "comment", None]}), path
    )
    found = read_truth(path, AS_OF, ["ad_click"])
    assert found.counts["not_an_ad_source"] == 1
    assert found.table["user_id"].to_pylist() == [1, 3]
