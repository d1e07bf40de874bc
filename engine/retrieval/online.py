"""OnlineRetriever: the real-time half of CandidateRetriever. Between two generations, one user at a time.

The user's own new events move its embedding, and the users nearest to that are a graph of their own, `online`, beside
the nightly ones. What anybody did since the snapshot counts for all of them: weights are relative to the snapshot, so
a new engagement counts more than 1. A list's scores are divided by its best, so they are those of the time asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from alure.engine.clusters import compute_device
from alure.engine.errors import AlureError, InputError
from alure.engine.events import EventBatch, History
from alure.engine.events.indices import NO_COUNTRY
from alure.engine.events.reader import ranges
from alure.engine.events.recent import Added, RecentEvents, RecentRows
from alure.engine.model import UserModel, model_digest
from alure.engine.retrieval.blend import check_graphs
from alure.engine.retrieval.engagements import Inventory, expand_users, rank_of_accounts, weigh
from alure.engine.retrieval.nearest import NearestUsers
from alure.engine.retrieval.retriever import CandidateRetriever, graph_sets
from alure.engine.store.whole import as_ids
from alure.kernels import Candidates, Engagements, NeighborLists

ONLINE = "online"  # the graph of a moved embedding's neighbours


@dataclass(frozen=True)
class Visitor:
    """Who asks, and what it did since the snapshot."""

    user_id: int | str
    row: int  # of the generation, −1 where it has no embedding there
    index: int  # of the log, −1 where the log does not know it
    country: str
    news: RecentRows


class OnlineRetriever:
    """Candidates of one user at a moment after the snapshot of `retriever`, whose generation and graphs are read once.

    model: the checkpoint that made the generation, to move the embeddings of users with new events; without one they
    keep those of the snapshot. Its neighbours are as many as the graph `alure` has (k: or so many), and weigh as much
    in the blend as config.graphs says of `online` (default: 1).
    Any number of threads may call `add` and `retrieve`. A later generation takes a new OnlineRetriever, which is fed
    with the events since.
    """

    def __init__(self, retriever: CandidateRetriever, model: Path | str | None = None, *, k: int | None = None) -> None:
        store, events, self.source = retriever.store, retriever.events, retriever.source
        self.retriever, self.events, self.config = retriever, events, retriever.config
        self.recent = RecentEvents(events, self.source.as_of, self.config.recent_events)
        names = [*retriever.graphs, *([] if model is None else [ONLINE])]
        check_graphs(names)
        self.mixture, self.graph_names = retriever.mixture_of(names), graph_sets(names)
        self.model = None if model is None else self._load(Path(model))
        if self.model is not None:
            self.catalog = self.model.catalog(events)
            self.nearest = NearestUsers(store, self.source, self._neighbors(k))
        users = store.read_users(self.source.generation)
        self.user_ids, self.countries = users["user_id"].combine_chunks(), users["country"].combine_chunks()
        self.lists = retriever.neighbors(self.user_ids)
        self._index = events.user_indices(self.user_ids)
        self._rows = {user: row for row, user in enumerate(self.user_ids.to_pylist())}
        self._known = events.users.column("user_id").combine_chunks()
        others = ((user, index) for index, user in enumerate(self._known.to_pylist()) if user not in self._rows)
        self._others = dict(others)  # whom the log knows and the generation does not
        self._totals = np.bincount(retriever.engaged.items, retriever.engaged.weights, minlength=len(events.items))
        self._ranked = rank_of_accounts(self._totals, events.items.accounts)
        self._inventory = lru_cache(maxsize=64)(self._make_inventory)
        self._ads = [events.manifest.sources.index(name) for name in events.manifest.ad_sources]

    def add(self, events: pa.Table | pa.RecordBatch) -> Added:
        """New events, with the columns of an event log; see `RecentEvents.add`."""
        return self.recent.add(events)

    def retrieve(self, user_id: int | str, as_of: int) -> pa.Table:
        """user_id, country, item_ids, scores, reasons, graphs: one row, as `CandidateRetriever.retrieve` gives it.

        as_of: unix seconds, from the snapshot on; nothing later is seen, nor what is older than recent_seconds and not
        in the snapshot. Without a new event of anybody the answer is the snapshot's, to the bit.
        Raises InputError for a user without an embedding and without a new event, and AlureError where the new
        embedding is not finite.
        """
        visitor = self.read(user_id, as_of)
        lists = self.nightly_lists(visitor)
        if self.model is not None and len(visitor.news):
            lists.append(self.search(visitor, self.embed(visitor, as_of)))
        found = self.join(visitor, lists, as_of)
        kind = self.user_ids.type
        users = pa.table({"user_id": pa.array([visitor.user_id], kind), "country": [visitor.country]})
        return self.retriever.to_table(users, found, self.graph_names)

    def read(self, user_id: int | str, as_of: int) -> Visitor:
        """The user and its new events by `as_of`."""
        if isinstance(as_of, bool) or not isinstance(as_of, (int, np.integer)):
            raise InputError(f"as_of: expected unix seconds as an integer, got {as_of!r}")
        if as_of < self.source.as_of:
            raise InputError(
                f"as_of: {as_of} is before the snapshot of generation {self.source.generation}, {self.source.as_of}; "
                "ask for a later time, or open an earlier generation"
            )
        user_id = as_ids([user_id], self.user_ids.type)[0].as_py()
        news = self.recent.read([user_id], as_of - self.config.recent_seconds, as_of)
        row = self._rows.get(user_id, -1)
        index = self._others.get(user_id, -1) if row < 0 else int(self._index[row])
        if row < 0 and not len(news):
            raise InputError(
                f"user {user_id!r}: not among the {len(self._rows):,} users of generation {self.source.generation}, "
                "and no event of it since is known"
            )
        return Visitor(user_id, row, index, self._country(row, index, news), news)

    def embed(self, visitor: Visitor, as_of: int) -> np.ndarray:
        """float32 [k·d]: the embedding that a refresh at `as_of` would give, had the log the new events."""
        assert self.model is not None
        most = self.source.properties.get("max_events")
        batch = self.recent.join(visitor.index, visitor.news, as_of, most)
        found = self._forward(batch)
        if not np.isfinite(found).all():
            raise AlureError(
                f"user {visitor.user_id!r}: its embedding with {len(visitor.news):,} new events is not finite; the "
                "model's weights or the events' dense vectors hold NaN, Inf or huge numbers"
            )
        return found

    def search(self, visitor: Visitor, vector: np.ndarray) -> NeighborLists:
        """The users nearest to `vector`: one list, as the graphs' are."""
        similarities, rows = self.nearest.search(vector, visitor.country, visitor.row)
        ids = self._index[rows]
        kept = (ids >= 0) & (similarities > 0)
        return _one_list(ids[kept].astype(np.int32), similarities[kept])

    def nightly_lists(self, visitor: Visitor) -> list[NeighborLists]:
        """The user's list in every graph of the generation, empty for who is not in it."""
        if visitor.row < 0:
            return [_one_list(np.empty(0, np.int32), np.empty(0, np.float32)) for _ in self.lists]
        return [graph.rows(visitor.row, visitor.row + 1) for graph in self.lists]

    def join(self, visitor: Visitor, lists: Sequence[NeighborLists], as_of: int) -> Candidates:
        """One row of candidates. lists: of the retriever's graphs, and of `online` where there is one."""
        near = np.unique(np.concatenate([each.ids.numpy() for each in lists]))
        engagements = self._engagements(near, visitor.country, as_of)
        places = [torch.from_numpy(np.searchsorted(near, each.ids.numpy()).astype(np.int32)) for each in lists]
        lists = [replace(each, ids=ids) for each, ids in zip(lists, places)]
        mixture = self.mixture if len(lists) > len(self.lists) else self.retriever.mixture
        return self.retriever.blended(lists, engagements, mixture, visitor.country, self._seen(visitor))

    def _engagements(self, near: np.ndarray, country: str, as_of: int) -> Engagements:
        """What these users (indices of the log) bring: the snapshot's engagements, then the new ones."""
        nightly = self.retriever.engagements
        bounds = nightly.offsets.numpy()
        starts, ends = bounds[near], bounds[near + 1]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)])
        take = ranges(starts, ends, offsets)
        columns = [x.numpy()[take] for x in (nightly.items, nightly.weights, nightly.reasons)]
        users = self._known.take(pa.array(near)).to_pylist()
        rows = self.recent.read(users, as_of - self.config.recent_seconds, as_of).of_sources(self._ads)
        if len(rows):
            history = History(rows.offsets, *(rows.columns[name] for name in ("item", "timestamp", "event_type")))
            engaged = weigh(history, self.events.manifest.event_types, self.source.as_of, self.config)
            sizes, *new = expand_users(
                engaged, engaged.offsets, self.events.items.accounts, self.config, self._inventory(country)
            )
            place = np.arange(len(near))
            order = np.argsort(
                np.concatenate([np.repeat(place, ends - starts), np.repeat(place, sizes)]), kind="stable"
            )
            columns = [np.concatenate(pair)[order] for pair in zip(columns, new)]
            offsets = np.concatenate([[0], np.cumsum(ends - starts + sizes)])
        return Engagements(*(torch.from_numpy(x) for x in (offsets, *columns)))

    def _seen(self, visitor: Visitor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        offsets, items = self.retriever.seen_by(np.array([visitor.index]))
        if items is None:
            return offsets, items
        new = visitor.news.of_sources(self._ads).columns["item"]
        items = torch.from_numpy(np.union1d(items.numpy(), new))
        return torch.tensor([0, len(items)]), items

    def _forward(self, batch: EventBatch) -> np.ndarray:
        assert self.model is not None
        with torch.inference_mode():
            return self.model(batch.to(self.model.device), self.catalog).float().flatten().cpu().numpy()

    def _country(self, row: int, index: int, news: RecentRows) -> str:
        """The generation's, else the log's, else that of the newest event that names one."""
        if row >= 0:
            return str(self.countries[row])
        if index >= 0:
            return str(self.events.users.column("country")[index])
        named = [name for name in news.columns["country"] if name is not None]
        return named[-1] if named else NO_COUNTRY

    def _make_inventory(self, country: str) -> Inventory:
        mask = self.retriever.mask(country)
        eligible = None if mask is None else mask.numpy()
        return Inventory.of(self._totals, self._ranked, self.events.items.accounts, self.config, eligible)

    def _load(self, path: Path) -> UserModel:
        """The model in the precision of the generation; InputError where the generation is another's."""
        digest = model_digest(path)
        if digest != self.source.model:
            raise InputError(
                f"model: generation {self.source.generation} is of model {self.source.model[:12]}, {path} is "
                f"{digest[:12]}; embeddings of two models are never mixed. Give the checkpoint that it was made with"
            )
        if "alure" not in self.retriever.graphs:
            raise InputError(
                f"model: moves users in the graph alure, which is not among {', '.join(self.retriever.graphs)}"
            )
        dtype = getattr(torch, self.source.properties["precision"])
        return UserModel.load(path).to(compute_device(), dtype).eval()

    def _neighbors(self, k: int | None) -> int:
        graph = self.retriever.store.published(self.source.generation, "graph", "alure")
        k = graph.properties.get("k") if k is None else k
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k: expected at least 1 neighbour, got {k}")
        return k


def _one_list(ids: np.ndarray, similarities: np.ndarray) -> NeighborLists:
    return NeighborLists(torch.tensor([0, len(ids)]), torch.from_numpy(ids), torch.from_numpy(similarities))
