"""What similar users did, as candidates: the held-out buy of retail_rocket, and the next new venue of the check-ins.

A user's candidates are the items of the k users most like it that it has not had itself, each with the sum of their
similarities. Users are alike by the cosine of their embeddings, by that of their items (each item weighted by
log(users / users that had it), Euclidean norm), or by items had near in time: a common item counts exp(−|Δt| / 30
days). On retail_rocket what a similar user had counts exp(−|Δt| / 30 days) too, Δt from the user's own last event; on
the check-ins that would lose a fifth. "Both" adds a weight times the embeddings' cosine to the items near in time.
The weight and what fades are the best on each user's last event before the held-out one. "and popularity" adds the
score as a share of the user's best to the popularity as a share of the most popular item's. The embeddings come from
a model trained on what happened before each held-out event, with the two-tower and the user–user loss.

On the check-ins the held-out event is a user's last visit to a venue where it had not been; users with fewer than
five events before it are left out, and so are all events from then on. Users and venues are those of one city.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from alure.bench.quality.new_friends import embed, paired_interval
from alure.bench.quality.results import Results, matching
from alure.engine.config import DAY, EventsConfig, ModelConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events, ingest
from alure.engine.model import UserModel
from alure.engine.progress import say
from alure.engine.training import train

EXPERIMENT = "similar-users"
CUTS = {"retail_rocket": (10, 50, 200), "checkins": (50,)}
NEIGHBORS = {"retail_rocket": (15,), "checkins": (15, 50, 200)}
NEAR = 30 * DAY  # seconds
FADES = {"retail_rocket": True, "checkins": False}  # whether what a similar user had counts less far from the user
WEIGHTS = (0.0, 0.01, 0.03, 0.1)
FEWEST = 5  # events before the held-out visit
SETTINGS: dict[str, Any] = {
    "model": {"preset": "small", "num_embeddings": 2},
    "training": {"steps": 200, "view_weight": 0.5, "batch_users": 128, "learning_rate": 2e-3, "validation_share": 0.0},
}


@dataclass(frozen=True)
class Visits:
    """Events by user and time, and the item to be found of every user that has one. Users and items count from 0."""

    rows: pa.Table  # of the input, for `ingest`; in the order of the arrays
    users: np.ndarray  # int64 [n]
    items: np.ndarray  # int64 [n]
    times: np.ndarray  # int64 [n], seconds
    wanted: np.ndarray  # int64 [users], −1 where there is none
    num_items: int

    def keep(self, which: np.ndarray, wanted: np.ndarray) -> "Visits":
        rows = self.rows.filter(pa.array(which))
        return Visits(rows, self.users[which], self.items[which], self.times[which], wanted, self.num_items)

    def last_of_pairs(self) -> np.ndarray:
        """Row of each user's last event of each item that it had."""
        keys = self.users * self.num_items + self.items
        _, from_the_end = np.unique(keys[::-1], return_index=True)
        return len(keys) - 1 - from_the_end

    def last_times(self) -> sp.csr_matrix:
        """When each user last had each item: float64 seconds, stored for those that it had."""
        last = self.last_of_pairs()
        where = (self.users[last], self.items[last])
        return sp.csr_matrix((self.times[last].astype(np.float64), where), (len(self.wanted), self.num_items))

    def matrix(self) -> sp.csr_matrix:
        """Which user had which item: 0 or 1, float32."""
        had = self.last_times().astype(np.float32)
        had.data[:] = 1
        return had


def run(data: Path, results: Results, seeds: tuple[int, ...]) -> None:
    """Train and measure every set and seed without a row. data: the folder with retail_rocket/ and checkins/."""
    for name, read in (("retail_rocket", read_buys), ("checkins", read_new_visits)):
        missing = [seed for seed in seeds if results.find(name, seed, SETTINGS) is None]
        if missing:
            visits = read(data / name)
            for seed in missing:
                say(f"similar-users: {name}, seed {seed}")
                results.append(name, seed, SETTINGS, measure(visits, name, seed))


def read_buys(folder: Path) -> Visits:
    """retail_rocket: all events, and the held-out buy, which no event of its user is of."""
    events, test = read_file(folder / "events.parquet"), read_file(folder / "test.parquet")
    users = np.unique(events["user_id"].to_numpy())
    items = np.unique(np.r_[events["item_id"].to_numpy(), test["item_id"].to_numpy()])
    wanted = np.full(len(users), -1)
    wanted[np.searchsorted(users, test["user_id"].to_numpy())] = np.searchsorted(items, test["item_id"].to_numpy())
    return visits_of(events, users, items, wanted)


def read_new_visits(folder: Path) -> Visits:
    """The check-ins before each user's last visit to a new venue."""
    events = read_file(folder / "events.parquet")
    users, items = (np.unique(events[name].to_numpy()) for name in ("user_id", "item_id"))
    visits = visits_of(events, users, items, np.full(len(users), -1))
    found = last_new(visits)
    before = visits.times < np.where(found >= 0, visits.times[found], 0)[visits.users]
    enough = (found >= 0) & (np.bincount(visits.users[before], minlength=len(users)) >= FEWEST)
    return visits.keep(before, np.where(enough, visits.items[found], -1))


def visits_of(events: pa.Table, users: np.ndarray, items: np.ndarray, wanted: np.ndarray) -> Visits:
    """users, items: sorted ids."""
    rows = events.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    row_users = np.searchsorted(users, rows["user_id"].to_numpy())
    row_items = np.searchsorted(items, rows["item_id"].to_numpy())
    return Visits(rows, row_users, row_items, rows["timestamp"].to_numpy(), wanted, len(items))


def read_file(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(f"similar-users: {path} does not exist; --data is the folder of retail_rocket/ and checkins/")
    return pq.read_table(path)


def last_new(visits: Visits) -> np.ndarray:
    """Row of each user's last event of an item that it had not had, int64 [users], −1 for none."""
    _, first = np.unique(visits.users * visits.num_items + visits.items, return_index=True)
    first.sort()
    rows = np.full(len(visits.wanted), -1)
    rows[visits.users[first]] = first
    return rows


def without_the_last(visits: Visits) -> Visits:
    """To choose a weight by: the last new item of each user is wanted, and what came from then on is not known."""
    found = last_new(visits)
    before = visits.times < np.where(found >= 0, visits.times[found], 0)[visits.users]
    known = (found >= 0) & (np.bincount(visits.users[before], minlength=len(found)) > 0)
    return visits.keep(before, np.where(known & (visits.wanted >= 0), visits.items[found], -1))


def measure(visits: Visits, name: str, seed: int) -> dict[str, Any]:
    """Hit rates of every way, by city where there are several; and what is gained over popularity, paired."""
    near, cosines = near_in_time(visits), embedded_cosines(visits, seed)
    ways = {"embeddings": cosines, "items": common_items(visits), "items near in time": near}
    chosen: dict[str, Any] = {}
    if name == "retail_rocket":
        tuned = hit_rates_by_weight(without_the_last(visits), name, seed)
        weight = max(tuned, key=lambda w: tuned[w])
        ways["both"] = near + weight * cosines
        chosen = {"weight": weight, "hidden_hit_rate": {str(w): rate for w, rate in tuned.items()}}
    places = {place: figures_of(ways, visits, users, name, seed) for place, users in places_of(visits).items()}
    return {"places": places} | chosen


def hit_rates_by_weight(visits: Visits, name: str, seed: int) -> dict[float, float]:
    """{weight of the embeddings: hit rate}, for the fewest neighbours and the longest list."""
    near, cosines, users = near_in_time(visits), embedded_cosines(visits, seed), every_user(visits)
    ranks = {w: ranks_of(near + w * cosines, visits, users, NEIGHBORS[name][0], FADES[name]) for w in WEIGHTS}
    return {weight: float(np.mean(of < CUTS[name][-1])) for weight, of in ranks.items()}


def figures_of(ways: dict[str, np.ndarray], visits: Visits, users: np.ndarray, name: str, seed: int) -> dict[str, Any]:
    """Of the `users`: the hit rate of every way and number of neighbours, and its paired gain over popularity."""
    popular = ranks_by_popularity(visits, users)
    ranks = {"popularity": popular}
    for k in NEIGHBORS[name]:
        for way, similar in ways.items():
            ranks[f"{way}, {k} users"] = ranks_of(similar, visits, users, k, FADES[name])
            ranks[f"{way}, {k} users, and popularity"] = ranks_of(
                similar, visits, users, k, FADES[name], with_popularity=True
            )
    hits = {way: {str(cut): (of < cut).astype(float) for cut in CUTS[name]} for way, of in ranks.items()}
    rates = {way: {cut: float(hit.mean()) for cut, hit in found.items()} for way, found in hits.items()}
    gains = {
        way: {cut: paired_interval(hit - hits["popularity"][cut], seed) for cut, hit in found.items()}
        for way, found in hits.items()
        if way != "popularity"
    }
    return {"hit_rate": rates, "over_popularity": gains, "users": len(popular)}


def every_user(visits: Visits) -> np.ndarray:
    return np.arange(len(visits.wanted))


def places_of(visits: Visits) -> dict[str, np.ndarray]:
    """The users of each city; all of them where the events have no country."""
    if "country" not in visits.rows.column_names:
        return {"": every_user(visits)}
    cities = np.asarray(visits.rows["country"].to_pylist())
    return {str(city): np.unique(visits.users[cities == city]) for city in np.unique(cities)}


def embedded_cosines(visits: Visits, seed: int) -> np.ndarray:
    """float32 [users, users], 0 for users without an event."""
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(visits.rows, Path(scratch) / "events.parquet")
        ingest(EventsConfig(inputs=[Path(scratch) / "events.parquet"]), Path(scratch) / "log")
        log = Events.open(Path(scratch) / "log")
        model = ModelConfig.model_validate(SETTINGS["model"])
        config = TrainingConfig.model_validate(SETTINGS["training"])
        report = train(log, model, config, Path(scratch) / "model", seed=seed)
        vectors = embed(UserModel.load(report.model), log)
        rows = np.full(len(visits.wanted), -1)
        rows[visits.users] = log.user_indices(visits.rows["user_id"])
    placed = np.where(rows[:, None] >= 0, vectors[rows], 0).astype(np.float32)
    return placed @ placed.T


def rarity(visits: Visits) -> np.ndarray:
    """log(users / users that had it) of every item, float32; 0 for items that nobody had."""
    had = np.asarray(visits.matrix().sum(axis=0)).ravel()
    return np.where(had > 0, np.log(len(visits.wanted) / np.maximum(had, 1)), 0).astype(np.float32)


def common_items(visits: Visits) -> np.ndarray:
    """Cosine of what users had, weighted by rarity: float32 [users, users]."""
    weighted = visits.matrix().multiply(rarity(visits)).tocsr()
    return normalized((weighted @ weighted.T).toarray())


def near_in_time(visits: Visits) -> np.ndarray:
    """The same where a common item counts exp(−|Δt| / NEAR), Δt between the users' last events of it."""
    weights = rarity(visits) ** 2
    last = visits.last_of_pairs()
    order = last[np.argsort(visits.items[last], kind="stable")]
    similar = np.zeros((len(visits.wanted),) * 2, np.float32)
    for group in np.split(order, np.flatnonzero(np.diff(visits.items[order])) + 1):
        apart = np.abs(visits.times[group][:, None] - visits.times[group])
        similar[np.ix_(visits.users[group], visits.users[group])] += (
            weights[visits.items[group[0]]] * np.exp(-apart / NEAR)
        ).astype(np.float32)
    return normalized(similar)


def normalized(products: np.ndarray) -> np.ndarray:
    """Inner products [n, n] as cosines."""
    norms = np.sqrt(np.maximum(np.diag(products), 1e-12))
    return (products / norms[:, None] / norms).astype(np.float32)


def popularity(visits: Visits, users: np.ndarray) -> np.ndarray:
    """How many of the users had each item, as a share of the most: float32 [items]."""
    had = np.asarray(visits.matrix()[users].sum(axis=0)).ravel()
    return (had / max(had.max(), 1)).astype(np.float32)


def ranks_by_popularity(visits: Visits, users: np.ndarray) -> np.ndarray:
    had = visits.matrix()
    popular = popularity(visits, users)
    asked = users[visits.wanted[users] >= 0]
    return np.asarray([rank(popular.copy(), had[user].indices, visits.wanted[user]) for user in asked])


def ranks_of(
    similar: np.ndarray, visits: Visits, users: np.ndarray, k: int, fades: bool, with_popularity: bool = False
) -> np.ndarray:
    """Places of the wanted items among what the user has not had, from 0, of the `users` that want one; float64.

    similar [all users, all users]. Items with the score of the wanted one share their places; one without a
    similar user that had it comes last.
    """
    had = visits.last_times()
    newest = np.zeros(len(visits.wanted))
    np.maximum.at(newest, visits.users, visits.times)
    popular = popularity(visits, users)
    among = similar[:, users]
    found = []
    for user in users[visits.wanted[users] >= 0]:
        row = np.where(users == user, 0, among[user])
        nearest = np.argpartition(-row, min(k, len(row) - 1))[:k]
        theirs = had[users[nearest]]
        theirs.data = np.exp(-np.abs(theirs.data - newest[user]) / NEAR) if fades else np.ones_like(theirs.data)
        scores = np.maximum(row[nearest], 0) @ theirs
        if with_popularity:
            scores = scores / max(scores.max(), 1e-12) + popular
        found.append(rank(np.asarray(scores, np.float32), had[user].indices, visits.wanted[user]))
    return np.asarray(found)


def rank(scores: np.ndarray, seen: np.ndarray, wanted: int) -> float:
    scores[seen] = -1
    if scores[wanted] <= 0:
        return float(len(scores))
    better, equal = (scores > scores[wanted]).sum(), (scores == scores[wanted]).sum()
    return float(better + (equal - 1) / 2)


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    rows = matching(results, SETTINGS)
    lines = ["## Similar users", "", (__doc__ or "").strip(), ""]
    if not rows:
        return "\n".join([*lines, "Not yet measured."]) + "\n"
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        columns = [(place, str(cut)) for place in own[0]["places"] for cut in CUTS[name]]
        heads = [f"{place} HR@{cut}".strip() for place, cut in columns]
        lines += [f"### {name}", "", f"| {len(own)} seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for way in own[0]["places"][columns[0][0]]["hit_rate"]:
            cells = [cell([row["places"][place] for row in own], way, cut) for place, cut in columns]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        if name == "retail_rocket":
            lines += ["", f"Weights of the embeddings in both: {', '.join(str(row['weight']) for row in own)}."]
        lines.append("")
    return "\n".join([*lines, "\\* above popularity in every seed: the paired 95 % interval excludes zero."]) + "\n"


def cell(places: list[dict[str, Any]], way: str, cut: str) -> str:
    """Mean and deviation over the seeds, and whether it is above popularity in all of them."""
    values = [place["hit_rate"][way][cut] for place in places]
    shown = f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")
    above = way != "popularity" and all(place["over_popularity"][way][cut]["low"] > 0 for place in places)
    return shown + (" \\*" if above else "")
