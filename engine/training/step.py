"""One training step's loss: users of a sample forward, candidates forward, sampled softmax plus binary tasks."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from alure.engine.config import TrainingConfig
from alure.engine.events import EventBatch
from alure.engine.model import AlureModel, Catalog, UserState
from alure.engine.model.towers import Exposures, two_tower_scores
from alure.engine.training.every_event import every_event_loss
from alure.engine.training.losses import CandidateItems, sampled_softmax, task_loss, view_loss
from alure.engine.training.sampling import Sample, Sampler, Shown

VIEW_TEMPERATURE = 0.1


@dataclass(frozen=True)
class Part:
    """A part of the loss."""

    mean: Tensor
    count: int  # of what it is the mean


def part_weights(sampler: Sampler, config: TrainingConfig) -> dict[str, float]:
    """Weight of every part that a batch can have."""
    weights = {"retrieval": config.retrieval_weight, "views": config.view_weight}
    return weights | {task.name: task.weight for task in sampler.tasks}


def compute_losses(
    model: AlureModel, batch: EventBatch, sample: Sample, sampler: Sampler, config: TrainingConfig, catalog: Catalog
) -> dict[str, Part]:
    """The parts of the loss that this batch has: "retrieval", "views" and one a task that has exposures."""
    if config.labels != "all_action":
        parts = {"retrieval": Part(*every_event_loss(model, batch, sample, sampler, config, catalog))}
        return {name: part for name, part in parts.items() if part.count}
    state = model(batch, catalog)
    parts = {}
    if config.retrieval_weight and len(sample.positives.items):
        loss = retrieval_loss(model, state, sample, sampler, config, catalog)
        parts["retrieval"] = Part(loss, len(np.unique(sample.positives.rows)))
    if config.view_weight:
        parts["views"] = Part(*views_loss(model, batch, catalog))
    shown = [(task, exposed) for task, exposed in zip(sampler.tasks, sample.shown) if len(exposed.rows)]
    if shown:
        logits, task_index = task_logits(model, state, [exposed for _, exposed in shown], len(batch), catalog)
        for (task, exposed), rows in zip(shown, task_index):
            labels = torch.from_numpy(exposed.labels).to(batch.as_of.device)
            parts[task.name] = Part(task_loss(logits[rows, model.tasks.index(task.name)], labels), len(rows))
    return {name: part for name, part in parts.items() if part.count}


def views_loss(model: AlureModel, batch: EventBatch, catalog: Catalog) -> tuple[Tensor, int]:
    """The older and the newer half of every user's history as two views of the user; and of how many users."""
    older, newer = batch.halves()
    users = (older.num_events > 0) & (newer.num_events > 0)
    first, second = (F.normalize(model(half, catalog).embeddings.flatten(1)[users], dim=1) for half in (older, newer))
    return (view_loss(first, second, VIEW_TEMPERATURE) if len(first) else first.sum()), len(first)


def retrieval_loss(
    model: AlureModel, state: UserState, sample: Sample, sampler: Sampler, config: TrainingConfig, catalog: Catalog
) -> Tensor:
    """In-batch positives of other users and uniform items are the negatives; each distinct item is embedded once."""
    device = state.embeddings.device
    positives = sample.positives
    drawn = np.concatenate([positives.items, sample.other_positives, sample.negatives])
    items, columns, draws = np.unique(drawn, return_inverse=True, return_counts=True)
    num_positives = len(positives.items) + len(sample.other_positives)
    expected = sampler.expected_draws(items, num_positives, len(sample.negatives))
    candidates = CandidateItems(
        torch.from_numpy(items).to(device),
        torch.from_numpy(draws).to(device, torch.float32),
        torch.from_numpy(expected).to(device, torch.float32),
    )
    logits = two_tower_scores(state.embeddings, model.embed_ads(candidates.items, catalog)) / model.temperature
    rows, places = torch.from_numpy(positives.rows), torch.from_numpy(columns[: len(positives.items)])
    return sampled_softmax(logits, candidates, rows.to(device), places.to(device), config.log_q)


def task_logits(
    model: AlureModel, state: UserState, shown: list[Shown], num_users: int, catalog: Catalog
) -> tuple[Tensor, list[Tensor]]:
    """Logits [E, tasks] of all exposures in one pass, and for each entry of `shown` its rows in them."""
    device = state.embeddings.device
    users = np.concatenate([exposed.rows for exposed in shown])
    times = np.concatenate([exposed.timestamps for exposed in shown])
    order = np.lexsort((times, users))  # attention takes a user's queries in time order
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    offsets = np.zeros(num_users + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=num_users), out=offsets[1:])
    columns = (
        np.concatenate([exposed.items for exposed in shown])[order],
        offsets,
        users[order],
        times[order],
    )
    exposures = Exposures(*(torch.from_numpy(column).to(device) for column in columns))
    logits = model.rank(state, exposures, catalog)
    ends = np.cumsum([len(exposed.rows) for exposed in shown])
    return logits, [torch.from_numpy(rows).to(device) for rows in np.split(place, ends[:-1])]
