"""Labels after every event: one pass over a history gives a training example for each of its events.

next_event: what SASRec and HSTU learn from. dense_all_action: one engagement of the label horizon, drawn anew each time
(PinnerFormer, KDD 2022).
"""

import numpy as np
import torch
from torch import Tensor

from alure.engine.config import TrainingConfig
from alure.engine.events import EventBatch, EventSequence
from alure.engine.model import AlureModel, Catalog
from alure.engine.training.losses import CandidateItems, RowSoftmax
from alure.engine.training.sampling import Sample, Sampler
from alure.kernels.jagged import segment_ids

AT_THE_EVENT = 0.5  # share of the embeddings that are of their event's own time; the others of a later one


def every_event_loss(
    model: AlureModel, batch: EventBatch, sample: Sample, sampler: Sampler, config: TrainingConfig, catalog: Catalog
) -> tuple[Tensor, int]:
    """Mean softmax over the candidates, for each event of the batch that has a label; and how many have one."""
    (sequence,) = batch.sequences.values()
    times = embedding_times(sequence) if config.embedding_times == "between" else sequence.timestamps
    labels = label_rows(sequence, times, None if config.labels == "next_event" else config.label_horizon)
    targets = sampler.is_target(sequence)
    labels = torch.where(targets[labels.clamp_min(0)], labels, -1)
    labelled = (labels >= 0).nonzero().squeeze(1)
    if not len(labelled):
        return torch.zeros(()), 0
    users = model.user.encode_events(batch, catalog, times)[labelled].flatten(1).float()
    positives = sequence.items[labels[labelled]]
    candidates = draw_candidates(positives, sample, sampler, config)

    embedded, places = torch.unique(torch.cat([candidates.items, positives]), return_inverse=True)
    ads = model.embed_ads(embedded, catalog)
    users = users / (ads.shape[1] * model.temperature)
    ads = ads.flatten(1).float()
    among, own = places[: len(candidates.items)], places[len(candidates.items) :]
    column = torch.full_like(embedded, -1)
    column[among] = torch.arange(len(among), device=among.device)
    positive = (users * ads[own]).sum(1)
    if config.log_q == "tfrs":
        positive = positive - expected_draws(positives, sample, sampler, config).log()
    low = torch.bfloat16 if config.precision == "bfloat16" else users.dtype
    correction = candidates.correction(config.log_q)
    loss: Tensor = RowSoftmax.apply(users, ads[among], correction, positive, column[own], low)
    return loss, len(labelled)


def embedding_times(sequence: EventSequence) -> Tensor:
    """Time T of the embedding after each event, int64 [n]: its own time, or one before the next event's."""
    times = sequence.timestamps
    ends = sequence.offsets[1:][sequence.lengths > 0] - 1
    following = torch.cat([times[1:], times[-1:]])
    following[ends] = times[ends]
    shares = torch.rand(2, len(times)).to(times.device)  # drawn on the CPU: the same on every device
    later = times + (shares[0] * (following - times)).long()
    return torch.where(shares[1] < AT_THE_EVENT, times, torch.minimum(later, following))


def label_rows(sequence: EventSequence, times: Tensor, horizon: int | None) -> Tensor:
    """Row of the event that is each event's label, int64 [n], −1 for none.

    horizon None: the next event of the user. Else one of its events up to `horizon` seconds after T, drawn uniformly.
    """
    rows = torch.arange(sequence.total, device=times.device)
    users = segment_ids(sequence.offsets, sequence.total)
    end = sequence.offsets[users + 1]
    if horizon is not None and sequence.total:
        start = int(sequence.timestamps.min())
        span = int(sequence.timestamps.max()) - start + 1
        keys = users * span + (sequence.timestamps - start)
        latest = (times + horizon - start).clamp(max=span - 1)
        end = torch.searchsorted(keys, users * span + latest, right=True)
    count = end - rows - 1
    step = torch.zeros_like(rows)
    if horizon is not None:
        step = (torch.rand(sequence.total).to(times.device) * count).long()
    return torch.where(count > 0, rows + 1 + step, -1)


def draw_candidates(positives: Tensor, sample: Sample, sampler: Sampler, config: TrainingConfig) -> CandidateItems:
    """The negatives of a batch: every item once, or uniform ones and positives of the batch, with their counts."""
    if len(sample.negatives) == len(sampler.universe):
        items = torch.from_numpy(sample.negatives).to(positives.device)
        once = torch.ones(len(items), device=positives.device)
        return CandidateItems(items, once, once)
    chosen = torch.randint(len(positives), (config.in_batch_negatives,)).to(positives.device)
    drawn = torch.cat([positives[chosen], torch.from_numpy(sample.negatives).to(positives.device)])
    items, draws = torch.unique(drawn, return_counts=True)
    return CandidateItems(items, draws.float(), expected_draws(items, sample, sampler, config))


def expected_draws(items: Tensor, sample: Sample, sampler: Sampler, config: TrainingConfig) -> Tensor:
    """n · Q of items, float32 [C]: in-batch positives come as often as events, the uniform ones equally often."""
    if len(sample.negatives) == len(sampler.universe):
        return torch.ones(len(items), device=items.device)
    of_events = config.in_batch_negatives * sampler.event_share[items.cpu().numpy()]
    expected = of_events + len(sample.negatives) / len(sampler.universe)
    return torch.from_numpy(np.asarray(expected, np.float32)).to(items.device)
