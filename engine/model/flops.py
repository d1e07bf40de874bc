"""FLOPs of the user model's forward pass, from the lengths of the histories alone.

Counted are the products, a multiply-add as two: linear maps, attention's QKᵀ and PV over the pairs that see each other,
compression. Norms, activations, softmax and biases are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from alure.engine.model.compression import DotLinear, Interaction
from alure.engine.model.layers import Exchange, Tap
from alure.engine.model.stack import SourceStack
from alure.engine.model.user_model import UserModel
from alure.kernels.attention.arguments import UNLIMITED
from alure.kernels.compression.interaction import LARGEST_HEAD


@dataclass(frozen=True)
class SourceFlops:
    """Of one source: for each event that runs through the layers, each that the taps look at, each user with events,
    and each pair of events that see each other.
    """

    event: float
    pooled: float
    user: float
    pair: float
    left: int
    right: int

    @classmethod
    def of(cls, stack: SourceStack, width: int, causal: bool) -> "SourceFlops":
        encoder = stack.encoder
        parts = (encoder.id_weight, encoder.dense_weight, encoder.time_weight)
        layers = linear_weights(stack.layers)
        event, pooled, user = sum(part.numel() for part in parts if part is not None) + layers, 0, 0
        for tap in stack.taps.values():
            assert isinstance(tap, Tap)
            seeds = tap.seeds.shape[0]
            event += tap.key_value.weight.numel()
            pooled += 2 * seeds * width
            user += seeds * tap.output.weight.numel()
        for exchange in stack.exchanges:
            assert isinstance(exchange, Exchange)
            user += exchange.weight.numel()
        left, right = stack.window or (UNLIMITED, UNLIMITED)
        pair = 4.0 * width * len(stack.layers)
        return cls(2.0 * event, 2.0 * pooled, 2.0 * user, pair, left, 0 if causal else right)

    def __call__(self, lengths: np.ndarray) -> float:
        return (
            self.event * int(lengths.sum())
            + self.pooled * int(lengths.sum())
            + self.user * np.count_nonzero(lengths)
            + self.pair * self.pairs(lengths)
        )

    def pairs(self, lengths: np.ndarray) -> int:
        return int(lengths.sum()) + within(lengths, self.left) + within(lengths, self.right)

    def saved(self, cached: np.ndarray) -> float:
        """What it costs less where keys and values of the first events, so many of each user, are cached."""
        return self.event * int(cached.sum()) + self.pair * self.pairs(cached)


class ForwardFlops:
    """`ForwardFlops(model)(lengths)`: lengths int64 [B] of the events of each source."""

    def __init__(self, model: UserModel) -> None:
        config = model.config
        self.sources = {s.source: SourceFlops.of(s, config.width, config.causal) for s in model.sources()}
        self.user = compression_flops(model.compression, model.num_taps * config.seeds)
        if model.rotations is not None:
            self.user += 2.0 * model.rotations.numel()

    def __call__(self, lengths: Mapping[str, np.ndarray]) -> float:
        users = max((len(of_source) for of_source in lengths.values()), default=0)
        return self.user * users + sum(flops(lengths[source]) for source, flops in self.sources.items())

    def saved(self, cached: Mapping[str, np.ndarray]) -> float:
        return sum(flops.saved(cached[source]) for source, flops in self.sources.items())


def within(lengths: np.ndarray, window: int) -> int:
    """Pairs of each event with one of at most `window` before it: Σ over i < length of min(i, window)."""
    rising = np.minimum(lengths - 1, window)
    return int((rising * (rising + 1) // 2 + (lengths - 1 - rising) * window).sum())


def linear_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def compression_flops(compression: DotLinear | Interaction, n: int) -> float:
    """Of one user's n vectors; see `alure.kernels.compression`."""
    if isinstance(compression, DotLinear):
        size = {name: tensor.numel() for name, tensor in compression.tensors.items()}
        d = compression.tensors["gate"].shape[1]
        return 2.0 * (d * (size["linear"] + 2 * size["mix"]) + size["hidden_weight"] + size["output_weight"])
    (k, d), heads, total = compression.seeds.shape, compression.heads, 0
    for index, layer in enumerate(compression.layers):
        assert isinstance(layer, nn.ParameterDict)
        size = {name: tensor.numel() for name, tensor in layer.items()}
        of_keys, keys = size.pop("key") + size.pop("value"), k if index else n
        total += k * sum(size.values())
        if index == 0 and d <= LARGEST_HEAD:  # the queries take the keys' map, and meet whole vectors
            total += k * of_keys + 2 * k * keys * heads * d
        else:
            total += keys * of_keys + 2 * k * keys * d
    return 2.0 * total
