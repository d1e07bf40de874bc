"""NE of a small ads ranker with and without ALURE: does the embedding help to rank what was shown anyway?

The paper's Table 1 reports the gain in normalized entropy (He et al. 2014) when ALURE's embeddings become features of
a ranking model, for CTR and for CVR. Here the ranker is a logistic regression. Users are split into two halves; each
half is scored by the model fitted on the other, so no user is scored by a model that saw that user.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from alure.engine.evaluation import metrics
from alure.engine.evaluation.truth import indices
from alure.engine.events import Events, History
from alure.engine.store import EmbeddingMatrix, EmbeddingStore, Generation

DAY = 86_400
TASKS = {"ctr": ("view", "click"), "cvr": ("click", "conversion")}  # an exposure's event type, and its positive's
WINDOW = DAY  # seconds within which the positive follows
HALF_LIFE = 7.0 * DAY  # of the clickers whose embeddings an ad is compared with
MIN_POSITIVES = 20  # in each half; with fewer the figure says nothing
RIDGE = 1.0  # L2 penalty of the logistic regression on standardised features

BASE_FEATURES = (
    "ad rate", "ad exposures", "account rate", "user rate", "user exposures", "user × account", "user × category",
    "hour (sin)", "hour (cos)",
)  # fmt: skip
ALURE_FEATURES = ("cosine to the ad's audience", "cosine to the account's audience", "candidate score")


@dataclass(frozen=True)
class Exposures:
    """What was shown after the snapshot, to users and of items that the log knows."""

    users: np.ndarray  # int64 [n], user index of the log
    embedding_rows: np.ndarray  # int64 [n], row of the generation's embeddings
    items: np.ndarray  # int64 [n], item index of the log
    timestamps: np.ndarray  # int64 [n]
    labels: np.ndarray  # float64 [n], 1 where the positive followed


@dataclass(frozen=True)
class Inputs:
    """What the features are made from; nothing in it is later than the generation's as_of, except `truth`."""

    truth: pa.Table  # user_id, item_id, timestamp, source, event_type
    store: EmbeddingStore
    chosen: Generation
    embeddings: EmbeddingMatrix
    events: Events
    history: History


def measure_ranking(
    truth: pa.Table,
    store: EmbeddingStore,
    chosen: Generation,
    embeddings: EmbeddingMatrix,
    events: Events | None,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """{task: {ne_without, ne_with, gain, auc_without, auc_with, …} or {reason}}; gain is a share of ne_without, and all
    are {value, low, high}.
    """
    if events is None:
        return {task: {"reason": "needs the event log (histories are features); pass events"} for task in TASKS}
    history = events.engagements(chosen.as_of)
    inputs = Inputs(truth, store, chosen, embeddings, events, history)
    return {task: _measure_task(inputs, *types, bootstrap, seed) for task, types in TASKS.items()}


def _measure_task(inputs: Inputs, exposure: str, positive: str, bootstrap: int, seed: int) -> dict[str, Any]:
    types, times = inputs.truth["event_type"], inputs.truth["timestamp"]
    found = pc.unique(types).to_pylist()
    for kind in (exposure, positive):
        if kind not in found:
            return {"reason": f"the truth has no {kind}s (event_type {kind!r})"}
        if kind not in inputs.events.manifest.event_types:
            return {"reason": f"the log has no {kind}s (event_type {kind!r}), so there is no history to rank by"}
    if times.null_count:
        return {"reason": f"{times.null_count:,} rows of the truth have no timestamp"}
    shown = find_exposures(inputs.truth, exposure, positive, inputs.events, inputs.embeddings.user_ids)
    halves = np.random.default_rng(seed).permutation(inputs.events.num_users)[shown.users] % 2
    for half in (0, 1):
        labels = shown.labels[halves == half]
        positives = int(labels.sum())
        if min(positives, len(labels) - positives) < MIN_POSITIVES:
            return {
                "reason": f"one half of the users has {positives} positives among {len(labels)} {exposure}s; "
                f"each half needs at least {MIN_POSITIVES} of both classes"
            }
    base = base_features(shown, inputs, exposure, positive)
    with_alure = np.hstack([base, alure_features(shown, inputs)])
    scores = np.empty((2, len(shown.labels)))  # probabilities, without and with ALURE
    weights = np.zeros(with_alure.shape[1] + 1)
    for half in (0, 1):
        fitted, scored = halves != half, halves == half
        for row, features in enumerate((base, with_alure)):
            model = fit_logistic(features[fitted], shown.labels[fitted])
            scores[row, scored] = predict(model, features[scored])
        weights += model[0] / 2
    names = ("intercept", *BASE_FEATURES, *ALURE_FEATURES)
    return {
        **_gain(shown, scores, bootstrap, seed),
        "weights": {name: round(float(w), 4) for name, w in zip(names, weights)},
    }


def find_exposures(truth: pa.Table, exposure: str, positive: str, events: Events, user_ids: pa.Array) -> Exposures:
    """Exposures of known users and items, each with whether its positive followed within WINDOW.

    A positive belongs to the latest exposure of the same user and item that is not after it.
    """
    users = events.user_indices(truth["user_id"])
    rows = indices(truth["user_id"], user_ids)
    items = events.item_indices(truth["item_id"])
    times = truth["timestamp"].to_numpy().astype(np.int64)
    types = truth["event_type"]
    known = (users >= 0) & (rows >= 0) & (items >= 0)
    shown = np.flatnonzero(known & _is(types, exposure))
    acted = np.flatnonzero(known & _is(types, positive))
    pairs = users * len(events.items) + items
    shown = shown[np.lexsort((times[shown], pairs[shown]))]
    # among the exposures sorted by (pair, time), the last one with the pair and a time not after the positive's
    place = _rank_of(pairs[shown], times[shown], pairs[acted], times[acted]) - 1
    labels = np.zeros(len(shown))
    if len(shown):
        cause = np.maximum(place, 0)
        same = (place >= 0) & (pairs[shown[cause]] == pairs[acted])
        soon = times[acted] - times[shown[cause]] <= WINDOW
        labels[cause[same & soon]] = 1.0
    return Exposures(users[shown], rows[shown], items[shown], times[shown], labels)


def _rank_of(pairs: np.ndarray, times: np.ndarray, wanted_pairs: np.ndarray, wanted_times: np.ndarray) -> np.ndarray:
    """How many of the sorted (pair, time) are not after each wanted (pair, time)."""
    joined_pairs = np.concatenate([pairs, wanted_pairs])
    joined_times = np.concatenate([times, wanted_times])
    is_wanted = np.repeat([0, 1], [len(pairs), len(wanted_pairs)])
    order = np.lexsort((is_wanted, joined_times, joined_pairs))
    before = np.cumsum(1 - is_wanted[order])
    out = np.empty(len(order), dtype=np.int64)
    out[order] = before
    return out[len(pairs) :]


def _is(types: pa.ChunkedArray, kind: str) -> np.ndarray:
    return pc.fill_null(pc.equal(types, kind), False).to_numpy(zero_copy_only=False)


def base_features(shown: Exposures, inputs: Inputs, exposure: str, positive: str) -> np.ndarray:
    """BASE_FEATURES [n, 9] from the history up to the snapshot: what any ranker has."""
    events, history = inputs.events, inputs.history
    owner = np.repeat(np.arange(events.num_users), np.diff(history.offsets))
    seen = history.event_types == events.manifest.event_types.index(exposure)
    done = history.event_types == events.manifest.event_types.index(positive)
    prior = (done.sum() + 1.0) / (seen.sum() + done.sum() + 2.0)

    def rate(key: np.ndarray, of: np.ndarray, size: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Smoothed log odds of a positive for each exposure's key, and log(1 + exposures)."""
        views = np.bincount(key[seen & (key >= 0)], minlength=size).astype(np.float64)
        hits = np.bincount(key[done & (key >= 0)], minlength=size).astype(np.float64)
        p = (hits + strength * prior) / (views + hits + strength)  # a positive may come without an exposure
        valid = of >= 0
        odds = np.where(valid, np.log(p[of] / (1 - p[of])), np.log(prior / (1 - prior)))
        return odds, np.where(valid, np.log1p(views[of]), 0.0)

    item_account, item_category = events.items.accounts.astype(np.int64), events.items.categories.astype(np.int64)
    ad_rate, ad_views = rate(history.items.astype(np.int64), shown.items, len(events.items), 20.0)
    accounts = item_account[history.items]
    account_rate, _ = rate(accounts, item_account[shown.items], max(events.manifest.num_accounts, 1), 20.0)
    user_rate, user_views = rate(owner, shown.users, events.num_users, 10.0)
    with_account = _pair_counts(owner[done], accounts[done], shown.users, item_account[shown.items])
    with_category = _pair_counts(
        owner[done], item_category[history.items[done]], shown.users, item_category[shown.items]
    )
    hour = 2 * np.pi * (shown.timestamps % DAY) / DAY
    return np.stack(
        [
            ad_rate,
            ad_views,
            account_rate,
            user_rate,
            user_views,
            with_account,
            with_category,
            np.sin(hour),
            np.cos(hour),
        ],
        axis=1,
    )


def _pair_counts(users: np.ndarray, keys: np.ndarray, of_users: np.ndarray, of_keys: np.ndarray) -> np.ndarray:
    """log(1 + how often each wanted (user, key) occurs); key −1 counts as none."""
    size = max(int(keys.max(initial=-1)), int(of_keys.max(initial=-1))) + 1
    valid = keys >= 0
    found, counts = np.unique(users[valid] * np.int64(size) + keys[valid], return_counts=True)
    wanted = of_users * np.int64(size) + of_keys
    if not len(found):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(found, wanted), len(found) - 1)
    return np.where((found[place] == wanted) & (of_keys >= 0), np.log1p(counts[place]), 0.0)


def alure_features(shown: Exposures, inputs: Inputs) -> np.ndarray:
    """ALURE_FEATURES [n, 3].

    The audience of an ad (an account) is the mean embedding of its engagers, the recent ones weighing more, without
    the user in question: else the feature would tell who engaged before, which the baseline knows already.
    """
    events, history = inputs.events, inputs.history
    vectors = inputs.embeddings.values.astype(np.float64)
    vectors = vectors - vectors.mean(0)
    row_of_user = indices(events.users["user_id"], inputs.embeddings.user_ids)
    owner = row_of_user[np.repeat(np.arange(events.num_users), np.diff(history.offsets))]
    types = np.array([*events.manifest.event_types, ""])[history.event_types]
    engaged = (owner >= 0) & (types != "view")
    weight = 0.5 ** ((inputs.chosen.as_of - history.timestamps[engaged]) / HALF_LIFE)
    items, owner = history.items[engaged].astype(np.int64), owner[engaged]
    accounts = events.items.accounts.astype(np.int64)
    columns = [
        audience_cosine(vectors, owner, items, weight, shown.embedding_rows, shown.items),
        audience_cosine(vectors, owner, accounts[items], weight, shown.embedding_rows, accounts[shown.items]),
        _candidate_scores(shown, inputs),
    ]
    return np.stack(columns, axis=1)


def audience_cosine(
    vectors: np.ndarray,
    owners: np.ndarray,
    keys: np.ndarray,
    weights: np.ndarray,
    users: np.ndarray,
    of_keys: np.ndarray,
) -> np.ndarray:
    """Cosine of each user's vector with the weighted sum of the vectors of all others who engaged with its key.

    vectors: float64 [rows, d]; owners, keys, weights: one an engagement; users, of_keys: what is asked, [n].
    0 where the key is −1, or nobody else engaged with it.
    """
    distinct, ask = np.unique(of_keys, return_inverse=True)
    place = np.minimum(np.searchsorted(distinct, keys), len(distinct) - 1) if len(distinct) else np.zeros(0, np.int64)
    used = (distinct[place] == keys) & (keys >= 0) if len(distinct) else np.zeros(len(keys), bool)
    engaged = sp.csr_matrix((weights[used], (place[used], owners[used])), shape=(max(len(distinct), 1), len(vectors)))
    sums = engaged @ vectors
    own = np.asarray(engaged[ask, users]).ravel() if len(ask) else np.zeros(0)
    others = sums[ask] - own[:, None] * vectors[users]
    left = np.asarray(engaged.sum(1)).ravel()[ask] - own
    norm = np.linalg.norm(others, axis=1) * np.linalg.norm(vectors[users], axis=1)
    cosine = np.einsum("nd,nd->n", others, vectors[users]) / np.maximum(norm, 1e-12)
    return np.where((left > 1e-9) & (of_keys >= 0), cosine, 0.0)


def _candidate_scores(shown: Exposures, inputs: Inputs) -> np.ndarray:
    """log(1 + the ad's score among the user's ALURE candidates), 0 where it is none of them."""
    store, events, generation = inputs.store, inputs.events, inputs.chosen.generation
    if not any(g.generation == generation and g.name == "alure" for g in store.generations("candidates")):
        return np.zeros(len(shown.items))
    keys = shown.embedding_rows * len(events.items) + shown.items
    order = np.argsort(keys, kind="stable")
    scores = np.zeros(len(keys))
    for batch in store.iter_candidates(generation, "alure", ["user_id", "item_ids", "scores"]):
        rows = indices(batch["user_id"], inputs.embeddings.user_ids)
        mine = np.flatnonzero(np.isin(rows, shown.embedding_rows))
        if not len(mine):
            continue
        batch = batch.take(pa.array(mine))
        items = events.item_indices(pc.list_flatten(batch["item_ids"]))
        values = pc.list_flatten(batch["scores"]).to_numpy(zero_copy_only=False)
        owner = np.repeat(rows[mine], pc.list_value_length(batch["item_ids"]).to_numpy(zero_copy_only=False))
        found = owner * len(events.items) + items
        by_key = np.argsort(found, kind="stable")
        place = np.minimum(np.searchsorted(found[by_key], keys[order]), max(len(found) - 1, 0))
        if len(found):
            same = found[by_key][place] == keys[order]
            scores[order[same]] = values[by_key][place[same]]
    return np.log1p(scores)


Model = tuple[np.ndarray, np.ndarray, np.ndarray]  # weights [1 + f], means [f], scales [f]


def fit_logistic(x: np.ndarray, y: np.ndarray, iterations: int = 30) -> Model:
    """Ridge logistic regression by Newton's method on standardised features (weights[0] is the intercept)."""
    means, scales = x.mean(0), np.maximum(x.std(0), 1e-9)
    z = np.hstack([np.ones((len(x), 1)), (x - means) / scales])
    ridge = np.diag([1e-6, *[RIDGE] * x.shape[1]])
    weights = np.zeros(z.shape[1])
    weights[0] = np.log(y.mean() / (1 - y.mean()))
    for _ in range(iterations):
        p = 1.0 / (1.0 + np.exp(-(z @ weights)))
        gradient = z.T @ (p - y) + ridge @ weights
        hessian = (z * (p * (1 - p))[:, None]).T @ z + ridge
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            break
    return weights, means, scales


def predict(model: Model, x: np.ndarray) -> np.ndarray:
    weights, means, scales = model
    return 1.0 / (1.0 + np.exp(-(weights[0] + (x - means) / scales @ weights[1:])))


def _gain(shown: Exposures, scores: np.ndarray, bootstrap: int, seed: int) -> dict[str, Any]:
    """NE and AUC of both rankers and the relative gain in NE; intervals over users (all exposures of one together)."""
    users, row = np.unique(shown.users, return_inverse=True)
    losses = metrics.log_loss(shown.labels, scores)
    sums = np.stack(
        [
            np.bincount(row, minlength=len(users)),
            np.bincount(row, weights=shown.labels, minlength=len(users)),
            np.bincount(row, weights=losses[0], minlength=len(users)),
            np.bincount(row, weights=losses[1], minlength=len(users)),
        ],
        axis=1,
    )

    def figures(totals: np.ndarray) -> np.ndarray:
        """[…, 3]: NE without, NE with, relative gain, of totals […, 4]."""
        entropy = totals[..., 0] * metrics.base_entropy(totals[..., 1] / totals[..., 0])
        without, with_ = totals[..., 2] / entropy, totals[..., 3] / entropy
        return np.stack([without, with_, 1 - with_ / without], axis=-1)

    value = figures(sums.mean(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = figures(metrics.bootstrap_means(sums, bootstrap, seed))
    samples = samples[np.isfinite(samples).all(1)]  # a resample with one class only has no NE
    intervals = [asdict(metrics.interval(value[i], samples[:, i])) for i in range(3)]
    return {
        "exposures": len(shown.labels),
        "positives": int(shown.labels.sum()),
        "users": len(users),
        "base_rate": float(shown.labels.mean()),
        "ne_without": intervals[0],
        "ne_with": intervals[1],
        "gain": intervals[2],
        "auc_without": _auc(shown.labels, scores[0], row, bootstrap, seed),
        "auc_with": _auc(shown.labels, scores[1], row, bootstrap, seed),
        "significant": bool(intervals[2]["low"] > 0 or intervals[2]["high"] < 0),
    }


def _auc(labels: np.ndarray, scores: np.ndarray, row: np.ndarray, bootstrap: int, seed: int) -> dict[str, float]:
    samples = metrics.bootstrap_auc(row, labels, scores, bootstrap, seed)
    return asdict(metrics.interval(metrics.auc(labels, scores), samples[np.isfinite(samples)]))
