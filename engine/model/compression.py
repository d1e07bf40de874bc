"""The n pooled vectors of a user to k embeddings: the two forms of `alure.kernels.compress` as modules."""

import dataclasses

import torch
from torch import Tensor, nn

from alure.engine.config import ModelConfig
from alure.kernels.compression import (
    DotLinearCompression,
    InteractionCompression,
    InteractionPlan,
    compress,
    compress_int8,
)
from alure.kernels.compression.parameters import InteractionLayer


class DotLinear(nn.Module):
    """Z = W_L X beside gated products X(XᵀY)."""

    def __init__(self, config: ModelConfig, n: int) -> None:
        super().__init__()
        d, k = config.width, config.num_embeddings
        start = DotLinearCompression.initialize(n, d, k, config.compression_rank, hidden=2 * d)
        self.tensors = nn.ParameterDict({f.name: getattr(start, f.name) for f in dataclasses.fields(start)})

    def plan(self, users: int, device: torch.device) -> None:
        """There is nothing to plan."""

    def forward(self, x: Tensor, plan: InteractionPlan | None = None) -> Tensor:
        """[B, n, d] → [B, k, d], each embedding of length 1."""
        return compress(x.to(self.tensors["linear"].dtype), self._weights(), plan=plan)

    def forward_int8(self, x: Tensor, plan: InteractionPlan | None = None) -> tuple[Tensor, Tensor]:
        """The same as codes int8 [B, k, d] and scales float32 [B, k]."""
        return compress_int8(x.to(self.tensors["linear"].dtype), self._weights(), plan=plan)

    def _weights(self) -> DotLinearCompression:
        return DotLinearCompression(**self.tensors)


class Interaction(nn.Module):
    """k seeds attend to the n vectors, then to each other."""

    def __init__(self, config: ModelConfig, n: int) -> None:
        super().__init__()
        self.n = n
        start = InteractionCompression.initialize(config.width, config.num_embeddings, config.heads)
        self.heads = config.heads
        self.seeds = nn.Parameter(start.seeds)
        self.layers = nn.ModuleList(
            nn.ParameterDict({f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)})
            for layer in start.layers
        )

    def plan(self, users: int, device: torch.device) -> InteractionPlan:
        """Of a batch of `users`, made on `device` for where the parameters are."""
        return InteractionPlan.of(users, self.n, self._weights(), device)

    def forward(self, x: Tensor, plan: InteractionPlan | None = None) -> Tensor:
        """[B, n, d] → [B, k, d], each embedding of length 1. With a plan of the batch it waits for nothing."""
        return compress(x.to(self.seeds.dtype), self._weights(), plan=plan)

    def forward_int8(self, x: Tensor, plan: InteractionPlan | None = None) -> tuple[Tensor, Tensor]:
        """The same as codes int8 [B, k, d] and scales float32 [B, k]."""
        return compress_int8(x.to(self.seeds.dtype), self._weights(), plan=plan)

    def _weights(self) -> InteractionCompression:
        layers = tuple(InteractionLayer(**dict(layer.items())) for layer in self.layers)  # type: ignore[operator]
        return InteractionCompression(self.seeds, layers, self.heads)


def make_compression(config: ModelConfig, n: int) -> DotLinear | Interaction:
    return DotLinear(config, n) if config.compression == "dot_linear" else Interaction(config, n)
