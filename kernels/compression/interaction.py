"""Interaction compression: k seeds cross-attend to the n vectors, then attend to each other.

The vectors are not projected. (x W_K)·q = x·(W_K q) and Σ p (x W_V) = (Σ p x) W_V, so the few queries take W_K, and W_V
comes after the sum: n vectors meet k · heads queries of width d in place of two matrices [d, d].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alure.kernels.attention import AttentionPlan, jagged_attention
from alure.kernels.compression.parameters import InteractionCompression, InteractionLayer
from alure.kernels.compression.reference import rms_norm

LARGEST_HEAD = 256  # of the attention kernels
_Pairs = dict[str, Any]  # offsets, or a plan of them


@dataclass(frozen=True)
class InteractionPlan:
    """Who attends to whom among `users` users of n vectors each: made once, so that compression only launches."""

    users: int
    n: int
    cross: AttentionPlan  # from the k seeds to the n vectors
    own: AttentionPlan  # among the k

    @classmethod
    def of(
        cls, users: int, n: int, compression: InteractionCompression, device: torch.device | None = None
    ) -> "InteractionPlan":
        """A plan made on `device` (default: on the host), to be `moved` to where the parameters are."""
        seeds, device = compression.seeds, torch.device("cpu") if device is None else device
        (k, d), heads = seeds.shape, compression.num_heads
        of_seeds, of_vectors = _even_offsets(users, k, device), _even_offsets(users, n, device)
        found = cls(users, n, AttentionPlan(of_seeds, of_vectors), AttentionPlan(of_seeds))
        found.cross.prepare(seeds.dtype, d if d <= LARGEST_HEAD else d // heads, seeds.device)
        found.own.prepare(seeds.dtype, d // heads, seeds.device)
        return found

    def moved(self, move: Callable[[Tensor], Tensor]) -> "InteractionPlan":
        """The plan elsewhere: `move` gives a tensor's copy there, for the same tensor the same copy."""
        return InteractionPlan(self.users, self.n, self.cross.moved(move), self.own.moved(move))


def compress_interaction(
    x: Tensor, compression: InteractionCompression, plan: InteractionPlan | None, backend: str
) -> Tensor:
    """[B, k, d] of x [B, n, d], before the final normalisation. `backend` is that of the attention."""
    batch, n, d = x.shape
    seeds = compression.seeds
    k = seeds.shape[0]
    if plan is None:
        of_seeds, of_vectors = _even_offsets(batch, k, x.device), _even_offsets(batch, n, x.device)
        cross: _Pairs = {"q_offsets": of_seeds, "k_offsets": of_vectors}
        own: _Pairs = {"q_offsets": of_seeds}
    elif (plan.users, plan.n) == (batch, n):
        cross, own = {"plan": plan.cross}, {"plan": plan.own}
    else:
        raise ValueError(f"plan: expected one of {batch} users of {n} vectors, got {plan.users} of {plan.n}")
    tokens = seeds.expand(batch, k, d).reshape(batch * k, d)
    vectors = rms_norm(x.reshape(batch * n, d))
    for index, layer in enumerate(compression.layers):
        queries = rms_norm(tokens)
        keys, pairs = (vectors, cross) if index == 0 else (queries, own)
        attend = _attend_unprojected if index == 0 and d <= LARGEST_HEAD else _attend
        tokens = tokens + attend(queries, keys, layer, compression.num_heads, pairs, backend)
        h = rms_norm(tokens)
        tokens = tokens + (F.silu(h @ layer.gate) * (h @ layer.up)) @ layer.down
    return tokens.view(batch, k, d)


def _attend(
    queries: Tensor,
    keys: Tensor,
    layer: InteractionLayer,
    num_heads: int,
    pairs: _Pairs,
    backend: str,
) -> Tensor:
    q = (queries @ layer.query).unflatten(1, (num_heads, -1))
    k = (keys @ layer.key).unflatten(1, (num_heads, -1))
    v = (keys @ layer.value).unflatten(1, (num_heads, -1))
    return jagged_attention(q, k, v, **pairs, backend=backend).flatten(1) @ layer.output


def _attend_unprojected(
    queries: Tensor,
    keys: Tensor,
    layer: InteractionLayer,
    num_heads: int,
    pairs: _Pairs,
    backend: str,
) -> Tensor:
    key, value = (w.unflatten(1, (num_heads, -1)) for w in (layer.key, layer.value))  # [d, heads, head_dim]
    q = torch.einsum("thc,dhc->thd", (queries @ layer.query).unflatten(1, (num_heads, -1)), key)
    x, scale = keys[:, None], key.shape[2] ** -0.5  # one head of keys and values serves all
    sums = jagged_attention(q, x, x, **pairs, softmax_scale=scale, backend=backend)
    return torch.einsum("thd,dhc->thc", sums, value).flatten(1) @ layer.output


def _even_offsets(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, device=device) * length
