"""The modules a source's tokens pass through: attention layers, and the taps that pool them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alure.engine.config import ModelConfig
from alure.engine.ranges import op
from alure.kernels.attention import (
    AttentionPlan,
    PositionBias,
    TimeBias,
    jagged_attention,
    position_thresholds,
    time_thresholds,
)
from alure.kernels.jagged import segment_ids
from alure.kernels.rowwise import rms_norm, swiglu

LONGEST_POSITION = 4_096  # farther apart shares a bucket


class LearnedTimeBias(nn.Module):
    """Per-head bias over t_query − t_key: a table over log-spaced integer thresholds, and daily and weekly cycles."""

    thresholds: Tensor
    periods: Tensor

    def __init__(self, config: ModelConfig, heads: int, bidirectional: bool) -> None:
        super().__init__()
        thresholds = time_thresholds(config.buckets_per_octave, bidirectional=bidirectional)
        periods = torch.tensor(config.bias_periods, dtype=torch.int64)
        self.on_host = thresholds, periods  # stay where batches are prepared
        self.register_buffer("thresholds", thresholds.clone(), persistent=False)
        self.register_buffer("periods", periods.clone(), persistent=False)
        self.table = nn.Parameter(torch.randn(heads, thresholds.numel() + 1) * 0.02)
        self.cosine = nn.Parameter(torch.zeros(heads, len(config.bias_periods)))
        self.sine = nn.Parameter(torch.zeros(heads, len(config.bias_periods)))

    def forward(self, plan: AttentionPlan | None = None) -> TimeBias:
        """plan: of a bias of the same configuration; then over the plan's own tensors, so that none are compared."""
        thresholds, periods = self.thresholds, self.periods
        if plan is not None and plan.time_thresholds is not None and plan.periods is not None:
            thresholds, periods = plan.time_thresholds, plan.periods
        if not periods.numel():
            return TimeBias(thresholds, self.table)
        return TimeBias(thresholds, self.table, periods, self.cosine, self.sine)


def grouped_time_bias(biases: list[TimeBias]) -> TimeBias | None:
    """Biases with the same thresholds and periods as one, for a launch in which each has a group of sequences.

    None for none.
    """
    if not biases:
        return None
    first = biases[0]
    table = torch.stack([bias.table for bias in biases])
    if first.periods is None:
        return TimeBias(first.thresholds, table)
    cosine, sine = ([getattr(bias, name) for bias in biases] for name in ("cosine", "sine"))
    return TimeBias(first.thresholds, table, first.periods, torch.stack(cosine), torch.stack(sine))


class LearnedPositionBias(nn.Module):
    """Per-head bias over the distance in the sequence, i − j."""

    thresholds: Tensor

    def __init__(self, heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.on_host = position_thresholds(longest=LONGEST_POSITION, bidirectional=bidirectional)
        self.register_buffer("thresholds", self.on_host.clone(), persistent=False)
        self.table = nn.Parameter(torch.randn(heads, self.thresholds.numel() + 1) * 0.02)

    def forward(self, plan: AttentionPlan | None = None) -> PositionBias:
        """plan: as for `LearnedTimeBias`."""
        known = None if plan is None else plan.position_thresholds
        return PositionBias(self.thresholds if known is None else known, self.table)


def bias_tensors(
    time_bias: LearnedTimeBias | None, position_bias: LearnedPositionBias | None, device: torch.device
) -> dict[str, Any]:
    """What an `AttentionPlan` made on `device` has of these biases: on the host, or where the model is."""
    found: dict[str, Any] = {}
    if time_bias is not None:
        here = time_bias.thresholds.device == device
        thresholds, periods = (time_bias.thresholds, time_bias.periods) if here else time_bias.on_host
        found |= {"time_thresholds": thresholds, "periods": periods}
    if position_bias is not None:
        here = position_bias.thresholds.device == device
        found["position_thresholds"] = position_bias.thresholds if here else position_bias.on_host
    return found


def grouped_position_bias(biases: list[PositionBias]) -> PositionBias | None:
    return None if not biases else PositionBias(biases[0].thresholds, torch.stack([bias.table for bias in biases]))


class RMSNorm(nn.Module):
    """`alure.kernels.rms_norm` with a learned weight a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, d] → [n, d]."""
        return rms_norm(x, self.weight)


class AttentionLayer(nn.Module):
    """Pre-norm jagged attention with time and position bias, then a gated FFN (SwiGLU)."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        width, hidden = config.width, 2 * config.width
        self.heads, self.head_dim = heads, width // heads
        self.attention_norm = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        bidirectional = not config.causal
        self.time_bias = LearnedTimeBias(config, heads, bidirectional) if config.time_bias else None
        self.position_bias = LearnedPositionBias(heads, bidirectional) if config.position_bias else None
        self.ffn_norm = RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor) -> Tensor:
        """x [n, d] → queries, keys and values [n, 3, H, d/H]."""
        return self.qkv(self.attention_norm(x)).view(x.shape[0], 3, self.heads, x.shape[1] // self.heads)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [n, d] and what its queries found [n, H, d/H] → [n, d]."""
        x = x + self.dropout(self.output(attended.reshape(x.shape)))
        return x + self.dropout(self.down(swiglu(self.gate_up(self.ffn_norm(x)))))


def run_together(layers: list[AttentionLayer], tokens: list[Tensor], plan: AttentionPlan) -> list[Tensor]:
    """One layer of several sources, [n, d] each, with the same number of heads: their attention is one launch.

    The plan's sequences are those of the sources one after another, its groups the sources.
    """
    with op("project"):
        projected = [layer.project(x) for layer, x in zip(layers, tokens)]
        q, k, v = (projected[0] if len(projected) == 1 else torch.cat(projected)).unbind(1)  # cat copies a single one
    with op("attention"):
        attended = _attend(layers, q, k, v, plan)
    parts = attended.split([x.shape[0] for x in tokens])
    with op("feed_forward"):
        return [layer.finish(x, part) for layer, x, part in zip(layers, tokens, parts)]


def _attend(layers: list[AttentionLayer], q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    time_bias = grouped_time_bias([layer.time_bias(plan) for layer in layers if layer.time_bias])
    position_bias = grouped_position_bias([layer.position_bias(plan) for layer in layers if layer.position_bias])
    return jagged_attention(q, k, v, plan=plan, time_bias=time_bias, position_bias=position_bias)


class Exchange(nn.Module):
    """What one source's tokens hear of a user's other sources between two layers (InterFormer's cross summary).

    The means of the other sources' tokens, through one linear map that begins at zero.
    """

    def __init__(self, config: ModelConfig, others: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.width, others * config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, offsets: Tensor, summaries: Tensor) -> Tensor:
        """x [n, d] of P users, offsets [P + 1], summaries [P, others, d] → [n, d]."""
        heard = self.dropout(F.linear(summaries.flatten(1), self.weight)).to(x.dtype)
        # the gradient of an embedding is summed in one order, that of an index is not
        return x + F.embedding(segment_ids(offsets, x.shape[0]), heard)


def summarize(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean of each user's tokens, RMS 1: x [n, d], offsets [P + 1], no user without tokens → [P, d]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = torch.segment_reduce(wide, "mean", lengths=offsets.diff().to(torch.int64), unsafe=True)
    return F.rms_norm(mean, mean.shape[1:], eps=1e-6).to(x.dtype)


class SourceContext(NamedTuple):
    """Keys and values of one source's tokens, for queries that come from outside (context queries)."""

    keys: Tensor  # [n, H, d/H]
    values: Tensor  # [n, H, d/H]
    offsets: Tensor  # [B + 1]
    timestamps: Tensor  # int64 [n]

    def plan(self, offsets: Tensor, timestamps: Tensor, time_bias: LearnedTimeBias | None) -> AttentionPlan:
        """Of queries of the users by offsets [B + 1], each from its own time int64 [Q]."""
        return AttentionPlan(
            offsets,
            self.offsets,
            q_timestamps=timestamps if time_bias else None,
            k_timestamps=self.timestamps if time_bias else None,
            **bias_tensors(time_bias, None, offsets.device),
        )

    def attend(
        self,
        queries: Tensor,
        plan: AttentionPlan,
        time_bias: LearnedTimeBias | None,
        position_bias: LearnedPositionBias | None = None,
    ) -> Tensor:
        """queries [Q, heads, d/H] → like queries; heads: a multiple of H. A user without events gives zeros."""
        found = jagged_attention(
            queries.to(self.keys.dtype),  # under autocast the keys are of its type
            self.keys,
            self.values,
            plan=plan,
            time_bias=time_bias(plan) if time_bias else None,
            position_bias=position_bias(plan) if position_bias else None,
        )
        return found.to(queries.dtype)


class Tap(nn.Module):
    """Attention pooling of one (layer, source): m learned seeds look at the tokens from the snapshot time T.

    Every seed is H query heads of one query, so that all of them stand at the newest token and read its keys once.
    """

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        width = config.width
        self.heads, self.head_dim = heads, width // heads
        self.seeds = nn.Parameter(torch.randn(config.seeds, width))
        self.norm = RMSNorm(width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        queries = config.seeds * heads
        self.time_bias = LearnedTimeBias(config, queries, bidirectional=False) if config.time_bias else None
        self.position_bias = LearnedPositionBias(queries, bidirectional=False) if config.position_bias else None
        self.output = nn.Linear(width, width, bias=False)

    def keys_and_values(self, x: Tensor) -> Tensor:
        """x [n, d] → [n, 2, H, d/H]."""
        return self.key_value(self.norm(x)).view(x.shape[0], 2, self.heads, x.shape[1] // self.heads)

    def context(self, x: Tensor, offsets: Tensor, timestamps: Tensor) -> SourceContext:
        keys, values = self.keys_and_values(x).unbind(1)
        return SourceContext(keys, values, offsets, timestamps)

    def forward(self, context: SourceContext, plan: AttentionPlan) -> Tensor:
        """plan: of Q queries, see `plan_pooling` → [Q, m, d]; zeros for a user without events."""
        seeds, width = self.seeds.shape
        queries = self.seeds.view(seeds, self.heads, -1).transpose(0, 1).reshape(seeds * self.heads, -1)  # [H · m, d/H]
        queries = queries.expand(plan.total_q, *queries.shape)
        pooled = context.attend(queries, plan, self.time_bias, self.position_bias)
        pooled = pooled.view(-1, self.heads, seeds, width // self.heads).transpose(1, 2)
        return self.output(pooled.reshape(-1, seeds, width))
