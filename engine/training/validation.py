"""Figures on the newest part of the training time: what the model, asleep since `split`, knows of what came after."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from alure.engine.config import TrainingConfig
from alure.engine.events import EventBatch, Events
from alure.engine.model import AlureModel, Catalog
from alure.engine.training.metrics import item_rates, normalized_entropy, recall_at, top_columns
from alure.engine.training.sampling import Sampler, Shown, ranges
from alure.engine.training.step import task_logits
from alure.engine.training.targets import Exposures, Timeline

USERS = 2_000  # at most, for each figure
RECALL_AT = (10, 50)
BATCH = 256


class Validation:
    """Embeds users at `split`, as a refresh would, and asks for their events in (split, as_of]."""

    def __init__(self, events: Events, sampler: Sampler, config: TrainingConfig, split: int, as_of: int, seed: int):
        self.events, self.sampler, self.config = events, sampler, config
        self.split, self.as_of = split, as_of
        self.generator = np.random.default_rng(seed)

    @torch.no_grad()
    def measure(self, model: AlureModel, catalog: Catalog) -> dict[str, Any]:
        """{"split", "retrieval": {…}, "tasks": {name: {…}}}; a part without events to measure says so in "note"."""
        tasks = {task.name: self.task(task, model, catalog) for task in self.sampler.tasks}
        return {"split": self.split, "as_of": self.as_of, "retrieval": self.retrieval(model, catalog), "tasks": tasks}

    def retrieval(self, model: AlureModel, catalog: Catalog) -> dict[str, Any]:
        """Recall@K over all items engaged with up to as_of, beside that of the most popular items up to split."""
        targets = self.sampler.targets
        end = min(self.split + self.config.label_horizon, self.as_of)
        users, start, count = self._users_between(targets, end)
        if not len(users):
            return {"note": "no user with events before the split has a target after it", "users": 0}
        candidates = np.unique(targets.items[targets.timestamps <= self.as_of])
        rows = np.repeat(np.arange(len(users)), count)
        columns = np.searchsorted(candidates, targets.items[ranges(start, count)])
        pairs = np.unique(rows * len(candidates) + columns)
        rows, columns = np.divmod(pairs, len(candidates))

        embedded = torch.cat([model(batch, catalog).embeddings for batch in self._batches(users, catalog)])
        items = torch.from_numpy(candidates).to(embedded.device)
        ads = torch.cat([model.embed_ads(part, catalog) for part in items.split(8_192)])
        top = top_columns(embedded, ads, max(RECALL_AT)).cpu().numpy()
        popular = np.bincount(
            np.searchsorted(candidates, targets.items[targets.timestamps <= self.split]), minlength=len(candidates)
        )
        most = np.argsort(-popular, kind="stable")[: max(RECALL_AT)]
        popularity = np.broadcast_to(most, (len(users), len(most)))
        return {
            "users": len(users),
            "items": len(candidates),
            "recall": {str(k): recall_at(top, rows, columns, k) for k in RECALL_AT},
            "popularity_recall": {str(k): recall_at(popularity, rows, columns, k) for k in RECALL_AT},
        }

    def task(self, task: Exposures, model: AlureModel, catalog: Catalog) -> dict[str, Any]:
        """NE on the exposures after the split, beside that of the smoothed rate of each item up to it.

        A window longer than half the validation time is cut to that half, so that every label is complete.
        """
        window = min(task.window, (self.as_of - self.split) // 2)
        users, start, count = self._users_between(task.timeline, self.as_of - window)
        figures: dict[str, Any] = {"exposures": int(count.sum()), "label_window": window}
        if not len(users):
            return {**figures, "note": "no user with events before the split has an exposure after it"}
        places = ranges(start, count)
        rows = np.repeat(np.arange(len(users)), count)
        items, times = task.timeline.items[places], task.timeline.timestamps[places]
        labels = task.labels(places, window)
        found = []
        begin = 0
        for batch in self._batches(users, catalog):
            inside = (rows >= begin) & (rows < begin + len(batch))
            shown = Shown(rows[inside] - begin, items[inside], times[inside], labels[inside])
            logits, index = task_logits(model, model(batch, catalog), [shown], len(batch), catalog)
            found.append(logits[index[0], model.tasks.index(task.name)].sigmoid().cpu().numpy())
            begin += len(batch)
        known = np.flatnonzero(task.timeline.timestamps <= self.split - window)
        rates = item_rates(task.timeline.items[known], task.labels(known, window), self.events.manifest.num_items)
        return {
            **figures,
            "base_rate": float(labels.mean()),
            "ne": normalized_entropy(np.concatenate(found), labels),
            "item_rate_ne": normalized_entropy(rates[items], labels),
        }

    def _users_between(self, line: Timeline, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At most USERS users with history at the split and events in (split, end]: (users, first place, count)."""
        known = np.flatnonzero(self.sampler.first_times <= self.split)
        start = line.up_to(known, np.full(len(known), self.split))
        count = line.up_to(known, np.full(len(known), end)) - start
        present = np.flatnonzero(count > 0)
        if len(present) > USERS:
            present = np.sort(self.generator.choice(present, USERS, replace=False))
        return known[present], start[present], count[present]

    def _batches(self, users: np.ndarray, catalog: Catalog) -> Iterator[EventBatch]:
        for begin in range(0, len(users), BATCH):
            part = users[begin : begin + BATCH]
            yield self.events.batch(part, self.split, self.config.max_events).to(catalog.items.device)
