"""One training step's loss: users of a sample forward, candidates forward, sampled softmax plus binary tasks."""

from typing import NamedTuple

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


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]  # "retrieval" and one a task that had exposures, unweighted


def compute_losses(
    model: AlureModel, batch: EventBatch, sample: Sample, sampler: Sampler, config: TrainingConfig, catalog: Catalog
) -> Losses:
    if config.labels != "all_action":
        loss = every_event_loss(model, batch, sample, sampler, config, catalog)
        return Losses(config.retrieval_weight * loss, {"retrieval": loss})
    device = batch.as_of.device
    state = model(batch, catalog)
    parts: dict[str, Tensor] = {}
    if config.retrieval_weight:
        parts["retrieval"] = retrieval_loss(model, state, sample, sampler, config, catalog)
    weights = {"retrieval": config.retrieval_weight, "views": config.view_weight}
    if config.view_weight:
        parts["views"] = views_loss(model, batch, catalog)
    shown = [(task, exposed) for task, exposed in zip(sampler.tasks, sample.shown) if len(exposed.rows)]
    if shown:
        logits, task_index = task_logits(model, state, [exposed for _, exposed in shown], len(batch), catalog)
        for (task, exposed), rows in zip(shown, task_index):
            labels = torch.from_numpy(exposed.labels).to(device)
            parts[task.name] = task_loss(logits[rows, model.tasks.index(task.name)], labels)
            weights[task.name] = task.weight
    if not parts:
        return Losses(state.embeddings.sum() * 0.0, parts)
    return Losses(torch.stack([weights[name] * loss for name, loss in parts.items()]).sum(), parts)


def views_loss(model: AlureModel, batch: EventBatch, catalog: Catalog) -> Tensor:
    """The older and the newer half of every user's history as two views of the user."""
    older, newer = batch.halves()
    users = (older.num_events > 0) & (newer.num_events > 0)
    first, second = (F.normalize(model(half, catalog).embeddings.flatten(1)[users], dim=1) for half in (older, newer))
    if not len(first):
        return model.user.table.sum() * 0.0
    return view_loss(first, second, VIEW_TEMPERATURE)


def retrieval_loss(
    model: AlureModel, state: UserState, sample: Sample, sampler: Sampler, config: TrainingConfig, catalog: Catalog
) -> Tensor:
    """In-batch positives of other users and uniform items are the negatives; each distinct item is embedded once."""
    device = state.embeddings.device
    positives = sample.positives
    drawn = np.concatenate([positives.items, sample.negatives])
    items, columns, draws = np.unique(drawn, return_inverse=True, return_counts=True)
    expected = sampler.expected_draws(items, len(positives.items), len(sample.negatives))
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
    ranking = model.heads["ranking"]
    logits = ranking(state, model.embed_ads(exposures.items, catalog), exposures)
    ends = np.cumsum([len(exposed.rows) for exposed in shown])
    return logits, [torch.from_numpy(rows).to(device) for rows in np.split(place, ends[:-1])]
