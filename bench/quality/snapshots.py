"""Embeddings of an event log at chosen times, in memory: what the experiments have in common."""

import json
from pathlib import Path

import numpy as np
import torch

from alure.engine.config import EventsConfig
from alure.engine.events import Events, ingest
from alure.engine.model import AlureModel
from alure.engine.world import build_world

BATCH = 256


def world_log(scratch: Path, users: int, seed: int) -> Events:
    """The synthetic ads world as a log, up to the truth."""
    world = build_world(scratch / "world", users, seed)
    ads = json.loads(world.description.read_text())["ad_sources"]
    ingest(EventsConfig(inputs=[world.events], items=world.items, ad_sources=ads), scratch / "log")
    return Events.open(scratch / "log")


@torch.no_grad()
def embed(model: AlureModel, events: Events, as_of: int, max_events: int) -> torch.Tensor:
    """Every user's unit embeddings from what it did up to `as_of`, float32 [num_users, k, d]."""
    catalog = model.user.catalog(events)
    parts = [
        model(events.batch(users, as_of, max_events), catalog).embeddings
        for users in np.array_split(np.arange(events.num_users), -(-events.num_users // BATCH))
    ]
    return torch.cat(parts)


@torch.no_grad()
def embed_ads(model: AlureModel, events: Events) -> torch.Tensor:
    """The ad tower's unit vectors of every item, float32 [num_items, k, d]."""
    catalog = model.user.catalog(events)
    return torch.cat([model.embed_ads(part, catalog) for part in torch.arange(events.manifest.num_items).split(8_192)])
