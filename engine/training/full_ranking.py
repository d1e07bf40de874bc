"""How high the two-tower head ranks a held-out item among all items: HR@K and NDCG@K as sequential recommenders report.

Full ranking: no sampled candidates. Items that the user has engaged with already are left out, the held-out one aside.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import AlureModel, Catalog
from alure.engine.model.towers import two_tower_scores
from alure.engine.progress import track
from alure.engine.tables import ids_as, read_columns
from alure.engine.training.metrics import hit_rate_and_ndcg

BATCH = 256


@dataclass
class FullRanking:
    """What a ranking of held-out items found. Each figure: {K: {"value", "low", "high"}}, 95 % bootstrap over users."""

    users: int
    items: int
    unknown_items: int = 0  # held out, but not in the log: a miss
    hit_rate: dict[str, Any] = field(default_factory=dict)
    ndcg: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def held_out_ranks(
    model: AlureModel,
    events: Events,
    catalog: Catalog,
    users: np.ndarray,
    held_out: np.ndarray,
    *,
    as_of: int,
    max_events: int | None,
    without_newest: int = 0,
) -> np.ndarray:
    """Rank from 0 of held_out [n] (item index) among all items of the ad sources, for each of users [n]: int64 [n].

    The users are embedded from their newest `max_events` events up to `as_of`, less the newest `without_newest`, at the
    time of the last event read: the held-out events of such data sets follow at once, and may have no time. Ties, and
    scores that are not numbers, count against the held-out item: a model that tells nothing apart ranks it last.
    """
    history = events.engagements(as_of)
    known = torch.from_numpy(np.unique(history.items).astype(np.int64)).to(catalog.items.device)
    ads = torch.cat([model.embed_ads(part, catalog) for part in known.split(8_192)])
    column = torch.full((catalog.num_items,), -1, device=known.device).index_copy(
        0, known, torch.arange(len(known), device=known.device)
    )
    ranks = []
    with track("Ranking", len(users), "users") as bar:
        for begin in range(0, len(users), BATCH):
            some, wanted = users[begin : begin + BATCH], torch.from_numpy(held_out[begin : begin + BATCH])
            last = history.offsets[some + 1] - 1 - without_newest
            batch = events.batch(some, as_of, max_events, without_newest)
            batch = replace(batch, as_of=torch.from_numpy(history.timestamps[last])).to(known.device)
            scores = two_tower_scores(model(batch, catalog).embeddings, ads)
            rows = torch.arange(len(some), device=known.device)
            own = scores[rows, column[wanted.to(known.device)]].clone()
            lengths = history.offsets[some + 1] - without_newest - history.offsets[some]
            places = np.concatenate([np.arange(o, o + n) for o, n in zip(history.offsets[some], lengths)])
            seen = column[torch.from_numpy(history.items[places].astype(np.int64)).to(known.device)]
            scores[torch.from_numpy(np.repeat(np.arange(len(some)), lengths)).to(known.device), seen] = -torch.inf
            scores[rows, column[wanted.to(known.device)]] = -torch.inf
            ranks.append((~(scores < own[:, None])).sum(1).cpu().numpy())  # NaN is below nothing
            bar.advance(len(some))
    return np.concatenate(ranks) if ranks else np.empty(0, np.int64)


def rank_truth(
    model_folder: Path, events: Events, truth: Path, ks: list[int], *, max_events: int | None, seed: int = 0
) -> FullRanking:
    """HR@K and NDCG@K of a checkpoint on `truth` (user_id, item_id; one row a user) after the whole log."""
    model = AlureModel.load(model_folder)
    if model.config.ad_level == "account":
        raise InputError(f"model: {model_folder} retrieves accounts (model.ad_level), it cannot rank the items of one")
    catalog = model.user.catalog(events)
    table = read_columns(truth, "truth", ["user_id", "item_id"])
    what = f"truth: {truth}"
    users = events.user_indices(ids_as(table, "user_id", events.users["user_id"].type, what, "the users of the log"))
    items = events.item_indices(ids_as(table, "item_id", events.items.item_ids.type, what, "the items of the log"))
    if (users < 0).all():
        raise InputError(f"truth: none of the {len(users):,} users of {truth} is in the log {events.path}")
    users, items = users[users >= 0], items[users >= 0]
    last = events.manifest.last_timestamp
    engaged = np.zeros(events.manifest.num_items, bool)
    engaged[events.engagements(last).items] = True
    known = (items >= 0) & engaged[items]
    found = held_out_ranks(model, events, catalog, users[known], items[known], as_of=last, max_events=max_events)
    ranks = np.full(len(users), np.iinfo(np.int64).max)
    ranks[known] = found
    return summarize(ranks, int(engaged.sum()), int((~known).sum()), ks, seed)


def summarize(ranks: np.ndarray, items: int, unknown: int, ks: list[int], seed: int) -> FullRanking:
    figures = hit_rate_and_ndcg(ranks, ks, seed)
    return FullRanking(len(ranks), items, unknown, figures["hit_rate"], figures["ndcg"])


class LeaveOneOut:
    """Every user's last event is held out of training; how high is it ranked from the events before it?"""

    def __init__(self, events: Events, as_of: int, max_events: int | None, seed: int) -> None:
        self.events, self.as_of, self.max_events, self.seed = events, as_of, max_events, seed
        history = events.engagements(as_of)
        lengths = np.diff(history.offsets)
        self.users = np.flatnonzero(lengths >= 2)
        if not len(self.users):
            raise InputError("training.held_out: last_event needs users of two events or more, the log has none")
        self.items = history.items[history.offsets[self.users + 1] - 1].astype(np.int64)
        self.num_items = len(np.unique(history.items))

    def measure(self, model: AlureModel, catalog: Catalog, most: int | None = None) -> dict[str, Any]:
        """{"users", "items", "hit_rate", "ndcg"}, of `most` users drawn once by the seed, or of all."""
        chosen = np.arange(len(self.users))
        if most is not None and most < len(chosen):
            chosen = np.sort(np.random.default_rng(self.seed).choice(len(chosen), most, replace=False))
        ranks = held_out_ranks(
            model,
            self.events,
            catalog,
            self.users[chosen],
            self.items[chosen],
            as_of=self.as_of,
            max_events=self.max_events,
            without_newest=1,
        )
        return vars(summarize(ranks, self.num_items, 0, [10, 50], self.seed))
