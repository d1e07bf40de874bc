"""The modules a source's tokens pass through: attention layers, and the taps that pool them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alure.engine.config import ModelConfig
from alure.kernels.attention import (
    PositionBias,
    TimeBias,
    jagged_attention,
    position_thresholds,
    time_thresholds,
)

LONGEST_POSITION = 4_096  # farther apart shares a bucket


class LearnedTimeBias(nn.Module):
    """Per-head bias over t_query − t_key: a table over log-spaced integer thresholds, and daily and weekly cycles."""

    thresholds: Tensor
    periods: Tensor

    def __init__(self, config: ModelConfig, heads: int, bidirectional: bool) -> None:
        super().__init__()
        thresholds = time_thresholds(config.buckets_per_octave, bidirectional=bidirectional)
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.register_buffer("periods", torch.tensor(config.bias_periods, dtype=torch.int64), persistent=False)
        self.table = nn.Parameter(torch.randn(heads, thresholds.numel() + 1) * 0.02)
        self.cosine = nn.Parameter(torch.zeros(heads, len(config.bias_periods)))
        self.sine = nn.Parameter(torch.zeros(heads, len(config.bias_periods)))

    def forward(self) -> TimeBias:
        if not self.periods.numel():
            return TimeBias(self.thresholds, self.table)
        return TimeBias(self.thresholds, self.table, self.periods, self.cosine, self.sine)


class LearnedPositionBias(nn.Module):
    """Per-head bias over the distance in the sequence, i − j."""

    thresholds: Tensor

    def __init__(self, heads: int, bidirectional: bool) -> None:
        super().__init__()
        thresholds = position_thresholds(longest=LONGEST_POSITION, bidirectional=bidirectional)
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.table = nn.Parameter(torch.randn(heads, thresholds.numel() + 1) * 0.02)

    def forward(self) -> PositionBias:
        return PositionBias(self.thresholds, self.table)


class AttentionLayer(nn.Module):
    """Pre-norm jagged attention with time and position bias, then a gated FFN (SwiGLU)."""

    def __init__(self, config: ModelConfig, heads: int, window: int | None) -> None:
        super().__init__()
        width, hidden = config.width, 2 * config.width
        self.heads, self.causal = heads, config.causal
        self.window = None if window is None else (window, 0 if config.causal else window)
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.time_bias = LearnedTimeBias(config, heads, bidirectional=not config.causal)
        self.position_bias = LearnedPositionBias(heads, bidirectional=not config.causal)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, offsets: Tensor, timestamps: Tensor) -> Tensor:
        """x [n, d] → [n, d]."""
        q, k, v = self.qkv(self.attention_norm(x)).view(x.shape[0], 3, self.heads, -1).unbind(1)
        attended = jagged_attention(
            q,
            k,
            v,
            offsets,
            q_timestamps=timestamps,
            k_timestamps=timestamps,
            time_bias=self.time_bias(),
            position_bias=self.position_bias(),
            causal=self.causal,
            window_size=self.window,
        )
        x = x + self.output(attended.reshape(x.shape))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class SourceContext(NamedTuple):
    """Keys and values of one source's tokens, for queries that come from outside (context queries)."""

    keys: Tensor  # [n, H, d/H]
    values: Tensor  # [n, H, d/H]
    offsets: Tensor  # [B + 1]
    timestamps: Tensor  # int64 [n]

    def attend(self, queries: Tensor, offsets: Tensor, timestamps: Tensor, time_bias: TimeBias) -> Tensor:
        """queries [Q, d] of the users by offsets [B + 1], each from its own time int64 [Q] → [Q, d].

        A user without events in the source gives zeros.
        """
        heads = self.keys.shape[1]
        found = jagged_attention(
            queries.view(queries.shape[0], heads, -1),
            self.keys,
            self.values,
            offsets,
            self.offsets,
            q_timestamps=timestamps,
            k_timestamps=self.timestamps,
            time_bias=time_bias,
        )
        return found.reshape(queries.shape)


class Tap(nn.Module):
    """Attention pooling of one (layer, source): m learned seeds look at the tokens from the snapshot time T."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        width = config.width
        self.heads = heads
        self.seeds = nn.Parameter(torch.randn(config.seeds, width))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.time_bias = LearnedTimeBias(config, heads, bidirectional=False)
        self.output = nn.Linear(width, width, bias=False)

    def context(self, x: Tensor, offsets: Tensor, timestamps: Tensor) -> SourceContext:
        keys, values = self.key_value(self.norm(x)).view(x.shape[0], 2, self.heads, -1).unbind(1)
        return SourceContext(keys, values, offsets, timestamps)

    def forward(self, context: SourceContext, reference_times: Tensor) -> Tensor:
        """reference_times int64 [B] → [B, m, d]; zeros for a user without events."""
        batch, (seeds, width) = reference_times.shape[0], self.seeds.shape
        queries = self.seeds.expand(batch, seeds, width).reshape(batch * seeds, width)
        offsets = torch.arange(0, (batch + 1) * seeds, seeds, device=queries.device)
        pooled = context.attend(queries, offsets, reference_times.repeat_interleave(seeds), self.time_bias())
        return self.output(pooled).view(batch, seeds, width)
