"""A batch with all that the forward pass must read of its values read and checked once, before it.

A GPU computes while the host launches what comes next; a value that is read on the host ends that until it is there. So
offsets and times are checked, users with events found and attention planned beforehand, and what is left only launches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alure.engine.events import EventBatch, EventSequence
from alure.engine.model.catalog import Catalog
from alure.engine.model.layers import bias_tensors
from alure.engine.model.stack import SourceStack
from alure.kernels import AttentionPlan
from alure.kernels.compression import InteractionPlan
from alure.kernels.encoding import CheckedColumns, EventColumns

Move = Callable[[Tensor], Tensor]


class ValueKind(NamedTuple):
    """Of queries, keys and values: where they will be, and their type."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class PreparedSource:
    """One source's events of a batch; at least one user has some."""

    users: int  # B
    events: EventColumns
    items: Tensor | None  # int64 [n], where items have content
    dense: Tensor | None  # float32 [n, dim], the events' own
    present: Tensor | None  # int64 [P], the users that have events; None: all
    offsets: Tensor  # [P + 1], theirs
    pooling: AttentionPlan  # what each tap of the source does
    every_event: bool  # pooled after every event, not at the snapshot

    def spread(self, x: Tensor) -> Tensor:
        """x [P, …] of the present users as [B, …], zeros of the others."""
        return x if self.present is None else x.new_zeros(self.users, *x.shape[1:]).index_copy(0, self.present, x)

    def of_present(self, x: Tensor) -> Tensor:
        """[P, …] of x [B, …]."""
        return x if self.present is None else x[self.present]

    def moved(self, move: Move) -> "PreparedSource":
        items, dense, present = (None if x is None else move(x) for x in (self.items, self.dense, self.present))
        plan, offsets = self.pooling.moved(move), move(self.offsets)
        return PreparedSource(
            self.users, self.events.moved(move), items, dense, present, offsets, plan, self.every_event
        )


@dataclass(frozen=True)
class PreparedBatch:
    """Of `UserModel.prepare`, for its forward pass."""

    users: int  # B
    sources: dict[str, PreparedSource]  # those that have events
    layers: dict[tuple[str, ...], AttentionPlan]  # self-attention of the sources that run together
    compression: InteractionPlan | None
    table_rows: Tensor | None  # rows of the table that ids count, where its gradient is sparse; None: all

    def __len__(self) -> int:
        return self.users

    def moved(self, move: Move) -> "PreparedBatch":
        """The batch elsewhere: `move` gives a tensor's copy there, for the same tensor the same copy."""
        return PreparedBatch(
            self.users,
            {name: source.moved(move) for name, source in self.sources.items()},
            {names: plan.moved(move) for names, plan in self.layers.items()},
            None if self.compression is None else self.compression.moved(move),
            None if self.table_rows is None else move(self.table_rows),
        )


def prepare_source(
    stack: SourceStack,
    batch: EventBatch,
    catalog: Catalog,
    rows: Tensor,
    num_rows: int,
    event_times: Tensor | None,
    kind: ValueKind,
) -> PreparedSource:
    """rows int64 [n, A]: of the attributes in a table of num_rows. event_times int64 [n]: pool after every event."""
    source, sequence = stack.source, batch.sequences[stack.source]
    present = sequence.lengths.nonzero().squeeze(1)
    offsets = torch.cat([sequence.offsets[present], sequence.offsets[-1:]])
    columns = event_columns(sequence, rows, batch.as_of)
    if kind.device.type != "cpu":  # a CPU's kernels check what they read as they read it
        periods = stack.encoder.periods_on(rows.device)
        columns = CheckedColumns(**vars(columns), num_rows=num_rows, periods=periods)
    times = batch.as_of[present] if event_times is None else event_times
    return PreparedSource(
        users=len(batch),
        events=columns,
        items=None if catalog.dense is None else sequence.items,
        dense=sequence.dense if catalog.schema.event_dense_dims.get(source) else None,
        present=None if len(present) == len(batch) else present,
        offsets=offsets,
        pooling=plan_pooling(stack, offsets, sequence.timestamps, times, event_times is not None, kind),
        every_event=event_times is not None,
    )


def event_columns(sequence: EventSequence, rows: Tensor, as_of: Tensor) -> EventColumns:
    """rows int64 [n, A]; as_of int64 [B]."""
    return EventColumns(
        ids=rows,
        offsets=sequence.offsets,
        timestamps=sequence.timestamps,
        reference_times=as_of,
        counts=sequence.counts,
        utc_offsets=sequence.utc_offsets,
    )


def plan_pooling(
    stack: SourceStack, offsets: Tensor, timestamps: Tensor, times: Tensor, every_event: bool, kind: ValueKind
) -> AttentionPlan:
    """Of all taps of a source: from each user's snapshot time [P] to all its events, or from every event's time [n] to
    those up to it.
    """
    tap = next(iter(stack.each_tap()))
    queries = offsets if every_event else torch.arange(len(times) + 1, device=offsets.device)
    plan = AttentionPlan(
        queries,
        offsets,
        q_timestamps=times if tap.time_bias else None,
        k_timestamps=timestamps if tap.time_bias else None,
        causal=every_event,
        **bias_tensors(tap.time_bias, tap.position_bias, offsets.device),
    )
    plan.prepare(kind.dtype, tap.head_dim, kind.device)
    return plan


def plan_together(
    stacks: Sequence[SourceStack], sources: Sequence[PreparedSource], causal: bool, kind: ValueKind
) -> AttentionPlan:
    """Self-attention of the sources, one after another, as one batch; each is a group with its own window and bias."""
    device, layer = sources[0].offsets.device, stacks[0].layer(1)
    totals = [source.events.timestamps.shape[0] for source in sources]
    starts = [sum(totals[:number]) for number in range(len(totals) + 1)]
    begins = [source.offsets[:-1] + start for source, start in zip(sources, starts)]
    groups = torch.arange(len(sources), device=device)
    plan = AttentionPlan(
        torch.cat([*begins, begins[0].new_tensor(starts[-1:])]),
        q_timestamps=torch.cat([source.events.timestamps for source in sources]) if layer.time_bias else None,
        causal=causal,
        window_size=[stack.window for stack in stacks],
        groups=groups.repeat_interleave(groups.new_tensor([len(begin) for begin in begins])),
        **bias_tensors(layer.time_bias, layer.position_bias, device),
    )
    plan.prepare(kind.dtype, layer.head_dim, kind.device)
    return plan


def in_layers(stacks: Sequence[SourceStack]) -> Iterator[tuple[int, list[list[SourceStack]]]]:
    """Layer by layer, from 1 on, the stacks that run it together: those with the same number of heads."""
    for depth in range(1, max((len(stack.layers) for stack in stacks), default=0) + 1):
        deep = [stack for stack in stacks if depth <= len(stack.layers)]
        yield depth, [[stack for stack in deep if stack.heads == heads] for heads in {stack.heads: 0 for stack in deep}]


def names_of(stacks: Sequence[SourceStack]) -> tuple[str, ...]:
    return tuple(stack.source for stack in stacks)


def number_rows(size: int, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows of a table of `size` that a batch reads, and the batch's ids renumbered to them."""
    device = next(iter(rows.values())).device
    used = torch.zeros(size + 1, dtype=torch.bool, device=device)
    for ids in rows.values():
        used[ids] = True  # −1, a missing attribute, marks the extra last row
    used[-1] = False
    unique = used.nonzero().squeeze(1)
    number = torch.full_like(used, -1, dtype=torch.int64)
    number[unique] = torch.arange(unique.numel(), device=device)
    return unique, {name: number[ids] for name, ids in rows.items()}
