"""Embedding users: the pruned half that a refresh runs, beside the full forward pass with towers and heads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from alure.bench.race import Contest, Entry
from alure.engine.config import EventsConfig, ModelConfig
from alure.engine.events import Events, ingest
from alure.engine.model import AlureModel, EventSchema
from alure.engine.world import build_world


class Case:
    """Users of the synthetic ads world and an untrained small model: the speed does not depend on the weights."""

    def __init__(self, folder: Path, users: int, device: torch.device) -> None:
        world = build_world(folder / "world", users, 0)
        ads = ["ad_view", "ad_click", "ad_conversion"]
        config = EventsConfig(inputs=[world.events], items=world.items, ad_sources=ads)
        ingest(config, folder / "events")
        self.events = Events.open(folder / "events")
        torch.manual_seed(0)
        self.model = AlureModel(ModelConfig(), EventSchema.of(self.events.manifest)).to(device).eval()
        self.catalog = self.model.user.catalog(self.events)
        self.batch = self.events.batch(range(self.events.num_users), world.as_of).to(device)
        ads_seen = np.unique(self.events.source("ad_view").item)[:512]
        self.ads = torch.from_numpy(ads_seen.astype(np.int64)).to(device)
        self.name = f"{self.events.num_users:,} users, {self.batch.total:,} events, small preset"

    @torch.inference_mode()
    def pruned(self) -> torch.Tensor:
        return self.model.user(self.batch, self.catalog)

    @torch.inference_mode()
    def full(self) -> torch.Tensor:
        state = self.model.user.encode(self.batch, self.catalog)
        self.model.embed_ads(self.ads, self.catalog)
        return state.embeddings


@pytest.fixture(scope="module")
def case(quick: bool, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("refresh"), 200 if quick else 2_000, device)


def bench_embed(race: Callable[[Contest], None], case: Case) -> None:
    def finite(embeddings: torch.Tensor) -> str:
        return "" if torch.isfinite(embeddings).all() else "not finite"

    entries = [
        Entry("alure, user half", lambda: (case.pruned, finite)),
        Entry("alure, user half and ad tower", lambda: (case.full, finite)),
    ]
    race(Contest("refresh", case.name, entries))
