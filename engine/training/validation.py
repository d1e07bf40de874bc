"""Figures on the newest part of the training time: what the model, asleep since `split`, knows of what came after."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alure.engine.config import TrainingConfig
from alure.engine.events import Events
from alure.engine.model import AlureModel, Catalog
from alure.engine.training.metrics import item_rates, normalized_entropy, recall_at, top_columns
from alure.engine.training.sampling import Sampler, Shown, ranges
from alure.engine.training.step import task_logits
from alure.engine.training.targets import Exposures, Timeline

USERS = 2_000  # at most
RECALL_AT = (10, 50)
BATCH = 256


@dataclass(frozen=True)
class Asked:
    """Events of the validation users that a figure is about, by user: (split, `end`] of a timeline."""

    rows: np.ndarray  # int64 [n], validation user
    places: np.ndarray  # int64 [n], row of the timeline


class Validation:
    """Embeds users at `split`, as a refresh would, and asks for their events in (split, as_of]."""

    def __init__(self, events: Events, sampler: Sampler, config: TrainingConfig, split: int, as_of: int, seed: int):
        self.events, self.sampler = events, sampler
        self.split, self.as_of = split, as_of
        # a window longer than half the validation time is cut to that half, so that every label is complete
        self.windows = {task.name: min(task.window, (as_of - split) // 2) for task in sampler.tasks}
        lines = [(sampler.targets, min(split + config.label_horizon, as_of))]
        lines += [(task.timeline, as_of - self.windows[task.name]) for task in sampler.tasks]
        self.users, asked = self._choose(lines, np.random.default_rng(seed))
        self.targets, self.exposures = asked[0], asked[1:]

    @torch.no_grad()
    def measure(self, model: AlureModel, catalog: Catalog) -> dict[str, Any]:
        """{"split", "as_of", "retrieval": {…}, "tasks": {name: {…}}}; a part without events says so in its "note"."""
        tasks = self.sampler.tasks
        embedded: list[Tensor] = []
        probabilities: list[list[np.ndarray]] = [[] for _ in tasks]
        for begin in range(0, len(self.users), BATCH):
            users = self.users[begin : begin + BATCH]
            batch = self.events.batch(users, self.split, self.sampler.config.max_events).to(catalog.items.device)
            state = model(batch, catalog)
            embedded.append(state.embeddings)
            shown = [self._shown(task, asked, begin) for task, asked in zip(tasks, self.exposures)]
            if not sum(len(exposed.rows) for exposed in shown):
                continue
            logits, places = task_logits(model, state, shown, len(batch), catalog)
            for found, task, rows in zip(probabilities, tasks, places):
                found.append(logits[rows, model.tasks.index(task.name)].sigmoid().cpu().numpy())
        return {
            "split": self.split,
            "as_of": self.as_of,
            "users": len(self.users),
            "retrieval": self._retrieval(embedded, model, catalog),
            "tasks": {
                task.name: self._task(task, asked, np.concatenate([np.empty(0, np.float32), *found]))
                for task, asked, found in zip(tasks, self.exposures, probabilities)
            },
        }

    def _choose(
        self, lines: list[tuple[Timeline, int]], generator: np.random.Generator
    ) -> tuple[np.ndarray, list[Asked]]:
        """At most USERS users with history at the split and something asked of them; and what, of each timeline."""
        known = np.flatnonzero(self.sampler.first_times <= self.split)
        starts = [line.up_to(known, np.full(len(known), self.split)) for line, _ in lines]
        ends = [line.up_to(known, np.full(len(known), end)) for line, end in lines]
        counts = [np.maximum(end - start, 0) for start, end in zip(starts, ends)]
        present = np.flatnonzero(np.sum(counts, axis=0) > 0)
        if len(present) > USERS:
            present = np.sort(generator.choice(present, USERS, replace=False))
        asked = [
            Asked(np.repeat(np.arange(len(present)), count[present]), ranges(start[present], count[present]))
            for start, count in zip(starts, counts)
        ]
        return known[present], asked

    def _shown(self, task: Exposures, asked: Asked, begin: int) -> Shown:
        """The task's exposures of the validation users from `begin` on, one batch of them."""
        inside = slice(*np.searchsorted(asked.rows, [begin, begin + BATCH]))
        places = asked.places[inside]
        line = task.timeline
        labels = task.labels(places, self.windows[task.name])
        return Shown(asked.rows[inside] - begin, line.items[places], line.timestamps[places], labels)

    def _retrieval(self, embedded: list[Tensor], model: AlureModel, catalog: Catalog) -> dict[str, Any]:
        """Recall@K over all items engaged with up to as_of, beside that of the most popular items up to split.

        Over accounts where the model's ads are accounts ("level").
        """
        targets, rows = self.sampler.targets, self.targets.rows
        if not len(rows):
            return {"users": 0, "note": "no user with events before the split has a target after it"}
        users, rows = np.unique(rows, return_inverse=True)
        candidates = np.unique(targets.items[targets.timestamps <= self.as_of])
        columns = np.searchsorted(candidates, targets.items[self.targets.places])
        rows, columns = np.divmod(np.unique(rows * len(candidates) + columns), len(candidates))

        vectors = torch.cat(embedded)
        items = torch.from_numpy(candidates).to(vectors.device)
        ads = torch.cat([model.embed_ads(part, catalog) for part in items.split(8_192)])
        top = top_columns(vectors[torch.from_numpy(users).to(vectors.device)], ads, max(RECALL_AT)).cpu().numpy()
        before = np.searchsorted(candidates, targets.items[targets.timestamps <= self.split])
        popular = np.argsort(-np.bincount(before, minlength=len(candidates)), kind="stable")[: max(RECALL_AT)]
        everybody = np.broadcast_to(popular, (len(users), len(popular)))
        return {
            "users": len(users),
            "level": model.config.ad_level,
            "items": len(candidates),
            "recall": {str(k): recall_at(top, rows, columns, k) for k in RECALL_AT},
            "popularity_recall": {str(k): recall_at(everybody, rows, columns, k) for k in RECALL_AT},
        }

    def _task(self, task: Exposures, asked: Asked, probabilities: np.ndarray) -> dict[str, Any]:
        """NE on the exposures after the split, beside that of the smoothed rate of each item up to it."""
        window, line = self.windows[task.name], task.timeline
        figures: dict[str, Any] = {"exposures": len(asked.places), "label_window": window}
        if not len(asked.places):
            return {**figures, "note": "no user with events before the split has an exposure after it"}
        labels = task.labels(asked.places, window)
        known = np.flatnonzero(line.timestamps <= self.split - window)
        rates = item_rates(line.items[known], task.labels(known, window), self.events.manifest.num_items)
        if labels.min() == labels.max():
            which = "positive" if labels[0] else "negative"
            figures["note"] = f"all labels are {which}, so their rate has no entropy to divide by"
        return {
            **figures,
            "base_rate": float(labels.mean()),
            "ne": normalized_entropy(probabilities, labels),
            "item_rate_ne": normalized_entropy(rates[line.items[asked.places]], labels),
        }
