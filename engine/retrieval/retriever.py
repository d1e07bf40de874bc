"""CandidateRetriever: neighbours × what they engaged with → ads for each user. `retrieve` writes them for all users."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from alure.engine.config import RetrievalConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.progress import say, track
from alure.engine.retrieval.blend import REASON_BITS, blend, check_graphs
from alure.engine.retrieval.eligibility import read_eligibility
from alure.engine.retrieval.engagements import REASONS, expand, seen_items, weigh, within_reach
from alure.engine.retrieval.neighbors import Neighbors, read_neighbors
from alure.engine.retrieval.popularity import popular_items
from alure.engine.retrieval.report import RetrievalReport, Tally
from alure.engine.signals import stop_flag
from alure.engine.store import EmbeddingStore, Generation
from alure.kernels import Candidates, Engagements, ItemRules, NeighborLists, join_candidates

CHUNK_CANDIDATES = 1 << 22  # bounds a chunk's strings in memory; users a chunk = this / cap


@dataclass(frozen=True)
class Mixture:
    """Of each graph, its weight in the blend and the ads it brings at most."""

    weights: Sequence[float]
    quotas: Sequence[int]


class CandidateRetriever:
    """Candidates for users of a published generation (None: the newest), from graphs that are published for it.

    graphs: their names, in the blend's order (default: those of config.graphs that are published). A graph without a
    weight in config.graphs weighs 1. Engagements after the generation's as_of are not seen.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        events: Events,
        config: RetrievalConfig | None = None,
        *,
        graphs: Sequence[str] | None = None,
        generation: str | None = None,
    ) -> None:
        self.store, self.events, self.config = store, events, config or RetrievalConfig()
        self.source: Generation = store.published(generation, "embeddings")
        published = [g.name for g in store.generations("graph") if g.generation == self.source.generation]
        self.graphs = list(graphs) if graphs is not None else [n for n in self.config.graphs if n in published]
        if not self.graphs:
            known = ", ".join(self.config.graphs)
            raise InputError(
                f"graphs: none of {known} is published for {self.source.generation}; run `alure graph` first"
            )
        check_graphs(self.graphs)
        for name in self.graphs:
            store.published(self.source.generation, "graph", name)
        names = list(dict.fromkeys([*self.graphs, *self.config.graphs]))
        if strange := [name for name in self.config.quotas if name not in names]:
            raise InputError(f"quotas: expected graphs among {', '.join(names)}, got {strange[0]!r}")
        self.mixture = self.mixture_of(self.graphs)
        history = events.engagements(self.source.as_of)
        self.engaged = weigh(history, events.manifest.event_types, self.source.as_of, self.config)
        self.eligibility = read_eligibility(self.config.eligible, events) if self.config.eligible else None
        self.engagements = expand(self.engaged, events.items.accounts, self.config, self._inventories())
        self.seen = seen_items(history) if self.config.exclude_seen else None
        self.accounts = torch.tensor(events.items.accounts)
        self.mask = lru_cache(maxsize=64)(self._mask)
        self.item_ids = events.items.item_ids.combine_chunks()
        self.graph_names, self.reason_names = graph_sets(self.graphs), pa.array(REASONS)

    def mixture_of(self, graphs: Sequence[str]) -> Mixture:
        """Weights and quotas of these graphs in the blend, from the configuration."""
        config = self.config
        quotas = [min(config.quotas.get(name, config.cap), config.cap) for name in graphs]
        return Mixture([config.graphs.get(name, 1.0) for name in graphs], quotas)

    @property
    def name(self) -> str:
        return "+".join(self.graphs)

    def retrieve(self, user_ids: Sequence[Any]) -> pa.Table:
        """user_id, country, item_ids, scores, reasons, graphs of these users, in their order; best first.

        Raises InputError on a user that the generation does not have.
        """
        if isinstance(user_ids, str):
            raise InputError(f"user_ids: expected a sequence of ids, got {user_ids!r}; give [{user_ids!r}]")
        users = self.store.read_users(self.source.generation, user_ids)
        ids = users["user_id"].combine_chunks()
        lists = []
        for name in self.graphs:
            table = self.store.read_graph(self.source.generation, name, users=ids.to_pylist())
            lists.append(read_neighbors(table.to_batches(), ids, self.events))
        index = self.events.user_indices(ids)
        parts = [
            self.to_table(users.slice(first, last - first), self.join(lists, index, first, last, country))
            for country, first, last in self.chunks(users, max(len(users), 1))
        ]
        asked = pa.array(user_ids).cast(ids.type) if len(user_ids) else ids
        return pa.concat_tables(parts).combine_chunks().take(pc.index_in(asked, value_set=ids))

    def neighbors(self, users: pa.Array) -> list[Neighbors]:
        """Every graph's lists of `users`, in their order."""
        return [
            read_neighbors(self.store.iter_graph(self.source.generation, n), users, self.events) for n in self.graphs
        ]

    def chunks(self, users: pa.Table, most: int) -> Iterator[tuple[str, int, int]]:
        """(country, first row, last row + 1) of runs of at most `most` users; one run of nobody at least.

        Of countries each that may be shown the same ads.
        """
        names = users["country"].combine_chunks().dictionary_encode()
        groups = np.array([self._group(name) for name in names.dictionary.to_pylist()], np.int64)
        changes = np.flatnonzero(np.diff(groups[names.indices.to_numpy()])) + 1
        for begin, end in pairwise([0, *changes.tolist(), len(users)]):
            for first in range(begin, max(end, 1), most):
                yield names[begin].as_py() if end else "", first, min(first + most, end)

    def join(self, lists: Sequence[Neighbors], users: np.ndarray, first: int, last: int, country: str) -> Candidates:
        """The blend of a run of `chunks`: rows first to last − 1. users: int64 [rows], index in the log, −1 unknown."""
        near = [graph.rows(first, last) for graph in lists]
        return self.blended(near, self.engagements, self.mixture, country, self.seen_by(users[first:last]))

    def blended(
        self,
        lists: Sequence[NeighborLists],
        engagements: Engagements,
        mixture: Mixture,
        country: str,
        seen: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> Candidates:
        """The candidates that each of `lists` finds among `engagements`, as one list a row, all of `country`.

        seen: (offsets, items) that a row must not get.
        """
        config, num_items = self.config, len(self.events.items)
        groups, group_cap = self.accounts if config.account_cap else None, config.account_cap or 1
        rules = ItemRules(*seen, self.mask(country), groups, group_cap)
        found = [
            join_candidates(*within_reach(near, engagements), quota, num_items=num_items, rules=rules)
            for near, quota in zip(lists, mixture.quotas)
        ]
        of_accounts = ItemRules(groups=groups, group_cap=group_cap)
        return blend(found, mixture.weights, config.cap, num_items, of_accounts)

    def _group(self, country: str) -> int:
        """Countries of one group may be shown the same ads."""
        return self.eligibility.group(country) if self.eligibility else -1

    def _mask(self, country: str) -> torch.Tensor | None:
        """bool [num_items]: what may be shown in `country`; None for everything."""
        return torch.from_numpy(self.eligibility.mask(country)) if self.eligibility else None

    def _inventories(self) -> Iterator[tuple[slice, np.ndarray | None]]:
        """Runs of users of the log who may be shown the same ads, and those, bool [num_items]."""
        for _, run in groupby(self.events.manifest.countries, lambda country: self._group(country.name)):
            first, *others = run
            last = others[-1] if others else first
            mask = self.eligibility.mask(first.name) if self.eligibility else None
            yield slice(first.first_user, last.first_user + last.num_users), mask

    def seen_by(self, users: np.ndarray) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(offsets [n + 1], items) that these users have engaged, user indices [n], −1 = none; None where all count."""
        if self.seen is None:
            return None, None
        offsets, items = self.seen
        known = users >= 0
        begins = np.where(known, offsets[users], 0)
        sizes = np.where(known, offsets[users + 1] - begins, 0)
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        take = np.repeat(begins - bounds[:-1], sizes) + np.arange(bounds[-1])
        return torch.from_numpy(bounds), torch.from_numpy(items[take])

    def to_table(self, users: pa.Table, found: Candidates, graph_names: pa.Array | None = None) -> pa.Table:
        """users: user_id, country of the rows of `found`; graph_names: by bits (default: of self.graphs)."""
        offsets = pa.array(found.offsets.numpy(), pa.int32())
        bits = found.reasons.numpy()
        columns = {
            "item_ids": self.item_ids.take(pa.array(found.items.numpy())),
            "scores": pa.array(found.scores.numpy()),
            "reasons": self.reason_names.take(pa.array(bits & ((1 << REASON_BITS) - 1))),
            "graphs": (self.graph_names if graph_names is None else graph_names).take(pa.array(bits >> REASON_BITS)),
        }
        lists = {name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()}
        return pa.table({"user_id": users["user_id"], "country": users["country"], **lists})


def graph_sets(names: Sequence[str]) -> pa.Array:
    """The name of every set of graphs, by bits."""
    return pa.array(["+".join(n for g, n in enumerate(names) if bits >> g & 1) for bits in range(1 << len(names))])


def retrieve(
    store: EmbeddingStore,
    events: Events,
    config: RetrievalConfig | None = None,
    *,
    graphs: Sequence[str] | None = None,
    generation: str | None = None,
    out: EmbeddingStore | None = None,
) -> RetrievalReport:
    """Candidates of every user with an embedding, written as one set named after its graphs ("alure+social"), and
    each country's popular ads. out: the store that gets them (default: `store`). Raises Interrupted on a signal.
    """
    started = time.monotonic()
    retriever = CandidateRetriever(store, events, config, graphs=graphs, generation=generation)
    target, config = out or store, retriever.config
    users = store.read_users(retriever.source.generation)
    engaged = np.bincount(retriever.engaged.items, minlength=len(events.items)) > 0
    tally = Tally(retriever.graphs, config.cap, engaged)
    say(f"retrieve: {retriever.name} of {retriever.source.generation} for {len(users):,} users")
    lists = retriever.neighbors(users["user_id"].combine_chunks())
    index = events.user_indices(users["user_id"])
    step = max(1, CHUNK_CANDIDATES // config.cap)

    with stop_flag("retrieve") as flag, track("Retrieving ads", len(users), "users") as bar:

        def batches() -> Iterator[pa.Table]:
            for country, first, last in retriever.chunks(users, step):
                flag.check()
                found = retriever.join(lists, index, first, last, country)
                tally.add(found, np.sum([np.diff(graph.offsets[first : last + 1]) for graph in lists], axis=0))
                yield retriever.to_table(users.slice(first, last - first), found)
                bar.advance(last - first)

        properties = {"config": config.model_dump(mode="json"), "events": events.manifest.fingerprint}
        if retriever.eligibility:
            properties["eligible"] = retriever.eligibility.digest
        source = retriever.source
        target.write_candidates(source, retriever.name, batches(), {**properties, "graphs": retriever.graphs})
        present = target.log.find(source.generation, "popularity")
        if present is None or present.properties != properties:
            target.write_popularity(
                source, popular_items(retriever.engaged, events, config.cap, retriever.eligibility), properties
            )
    return RetrievalReport(
        generation=source.generation,
        name=retriever.name,
        as_of=source.as_of,
        engagements=len(retriever.engaged.items),
        eligible=retriever.eligibility.counts if retriever.eligibility else None,
        edges_dropped=sum(graph.dropped for graph in lists),
        seconds=time.monotonic() - started,
        **tally.figures(),  # type: ignore[arg-type]
    )
