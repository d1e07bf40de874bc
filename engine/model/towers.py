"""The half of the model that only training runs: the ad tower, the task heads, and `AlureModel` around all of it."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alure.engine.config import ModelConfig
from alure.engine.events import EventBatch
from alure.engine.model.alignment import turn
from alure.engine.model.catalog import Catalog
from alure.engine.model.checkpoint import fill, read_checkpoint
from alure.engine.model.layers import LearnedTimeBias, SourceContext
from alure.engine.model.schema import EventSchema
from alure.engine.model.stack import SourceStack
from alure.engine.model.user_model import UserModel, UserState, gather_rows

TEMPERATURE_FLOOR = 0.01


class AdTower(nn.Module):
    """An ad's hashed ids and content vector to k unit embeddings, comparable with a user's.

    Where model.ad_level is account, the id of its account alone: an advertiser tower.
    """

    def __init__(self, config: ModelConfig, schema: EventSchema) -> None:
        super().__init__()
        self.shape = (config.num_embeddings, config.width)
        self.of_accounts = config.ad_level == "account"
        attributes, dense = (1, 0) if self.of_accounts else (len(schema.item_attributes), schema.dense_dim)
        inputs = attributes * config.attribute_width + dense
        outputs = config.num_embeddings * config.width
        self.hidden = nn.Linear(inputs, 2 * config.width)
        self.output = nn.Linear(2 * config.width, outputs)
        self.skip = nn.Linear(inputs, outputs, bias=False)

    def forward(self, items: Tensor, catalog: Catalog, table: Tensor) -> Tensor:
        """items int64 [N] (index) → [N, k, d], each of length 1. `table` is the user model's."""
        ids = catalog.item_accounts[items, None] if self.of_accounts else catalog.item_rows(items)
        table, rows = gather_rows(table, {"items": ids})
        found = F.embedding(rows["items"].clamp_min(0), table) * (rows["items"] >= 0)[..., None]
        dense = None if self.of_accounts else catalog.item_dense(items)
        x = found.flatten(1) if dense is None else torch.cat([found.flatten(1), dense], dim=1)
        ads = self.skip(x) + self.output(F.silu(self.hidden(x)))
        return F.normalize(ads.view(-1, *self.shape), dim=-1)


class Exposures(NamedTuple):
    """Candidate ads of a batch's users, user after user."""

    items: Tensor  # int64 [E], item index
    offsets: Tensor  # int64 [B + 1]
    users: Tensor  # int64 [E], row of the batch
    timestamps: Tensor  # int64 [E], when the ad was shown


class ContextQuery(nn.Module):
    """A candidate ad looks at one source's tokens from the time of its request."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(config.num_embeddings * config.width, config.width)
        self.time_bias = LearnedTimeBias(config, heads, bidirectional=False) if config.time_bias else None
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, ads: Tensor, exposures: Exposures, context: SourceContext) -> Tensor:
        """ads [E, k·d] → [E, d]."""
        queries = self.query(ads).view(ads.shape[0], self.heads, -1)
        plan = context.plan(exposures.offsets, exposures.timestamps, self.time_bias)
        found = context.attend(queries, plan, self.time_bias)
        return self.output(found.flatten(1))


class RankingHead(nn.Module):
    """One logit a task from user, ad, their products, and what the ad finds among the user's events."""

    def __init__(self, config: ModelConfig, stacks: list[SourceStack], num_tasks: int) -> None:
        super().__init__()
        width, flat = config.width, config.num_embeddings * config.width
        self.contexts = nn.ModuleList(ContextQuery(config, stack.heads) for stack in stacks)
        self.sources = [stack.source for stack in stacks]
        self.hidden = nn.Linear(3 * flat + width, 2 * width)
        self.output = nn.Linear(2 * width, num_tasks)

    def forward(self, state: UserState, ads: Tensor, exposures: Exposures) -> Tensor:
        """ads [E, k, d] of exposures.items → logits [E, num_tasks]."""
        scale = math.sqrt(ads.shape[-1])  # unit vectors to channels of variance 1
        ad = ads.flatten(1) * scale
        user = F.embedding(exposures.users, state.embeddings.flatten(1)) * scale
        found = ad.new_zeros(ad.shape[0], state.embeddings.shape[-1])
        for source, query in zip(self.sources, self.contexts):
            if source in state.contexts:
                found = found + query(ad, exposures, state.contexts[source])
        return self.output(F.silu(self.hidden(torch.cat([user, ad, user * ad, found], dim=1))))


class AlureModel(nn.Module):
    """Everything a checkpoint holds: `user` (what the refresh runs), `ads`, and the training heads."""

    def __init__(
        self, config: ModelConfig, schema: EventSchema, tasks: tuple[str, ...] = (), temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.config, self.schema, self.tasks = config, schema, tasks
        self.user = UserModel(config, schema)
        self.ads = AdTower(config, schema)
        self.heads = nn.ModuleDict()
        if tasks:
            self.heads["ranking"] = RankingHead(config, list(self.user.sources()), len(tasks))
        start = math.log(max(temperature - TEMPERATURE_FLOOR, 1e-4))
        self.heads["retrieval"] = nn.ParameterDict({"log_temperature": nn.Parameter(torch.tensor(start))})

    @classmethod
    def load(cls, path: Path | str) -> "AlureModel":
        """A whole checkpoint, for inference; errors as those of `UserModel.load`."""
        config, tensors = read_checkpoint(Path(path))
        with torch.random.fork_rng(devices=[]):  # the start values are replaced at once
            model = cls(config.model, config.events, config.tasks)
        model.fill(tensors, f"model: {path}")
        return model.eval().requires_grad_(False)

    def fill(self, tensors: dict[str, Tensor], what: str) -> None:
        """Load the tensors of a checkpoint, whether it is aligned or not; see `checkpoint.fill`."""
        self.user.align(tensors.get("user.rotations"))
        fill(self, tensors, what)

    @property
    def temperature(self) -> Tensor:
        """Of the two-tower score; learned, never below its floor."""
        return TEMPERATURE_FLOOR + self.heads["retrieval"]["log_temperature"].exp()  # type: ignore[index]

    def embed_ads(self, items: Tensor, catalog: Catalog) -> Tensor:
        """items int64 [N] → [N, k, d], each of length 1, in the space of the users' embeddings."""
        return turn(self.ads(items, catalog, self.user.table), self.user.rotations)

    def rank(self, state: UserState, exposures: Exposures, catalog: Catalog) -> Tensor:
        """Logits [E, num_tasks] of candidate ads. The head knows both towers' spaces as they were before `align`."""
        rotations = self.user.rotations
        own = state if rotations is None else state._replace(embeddings=turn(state.embeddings, rotations.mT))
        logits: Tensor = self.heads["ranking"](own, self.ads(exposures.items, catalog, self.user.table), exposures)
        return logits

    def forward(self, batch: EventBatch, catalog: Catalog) -> UserState:
        return self.user.encode(batch, catalog)


def two_tower_scores(users: Tensor, ads: Tensor) -> Tensor:
    """Mean cosine over the k slots: users [B, k, d] × ads [N, k, d] → [B, N]."""
    return users.flatten(1) @ ads.flatten(1).T / users.shape[1]
