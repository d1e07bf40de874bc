"""Pooling from cached keys and values: of a history that grew, only the new events run through the layers.

For models in which an event's token never changes again: it sees no later events and does not count from the snapshot
time (`check_reusable`). The taps look at all events from the snapshot time anyhow, so an embedding of cached and new
events is that of the whole history up to rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alure.engine.config import ModelConfig
from alure.engine.errors import InputError
from alure.engine.events import EventBatch, EventSequence
from alure.engine.model.catalog import Catalog
from alure.engine.model.layers import SourceContext, bias_tensors
from alure.engine.model.prepared import event_columns, plan_pooling
from alure.engine.model.stack import SourceStack
from alure.engine.model.user_model import UserModel, snapshot_bound
from alure.engine.ranges import op
from alure.kernels import AttentionPlan, jagged_attention

_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # SplitMix64's, as int64


class KeyValues(NamedTuple):
    """Of one source: the keys and values of all events, of which those of the first ones of each user are there.

    values [n, C]: k and v, d wide each, of the layers in order, then of the taps; C = 2d(layers + taps). Rows of events
    that are not cached may hold anything.
    """

    cached: Tensor  # int64 [B]
    values: Tensor


def check_reusable(config: ModelConfig) -> None:
    """Raise InputError unless keys and values of a history stay as they are when it grows."""
    problems = snapshot_bound(config)
    if problems:
        listed = "\n  ".join(problems)
        raise InputError(f"refresh.kv_cache: keys and values of this model change with every new event:\n  {listed}")


def key_value_width(stack: SourceStack, width: int) -> int:
    """C, values an event of this source."""
    return 2 * width * (len(stack.layers) + len(stack.taps))


def extend(model: UserModel, batch: EventBatch, catalog: Catalog, known: Mapping[str, KeyValues]) -> Tensor:
    """What the taps find in whole histories, [B, n, d]; writes the keys and values that `known` lacks into it."""
    pooled: list[Tensor] = []
    for stack in model.sources():
        growth = Growth.of(batch.sequences[stack.source], known[stack.source])
        pooled += _extend_source(model, stack, growth, catalog, batch.as_of)
    return torch.cat(pooled, dim=1)


@dataclass(frozen=True)
class Growth:
    """The events of one source as they are now, and which of them are new. rows: of the new ones, int64 or all."""

    sequence: EventSequence
    known: KeyValues
    tail: Tensor  # bool [n], the new events and the one before them
    is_new: Tensor  # bool [n]
    rows: Tensor | slice

    @classmethod
    def of(cls, sequence: EventSequence, known: KeyValues) -> "Growth":
        users, places = sequence.places()
        cached = known.cached[users]
        is_new = places >= cached
        rows = is_new.nonzero().squeeze(1) if bool((known.cached > 0).any()) else slice(None)
        return cls(sequence, known, places >= cached - 1, is_new, rows)

    def tokens(self, model: UserModel, stack: SourceStack, catalog: Catalog, reference_times: Tensor) -> Tensor:
        """[new events, d]: they are encoded with the event before them, whose time they look at."""
        events = self.sequence.where(self.tail)
        columns = event_columns(events, catalog.event_rows(stack.source, events), reference_times)
        tokens: Tensor = stack.encoder(columns, model.table, catalog.event_dense(stack.source, events))
        return tokens[self.is_new[self.tail]]

    def plan(self, stack: SourceStack) -> AttentionPlan:
        """Each new event looks at all before it."""
        layer, sequence = stack.layer(1), self.sequence
        new_lengths = sequence.lengths - self.known.cached
        return AttentionPlan(
            torch.cat([sequence.offsets[:1], new_lengths.cumsum(0)]),
            sequence.offsets,
            q_timestamps=sequence.timestamps[self.rows] if layer.time_bias else None,
            k_timestamps=sequence.timestamps if layer.time_bias else None,
            causal=True,
            window_size=stack.window,
            **bias_tensors(layer.time_bias, layer.position_bias, sequence.offsets.device),
        )

    def keep(self, new: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """new [new events, 2, H, d/H] go into place `at`; (keys, values) of all events [n, H, d/H]."""
        width = new.shape[1:].numel()
        columns = self.known.values[:, width * at : width * (at + 1)]
        columns[self.rows] = new.flatten(1)
        keys, values = columns.view(-1, *new.shape[1:]).unbind(1)
        return keys, values


def _extend_source(
    model: UserModel, stack: SourceStack, growth: Growth, catalog: Catalog, reference_times: Tensor
) -> list[Tensor]:
    """What each tap of the source finds, [B, m, d]."""
    sequence = growth.sequence
    with op("encode"):
        tokens = growth.tokens(model, stack, catalog, reference_times)
    with op("plan"):
        plan = growth.plan(stack)
        pooling = plan_pooling(stack, sequence.offsets, sequence.timestamps, reference_times, False, model.value_kind())
    pooled: list[Tensor] = []
    for depth in range(1, len(stack.layers) + 1):
        layer = stack.layer(depth)
        with op("project"):
            projected = layer.project(tokens)
            keys, values = growth.keep(projected[:, 1:], depth - 1)
        with op("attention"):
            time_bias, position_bias = layer.time_bias, layer.position_bias
            attended = jagged_attention(
                projected[:, 0],
                keys,
                values,
                plan=plan,
                time_bias=time_bias(plan) if time_bias else None,
                position_bias=position_bias(plan) if position_bias else None,
            )
        with op("feed_forward"):
            tokens = layer.finish(tokens, attended)
        tap = stack.tap(depth)
        if tap is not None:
            with op("pool"):
                of_tap = growth.keep(tap.keys_and_values(tokens), len(stack.layers) + len(pooled))
                pooled.append(tap(SourceContext(*of_tap, sequence.offsets, sequence.timestamps), pooling))
    return pooled


class EventHashes:
    """64-bit hashes of what the model reads of each event of a source, for fingerprints of the first events."""

    def __init__(self, catalog: Catalog, source: str, sequence: EventSequence) -> None:
        self.users, self.places = sequence.places()
        columns = [*catalog.event_rows(source, sequence).unbind(1), sequence.timestamps, sequence.counts]
        columns += [] if sequence.utc_offsets is None else [sequence.utc_offsets]
        hashes = _mix(self.places)
        for column in columns:
            hashes = _mix(hashes ^ column)
        dense = catalog.event_dense(source, sequence)
        if dense is not None:
            bits = dense.to(torch.float32).contiguous().view(torch.int32).to(torch.int64)
            weights = _mix(torch.arange(bits.shape[1], device=bits.device)) | 1
            hashes = _mix(hashes ^ (bits * weights).sum(1))
        self.hashes, self.size = hashes, sequence.lengths.shape[0]

    def of_first(self, lengths: Tensor) -> Tensor:
        """int64 [B]: a fingerprint of the first lengths[b] events of each user."""
        counted = torch.where(self.places < lengths[self.users], self.hashes, 0)
        return counted.new_zeros(self.size).index_add(0, self.users, counted)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 wraps around."""
    x = x + _MIX[0]
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[1]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[2]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
