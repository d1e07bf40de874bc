"""The user model as most people would write it in plain PyTorch: padded batches, masks, dense attention biases.

It shares the parameters of our model and none of our kernels. One source, dot-linear compression.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from alure.engine.events import EventSequence
from alure.engine.model import Catalog, UserModel
from alure.engine.model.encoder import TAU
from alure.engine.model.layers import AttentionLayer, LearnedTimeBias, Tap

EPSILON = 1e-6


class PaddedUserModel:
    """`model` with its weights and activations in `dtype`."""

    def __init__(self, model: UserModel, dtype: torch.dtype) -> None:
        (self.stack,) = model.sources()
        self.model, self.dtype = model, dtype

    def __call__(self, sequence: EventSequence, as_of: Tensor, catalog: Catalog) -> Tensor:
        """Embeddings [B, k, d] of users, each with at least one event."""
        lengths = sequence.lengths
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        real = columns < lengths[:, None]  # [B, L]
        place = torch.where(real, sequence.offsets[:-1, None] + columns, 0)
        times = sequence.timestamps[place]  # [B, L]
        x = self.encode(
            catalog.event_rows(self.stack.source, sequence)[place], sequence.counts[place], times, as_of, real
        )
        pairs = Pairs(times, real, self.dtype)
        pooled = []
        for depth in range(1, len(self.stack.layers) + 1):
            x = self.attend(self.stack.layer(depth), x, pairs)
            tap = self.stack.tap(depth)
            if tap is not None:
                pooled.append(self.pool(tap, x, as_of[:, None] - times, real))
        return self.compress(torch.cat(pooled, dim=1))

    def encode(self, rows: Tensor, counts: Tensor, times: Tensor, as_of: Tensor, real: Tensor) -> Tensor:
        """rows [B, L, A] → tokens [B, L, d]."""
        encoder = self.stack.encoder
        found = F.embedding(rows.clamp_min(0), self.model.table) * (rows >= 0)[..., None]
        age = (as_of[:, None] - times).clamp_min(0)
        gap = F.pad(times.diff(dim=1), (1, 0)).clamp_min(0)  # beyond a history it runs backwards
        angle = angles(times, encoder.periods) + encoder.phases.float()
        decay = torch.log1p(torch.stack([age, gap], dim=-1).float() / TAU)
        clock = torch.cat([decay, angle.sin(), angle.cos()], dim=-1).to(self.dtype)
        x = found.flatten(2) @ encoder.id_weight.flatten(0, 1) + clock @ encoder.time_weight + encoder.bias
        order = real.sum(1, keepdim=True) - 1 - torch.arange(real.shape[1], device=real.device)
        x = x + F.embedding(order.clamp(0, encoder.position_table.shape[0] - 1), encoder.position_table)
        steps = 2 ** torch.arange(1, encoder.frequency_table.shape[0], device=counts.device)
        return x + F.embedding(torch.bucketize(counts + 1, steps, right=True), encoder.frequency_table)

    def attend(self, layer: AttentionLayer, x: Tensor, pairs: "Pairs") -> Tensor:
        normed = norm(x, layer.attention_norm.weight)
        q, k, v = layer.qkv(normed).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, d/H]
        width = q.shape[-1]
        assert layer.time_bias is not None
        q, k, scale = pairs.with_cycles(q, k, layer.time_bias)
        v = F.pad(v, (0, q.shape[-1] - width))  # SDPA is fused where the widths agree
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs.bias(layer), scale=scale)[..., :width]
        x = x + layer.output(found.transpose(1, 2).flatten(2))
        gate, up = layer.gate_up(norm(x, layer.ffn_norm.weight)).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate) * up)

    def pool(self, tap: Tap, x: Tensor, age: Tensor, real: Tensor) -> Tensor:
        """[B, m, d]: what the seeds see from the snapshot time."""
        k, v = tap.key_value(norm(x, tap.norm.weight)).unflatten(-1, (2, tap.heads, -1)).permute(2, 0, 3, 1, 4)
        q = tap.seeds.unflatten(-1, (tap.heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
        time, position = tap.time_bias, tap.position_bias
        assert time is not None
        assert position is not None
        angle = angles(age, time.periods)
        bias = look_up(time.table.float(), torch.bucketize(age, time.thresholds, right=True))  # [B, H · m, L]
        cycles = angle.cos() @ time.cosine.T.float() + angle.sin() @ time.sine.T.float()
        order = real.sum(1, keepdim=True) - 1 - torch.arange(real.shape[1], device=real.device)  # from the newest event
        near = look_up(position.table.float(), torch.bucketize(order, position.thresholds, right=True))
        bias = (bias + near + cycles.transpose(1, 2)).masked_fill(~real[:, None], -math.inf).to(self.dtype)
        bias = bias.unflatten(1, (tap.heads, -1))  # [B, H, m, L]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return tap.output(found.transpose(1, 2).flatten(2))

    def compress(self, x: Tensor) -> Tensor:
        c: Any = self.model.compression.tensors
        products = x @ (x.mT @ c["mix"])
        hidden = F.rms_norm(products.flatten(1), products.flatten(1).shape[1:], eps=EPSILON) @ c["hidden_weight"]
        update = F.gelu(hidden + c["hidden_bias"], approximate="tanh") @ c["output_weight"] + c["output_bias"]
        return F.normalize(c["linear"] @ x + c["gate"] * update.unflatten(1, c["gate"].shape), dim=-1)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPSILON)


class Pairs:
    """What depends on pairs of events: buckets once a batch, dense biases [B, H, L, L] once a layer."""

    def __init__(self, times: Tensor, real: Tensor, dtype: torch.dtype) -> None:
        self.times, self.dtype = times, dtype
        self.padding = torch.zeros_like(real, dtype=dtype).masked_fill_(~real, -math.inf)[:, None, None]
        index = torch.arange(real.shape[1], device=real.device)
        self.distance, self.delta = index[:, None] - index, times[:, :, None] - times[:, None, :]
        self.buckets: Tensor | None = None

    def bias(self, layer: AttentionLayer) -> Tensor:
        time, position = layer.time_bias, layer.position_bias
        assert time is not None
        assert position is not None
        if self.buckets is None:  # the same thresholds in every layer
            self.buckets = torch.bucketize(self.delta, time.thresholds, out_int32=True, right=True)
        near = look_up(position.table, torch.bucketize(self.distance, position.thresholds, right=True)[None])
        return look_up(time.table, self.buckets).add_(near).add_(self.padding)

    def with_cycles(self, q: Tensor, k: Tensor, bias: LearnedTimeBias) -> tuple[Tensor, Tensor, float]:
        """Queries and keys with two more channels a period: c·cos w(a − b) + s·sin w(a − b) as a product."""
        scale = q.shape[-1] ** -0.5
        angle = angles(self.times, bias.periods)[:, None]  # [B, 1, L, P]
        cos, sin = angle.cos(), angle.sin()
        c, s = bias.cosine.float()[:, None], bias.sine.float()[:, None]  # [H, 1, P]
        wide_q = torch.cat([q, torch.cat([c * cos + s * sin, c * sin - s * cos], dim=-1).to(q.dtype) / scale], dim=-1)
        wide_k = torch.cat([cos, sin], dim=-1).to(k.dtype).expand(-1, k.shape[1], -1, -1)
        return wide_q, torch.cat([k, wide_k], dim=-1), scale


def angles(times: Tensor, periods: Tensor) -> Tensor:
    """[…, P] float32; reduced as integers, for float32 does not hold unix seconds."""
    return (times[..., None] % periods).float() * (2 * math.pi / periods.float())


def look_up(table: Tensor, buckets: Tensor) -> Tensor:
    """table [H, n], buckets [B, …] → [B, H, …]."""
    found = torch.stack([torch.index_select(row, 0, buckets.flatten()) for row in table])
    return found.view(len(table), *buckets.shape).transpose(0, 1)
