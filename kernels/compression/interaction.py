"""Interaction compression: k seeds cross-attend to the n vectors, then attend to each other.

The vectors are not projected. (x W_K)·q = x·(W_K q) and Σ p (x W_V) = (Σ p x) W_V, so the few queries take W_K, and W_V
comes after the sum: n vectors meet k · heads queries of width d in place of two matrices [d, d].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from alure.kernels.attention import jagged_attention
from alure.kernels.compression.parameters import InteractionCompression, InteractionLayer
from alure.kernels.compression.reference import rms_norm

LARGEST_HEAD = 256  # of the attention kernels


def compress_interaction(x: Tensor, compression: InteractionCompression, backend: str) -> Tensor:
    """[B, k, d] of x [B, n, d], before the final normalisation. `backend` is that of the attention."""
    batch, n, d = x.shape
    seeds = compression.seeds
    k = seeds.shape[0]
    of_seeds, of_vectors = _even_offsets(batch, k, x.device), _even_offsets(batch, n, x.device)
    tokens = seeds.expand(batch, k, d).reshape(batch * k, d)
    vectors = rms_norm(x.reshape(batch * n, d))
    for index, layer in enumerate(compression.layers):
        queries = rms_norm(tokens)
        keys, key_offsets = (vectors, of_vectors) if index == 0 else (queries, of_seeds)
        attend = _attend_unprojected if index == 0 and d <= LARGEST_HEAD else _attend
        tokens = tokens + attend(queries, keys, layer, compression.num_heads, of_seeds, key_offsets, backend)
        h = rms_norm(tokens)
        tokens = tokens + (F.silu(h @ layer.gate) * (h @ layer.up)) @ layer.down
    return tokens.view(batch, k, d)


def _attend(
    queries: Tensor,
    keys: Tensor,
    layer: InteractionLayer,
    num_heads: int,
    query_offsets: Tensor,
    key_offsets: Tensor,
    backend: str,
) -> Tensor:
    q = (queries @ layer.query).unflatten(1, (num_heads, -1))
    k = (keys @ layer.key).unflatten(1, (num_heads, -1))
    v = (keys @ layer.value).unflatten(1, (num_heads, -1))
    return jagged_attention(q, k, v, query_offsets, key_offsets, backend=backend).flatten(1) @ layer.output


def _attend_unprojected(
    queries: Tensor,
    keys: Tensor,
    layer: InteractionLayer,
    num_heads: int,
    query_offsets: Tensor,
    key_offsets: Tensor,
    backend: str,
) -> Tensor:
    key, value = (w.unflatten(1, (num_heads, -1)) for w in (layer.key, layer.value))  # [d, heads, head_dim]
    q = torch.einsum("thc,dhc->thd", (queries @ layer.query).unflatten(1, (num_heads, -1)), key)
    x, scale = keys[:, None], key.shape[2] ** -0.5  # one head of keys and values serves all
    sums = jagged_attention(q, x, x, query_offsets, key_offsets, softmax_scale=scale, backend=backend)
    return torch.einsum("thd,dhc->thc", sums, value).flatten(1) @ layer.output


def _even_offsets(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, device=device) * length
