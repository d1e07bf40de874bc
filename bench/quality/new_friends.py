"""Check-ins in New York and São Paulo: who becomes friends later, from old friendships and from the user embeddings.

Candidates of a user are the users of its city who are not its friends yet, ranked by Personalized PageRank over the old
friendships (α = 0.15), by the cosine of the embeddings, and by a blend: PageRank as a share of the user's best, plus a
weight times the cosine. The weight is chosen on old friendships, a fifth of which is hidden for it.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch

from alure.bench.quality.results import Results
from alure.engine.config import EventsConfig, ModelConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events, ingest
from alure.engine.model import UserModel
from alure.engine.progress import say
from alure.engine.training import train
from alure.kernels import personalized_pagerank

EXPERIMENT = "new-friends"
SEEDS = (0, 1, 2)
K = 50
BEST = 1_000  # PageRanks of a user
MODEL: dict[str, Any] = {"preset": "small", "num_embeddings": 2}
TRAINING: dict[str, Any] = {"steps": 150, "view_weight": 0.5, "batch_users": 128, "learning_rate": 2e-3}
WEIGHTS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
HIDDEN = 0.2  # of the old friendships, to choose the weight


def run(data: Path, results: Results, seeds: tuple[int, ...] = SEEDS) -> None:
    """Train and measure every seed that has no row yet. data: the folder with checkins/*.parquet."""
    missing = [seed for seed in seeds if results.find("blend", seed, settings_now()) is None]
    if not missing:
        return
    home = data / "checkins"
    for name in ("events", "friends_old", "friends_new"):
        if not (home / f"{name}.parquet").is_file():
            raise InputError(f"new-friends: {home / name}.parquet does not exist; --data is the folder with checkins/")
    with tempfile.TemporaryDirectory() as scratch:
        ingest(EventsConfig(inputs=[home / "events.parquet"]), Path(scratch) / "log")
        log = Events.open(Path(scratch) / "log")
        old, later = (friendships(log, home / f"friends_{when}.parquet") for when in ("old", "new"))
        for seed in missing:
            say(f"new-friends: seed {seed}")
            model, config = ModelConfig.model_validate(MODEL), TrainingConfig.model_validate(TRAINING)
            report = train(log, model, config, Path(scratch) / f"model-{seed}", seed=seed)
            vectors = embed(UserModel.load(report.model), log)
            figures = measure(log, vectors, old, later, seed)
            results.append("blend", seed, settings_now(), figures | {"training_seconds": report.seconds})


def friendships(log: Events, path: Path) -> sp.csr_matrix:
    """Symmetric 0/1 matrix [users, users] of the log's users."""
    table = pq.read_table(path)
    first, second = (log.user_indices(table[name]) for name in ("user_id", "followed_id"))
    known = (first >= 0) & (second >= 0) & (first != second)
    half = sp.csr_matrix((np.ones(int(known.sum())), (first[known], second[known])), shape=(log.num_users,) * 2)
    return ((half + half.T) > 0).astype(np.float64).tocsr()


@torch.no_grad()
def embed(model: UserModel, log: Events) -> np.ndarray:
    """Unit rows [users, k·d] at the end of the log."""
    catalog, parts = model.catalog(log), []
    for begin in range(0, log.num_users, 256):
        users = range(begin, min(begin + 256, log.num_users))
        parts.append(model(log.batch(users, log.manifest.last_timestamp), catalog).flatten(1).numpy())
    vectors = np.concatenate(parts)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(log: Events, vectors: np.ndarray, old: sp.csr_matrix, later: sp.csr_matrix, seed: int) -> dict[str, Any]:
    """Recall@50 of the later friends, by city, of each way to rank; and the weight chosen on hidden old friendships."""
    generator = np.random.default_rng(seed)
    edges = sp.triu(old).tocoo()
    shown = generator.random(edges.nnz) >= HIDDEN
    half = sp.csr_matrix((np.ones(int(shown.sum())), (edges.row[shown], edges.col[shown])), shape=old.shape)
    rest = (half + half.T).tocsr()
    hidden, new = old - rest, later - later.multiply(old)
    cities = [range(c.first_user, c.first_user + c.num_users) for c in log.manifest.countries]
    names = [c.name for c in log.manifest.countries]
    cosines = [vectors[city] @ vectors[city].T for city in cities]

    walks = [page_ranks(rest, city) for city in cities]
    tuned = {}
    for weight in WEIGHTS:
        found = [recalls(r + weight * c, rest, hidden, city) for r, c, city in zip(walks, cosines, cities)]
        tuned[weight] = float(np.mean([recall.mean() for recall in found]))
    weight = max(tuned, key=lambda w: tuned[w])

    walks = [page_ranks(old, city) for city in cities]
    common = [np.asarray((old[city] @ old[city].T).todense(), np.float32) for city in cities]
    blend = [r + weight * c for r, c in zip(walks, cosines)]
    ways = {"common friends": common, "PageRank": walks, "embeddings": cosines, "blend": blend}
    found_by = {
        way: {n: recalls(scores, old, new, city) for n, scores, city in zip(names, of_cities, cities)}
        for way, of_cities in ways.items()
    }
    return {
        "weight": weight,
        "hidden_recall": {str(w): recall for w, recall in tuned.items()},
        "recall": {
            way: {city: {"value": float(r.mean()), "users": len(r)} for city, r in found.items()}
            for way, found in found_by.items()
        },
        "gain_of_the_blend": {
            city: paired_interval(found_by["blend"][city] - found_by["PageRank"][city], seed) for city in names
        },
    }


def page_ranks(graph: sp.csr_matrix, city: range) -> np.ndarray:
    """float32 [city, city]: each user's best BEST scores as shares of its best one among those who are no friends."""
    edges = graph.tocsr()
    edges.sort_indices()
    offsets, neighbors = (torch.from_numpy(x.astype(t)) for x, t in ((edges.indptr, "i8"), (edges.indices, "i4")))
    ranks = personalized_pagerank(offsets, neighbors, None, torch.tensor(city), k=BEST)
    ids, values = ranks.ids.numpy() - city.start, ranks.scores.numpy()
    inside = (ids >= 0) & (ids < len(city))
    rows = np.broadcast_to(np.arange(len(city))[:, None], ids.shape)
    scores = np.zeros((len(city), len(city)), np.float32)
    scores[rows[inside], ids[inside]] = values[inside]
    scores[edges[city][:, city].nonzero()] = 0.0
    return scores / np.maximum(scores.max(axis=1, keepdims=True), 1e-12)


def recalls(scores: np.ndarray, known: sp.csr_matrix, wanted: sp.csr_matrix, city: range) -> np.ndarray:
    """Recall@K of each user of the city who has someone to find; friends and oneself are no candidates."""
    scores = scores.copy()
    scores[known[city][:, city].nonzero()] = -np.inf
    np.fill_diagonal(scores, -np.inf)
    relevant = wanted[city][:, city].toarray() > 0
    asked = np.flatnonzero(relevant.any(axis=1))
    best = np.argpartition(-scores[asked], K, axis=1)[:, :K]
    return np.take_along_axis(relevant[asked], best, axis=1).sum(axis=1) / relevant[asked].sum(axis=1)


def paired_interval(differences: np.ndarray, seed: int, resamples: int = 1_000) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    means = [differences[generator.integers(0, len(differences), len(differences))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"value": float(differences.mean()), "low": float(low), "high": float(high)}


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    rows = [row for row in results.rows() if row["settings"] == settings_now()]
    text = (__doc__ or "").strip().split("\n\n", 1)
    lines = ["## Check-ins: new friends", "", text[0], "", text[1]]
    if not rows:
        return "\n".join(lines) + "\n\nNot measured yet.\n"
    cities = list(rows[0]["recall"]["blend"])
    lines += ["", f"| Recall@{K} | {' | '.join(cities)} |", f"|---|{'---|' * len(cities)}"]
    for name in ("common friends", "PageRank", "embeddings", "blend"):
        shown = []
        for city in cities:
            values = np.array([row["recall"][name][city]["value"] for row in rows])
            shown.append(f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(shown)} |")
    for row in rows:
        gains = [
            f"{city} {g['value']:+.4f} ({g['low']:+.4f} to {g['high']:+.4f})"
            for city, g in row["gain_of_the_blend"].items()
        ]
        lines += ["", f"Seed {row['seed']}: weight {row['weight']}; the blend over PageRank alone: {', '.join(gains)}."]
    return "\n".join(lines) + "\n"


def settings_now() -> dict[str, Any]:
    return {"model": MODEL, "training": TRAINING}
