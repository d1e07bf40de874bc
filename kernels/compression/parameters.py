"""The parameters of the two forms of compression, as frozen dataclasses of tensors, and how they begin.

Weights are stored [in, out] and used as `x @ weight`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DotLinearCompression:
    """n vectors to k by a linear map, gated by what the vectors' products XXᵀ say (paper, section 2.3, form 1)."""

    linear: Tensor  # W_L [k, n]
    mix: Tensor  # Y [n, r]
    hidden_weight: Tensor  # [n·r, h]
    hidden_bias: Tensor  # [h]
    output_weight: Tensor  # [h, k·d]
    output_bias: Tensor  # [k·d]
    gate: Tensor  # [k, d]

    @classmethod
    def initialize(
        cls, n: int, d: int, k: int, r: int, hidden: int, generator: torch.Generator | None = None
    ) -> "DotLinearCompression":
        """float32 parameters; the last layer is zero and the gate one, so it begins as the linear compression."""
        return cls(
            linear=_normal((k, n), n, generator),
            mix=_normal((n, r), n, generator),
            hidden_weight=_normal((n * r, hidden), n * r, generator),
            hidden_bias=torch.zeros(hidden),
            output_weight=torch.zeros(hidden, k * d),
            output_bias=torch.zeros(k * d),
            gate=torch.ones(k, d),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields."""
        mlp = (self.hidden_weight, self.hidden_bias, self.output_weight, self.output_bias)
        return self.linear, self.mix, *mlp, self.gate


@dataclass(frozen=True)
class InteractionLayer:
    """A pre-norm attention layer with a gated FFN; RMSNorm without parameters stands before each half."""

    query: Tensor  # [d, d]
    key: Tensor  # [d, d]
    value: Tensor  # [d, d]
    output: Tensor  # [d, d]
    gate: Tensor  # [d, f], through SiLU
    up: Tensor  # [d, f]
    down: Tensor  # [f, d]


@dataclass(frozen=True)
class InteractionCompression:
    """k seeds attend to the n vectors, then to each other (paper, section 2.3, form 2).

    layers[0] is cross-attention from the seeds to the vectors; every later one is self-attention over the k.
    """

    seeds: Tensor  # [k, d]
    layers: tuple[InteractionLayer, ...]
    num_heads: int

    @classmethod
    def initialize(
        cls,
        d: int,
        k: int,
        num_heads: int,
        num_layers: int = 2,
        hidden: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "InteractionCompression":
        """float32 parameters: a cross-attention layer and `num_layers` − 1 of self-attention; hidden is 2d if None."""
        if num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1 (the cross-attention), got {num_layers}")
        if d % num_heads:
            raise ValueError(f"num_heads: expected a divisor of d ({d}), got {num_heads}")
        f = 2 * d if hidden is None else hidden
        shapes = {"query": (d, d), "key": (d, d), "value": (d, d), "output": (d, d)}
        shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
        layers = tuple(
            InteractionLayer(**{name: _normal(shape, shape[0], generator) for name, shape in shapes.items()})
            for _ in range(num_layers)
        )
        return cls(seeds=_normal((k, d), 1, generator), layers=layers, num_heads=num_heads)


def _normal(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(*shape, generator=generator) / math.sqrt(max(fan_in, 1))


def check_dot_linear(x: Tensor, c: DotLinearCompression) -> None:
    """Raise unless the parameters fit x and each other."""
    n, d = x.shape[1:]
    if c.linear.dim() != 2 or c.mix.dim() != 2 or c.hidden_bias.dim() != 1:
        found = [list(t.shape) for t in (c.linear, c.mix, c.hidden_bias)]
        raise ValueError(f"linear, mix, hidden_bias: expected shapes [k, n], [n, r], [h], got {found}")
    k, r, h = c.linear.shape[0], c.mix.shape[1], c.hidden_bias.shape[0]
    shapes = {
        "linear": (c.linear, (k, n)),
        "mix": (c.mix, (n, r)),
        "hidden_weight": (c.hidden_weight, (n * r, h)),
        "hidden_bias": (c.hidden_bias, (h,)),
        "output_weight": (c.output_weight, (h, k * d)),
        "output_bias": (c.output_bias, (k * d,)),
        "gate": (c.gate, (k, d)),
    }
    for name, (tensor, shape) in shapes.items():
        check_parameter(name, tensor, shape, x)


def check_interaction(x: Tensor, compression: InteractionCompression) -> None:
    """Raise unless the parameters fit x and each other."""
    d, seeds = x.shape[2], compression.seeds
    check_parameter("seeds", seeds, (seeds.shape[0], d), x)
    if not compression.layers:
        raise ValueError("layers: expected at least one (the cross-attention), got none")
    if compression.num_heads < 1 or d % compression.num_heads:
        raise ValueError(f"num_heads: expected a divisor of d ({d}), got {compression.num_heads}")
    for index, layer in enumerate(compression.layers):
        f = layer.up.shape[-1]
        shapes = {"query": (d, d), "key": (d, d), "value": (d, d), "output": (d, d)}
        shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
        for name, shape in shapes.items():
            check_parameter(f"layers[{index}].{name}", getattr(layer, name), shape, x)


def check_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {list(shape)} for x of shape {list(x.shape)}, got {list(tensor.shape)}"
        )
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype} like x, got {tensor.dtype}; call .to({x.dtype})")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got one on {tensor.device}; move it there")
