"""`UserModel`: event histories to user embeddings. The half of a checkpoint that the batch refresh runs."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alure.engine.config import ModelConfig
from alure.engine.errors import InputError, refuse_s3
from alure.engine.events import EventBatch, Events, EventSequence
from alure.engine.model.alignment import turn
from alure.engine.model.catalog import Catalog
from alure.engine.model.checkpoint import fill, read_checkpoint
from alure.engine.model.compression import make_compression
from alure.engine.model.encoder import SourceEncoder
from alure.engine.model.layers import AttentionLayer, Exchange, SourceContext, Tap, run_together, summarize
from alure.engine.model.schema import EventSchema, module_plan
from alure.engine.ranges import op
from alure.kernels import AttentionPlan
from alure.kernels.compression import normalize_int8


class UserState(NamedTuple):
    """What the model knows of a batch of users."""

    embeddings: Tensor  # [B, k, d], each of length 1
    contexts: dict[str, SourceContext]  # the deepest tokens of each source that has any, for context queries


class SourceStack(nn.Module):
    """One source's own encoder, layers and taps; with model.exchange what it hears of the `others` between layers."""

    def __init__(
        self, config: ModelConfig, schema: EventSchema, source: str, tapped: list[int], others: list[str]
    ) -> None:
        super().__init__()
        own = config.sources.get(source)
        heads = own.heads if own and own.heads else config.heads
        window = own.window if own and own.window else config.window
        self.source, self.heads = source, heads
        self.window = None if window is None else (window, 0 if config.causal else window)
        self.encoder = SourceEncoder(config, len(schema.event_attributes(source)), schema.event_dense_dim(source))
        self.layers = nn.ModuleList(AttentionLayer(config, heads) for _ in range(tapped[-1]))
        self.taps = nn.ModuleDict({str(layer): Tap(config, heads) for layer in tapped})
        self.others = others
        self.exchanges = nn.ModuleList(Exchange(config, len(others)) for _ in self.layers[1:] if config.exchange)

    def layer(self, depth: int) -> AttentionLayer:
        found = self.layers[depth - 1]
        assert isinstance(found, AttentionLayer)
        return found

    def tap(self, depth: int) -> Tap | None:
        if str(depth) not in self.taps:
            return None
        found = self.taps[str(depth)]
        assert isinstance(found, Tap)
        return found

    def exchange(self, depth: int) -> Exchange | None:
        """What is between layer `depth` and the next one."""
        if depth > len(self.exchanges):
            return None
        found = self.exchanges[depth - 1]
        assert isinstance(found, Exchange)
        return found


class Stream:
    """One source's tokens on their way through its stack. Users without events in the source cost nothing."""

    def __init__(
        self,
        stack: SourceStack,
        tokens: Tensor,
        sequence: EventSequence,
        reference_times: Tensor,
        event_times: Tensor | None = None,
    ) -> None:
        self.stack, self.tokens, self.sequence, self.event_times = stack, tokens, sequence, event_times
        self.users = reference_times.shape[0]
        self.present = sequence.lengths.nonzero().squeeze(1)
        self.offsets = torch.cat([sequence.offsets[self.present], sequence.offsets[-1:]])
        self.snapshot_times = reference_times[self.present]
        self.pooled: list[Tensor] = []  # [B, m, d] a tap; with event_times [n, m, d]
        self.context: SourceContext | None = None  # of the last tap

    def pool(self, depth: int) -> None:
        """What the tap after layer `depth` sees, where there is one."""
        tap = self.stack.tap(depth)
        if tap is None:
            return
        context = tap.context(self.tokens, self.offsets, self.sequence.timestamps)
        if self.event_times is not None:
            self.pooled.append(tap.at_every_event(context, self.event_times))
            return
        self.pooled.append(spread(tap(context, self.snapshot_times), self.present, self.users))
        self.context = context._replace(offsets=self.sequence.offsets)

    def summary(self) -> Tensor:
        """[B, d], zeros for users without events in the source."""
        return spread(summarize(self.tokens, self.offsets), self.present, self.users)

    def hear(self, exchange: Exchange, summaries: dict[str, Tensor]) -> None:
        """The tokens after an exchange, of the summaries of the sources that have any events."""
        silent = self.tokens.new_zeros(self.users, self.tokens.shape[1])
        others = torch.stack([summaries.get(source, silent) for source in self.stack.others], dim=1)
        self.tokens = exchange(self.tokens, self.offsets, others[self.present])


def plan_together(streams: list[Stream], causal: bool) -> AttentionPlan:
    """Self-attention of the streams, one after another, as one batch; each is a group with its own window and bias."""
    starts = [0, *itertools.accumulate(int(stream.offsets[-1]) for stream in streams)]
    begins = [stream.offsets[:-1] + start for stream, start in zip(streams, starts)]
    end = begins[0].new_tensor([starts[-1]])
    groups = torch.arange(len(streams), device=end.device)
    layer = streams[0].stack.layer(1)
    return AttentionPlan(
        torch.cat([*begins, end]),
        q_timestamps=torch.cat([stream.sequence.timestamps for stream in streams]) if layer.time_bias else None,
        time_thresholds=layer.time_bias.thresholds if layer.time_bias else None,
        position_thresholds=layer.position_bias.thresholds if layer.position_bias else None,
        periods=layer.time_bias.periods if layer.time_bias else None,
        causal=causal,
        window_size=[stream.stack.window for stream in streams],
        groups=groups.repeat_interleave(groups.new_tensor([len(begin) for begin in begins])),
    )


def spread(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, …] with x at `rows`, increasing, and zeros elsewhere."""
    return x if rows.shape[0] == count else x.new_zeros(count, *x.shape[1:]).index_copy(0, rows, x)


class UserModel(nn.Module):
    """K sources × L layers of jagged attention over CFEE tokens; taps; compression to k unit embeddings a user.

    rotations: float32 [k, d, d] that turn its embeddings onto another model's space, None where there are none.
    """

    rotations: Tensor | None

    def __init__(self, config: ModelConfig, schema: EventSchema) -> None:
        super().__init__()
        self.config, self.schema = config, schema
        self.mixed_precision = False  # layers and taps in bfloat16 under autocast, over float32 weights
        self.table = nn.Parameter(torch.randn(config.hash_rows, config.attribute_width) * config.attribute_width**-0.5)
        plan = module_plan(config, schema)
        self.stacks = nn.ModuleList(
            SourceStack(config, schema, source, tapped, [other for other in plan if other != source])
            for source, tapped in plan.items()
        )
        self.num_taps = sum(len(tapped) for tapped in plan.values())
        self.compression = make_compression(config, self.num_taps * config.seeds)
        self.register_buffer("rotations", None)

    @classmethod
    def load(cls, path: Path | str) -> "UserModel":
        """The user half of the checkpoint folder `path`, for inference; heads and ad tower are not read.

        Raises InputError where the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration.
        """
        refuse_s3(Path(path), "model")
        config, tensors = read_checkpoint(Path(path), "user")
        with torch.random.fork_rng(devices=[]):  # the start values are replaced at once
            model = cls(config.model, config.events)
        model.align(tensors.get("rotations"))
        fill(model, tensors, f"model: {path}")
        return model.eval().requires_grad_(False)

    def align(self, rotations: Tensor | None) -> None:
        """Turn slot s of every embedding by rotations[s], orthogonal [k, d, d]; None: leave them as trained."""
        k, d = self.config.num_embeddings, self.config.width
        if rotations is not None and rotations.shape != (k, d, d):
            raise ValueError(f"rotations: expected [{k}, {d}, {d}], got {list(rotations.shape)}")
        self.rotations = None if rotations is None else rotations.to(self.device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "UserModel":
        """What moves or casts a module. The rotations only move: in bfloat16 they would not be orthogonal."""
        rotations, self.rotations = self.rotations, None
        super()._apply(fn, recurse)
        self.align(rotations)
        return self

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision)

    def catalog(self, events: Events) -> Catalog:
        """What `forward` needs of a log's items; InputError where the log does not fit the model."""
        self.schema.check_log(EventSchema.of(events.manifest))
        return Catalog.of(events, self.config.hash_rows).to(self.device)

    def sources(self) -> Iterator[SourceStack]:
        for stack in self.stacks:
            assert isinstance(stack, SourceStack)
            yield stack

    def forward(self, batch: EventBatch, catalog: Catalog) -> Tensor:
        """Embeddings [B, k, d] of the batch's users at batch.as_of. A user with no events has a finite one too."""
        return self.encode(batch, catalog).embeddings

    def pool(self, batch: EventBatch, catalog: Catalog) -> Tensor:
        """[B, n, d]: what all taps find, which `compress` makes the embeddings of."""
        return self._pooled(self._run(batch, catalog), len(batch))

    def forward_int8(self, batch: EventBatch, catalog: Catalog) -> tuple[Tensor, Tensor]:
        """`forward` in bytes: codes int8 [B, k, d] and scales float32 [B, k], see `alure.kernels.compress_int8`."""
        return self.compress_int8(self.pool(batch, catalog))

    def compress(self, pooled: Tensor) -> Tensor:
        """Embeddings [B, k, d] of what all taps pooled, [B, n, d]."""
        with op("compress"):
            return turn(self.compression(pooled), self.rotations)

    def compress_int8(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """`compress` in bytes."""
        with op("compress"):
            if self.rotations is None:
                return self.compression.forward_int8(pooled)
            return normalize_int8(turn(self.compression(pooled), self.rotations))

    def encode(self, batch: EventBatch, catalog: Catalog) -> UserState:
        """Embeddings, and the tokens that context queries attend to."""
        streams = self._run(batch, catalog)
        contexts = {source: stream.context for source, stream in streams.items() if stream.context is not None}
        return UserState(self.compress(self._pooled(streams, len(batch))), contexts)

    def encode_events(self, batch: EventBatch, catalog: Catalog, event_times: Tensor) -> Tensor:
        """The embedding after every event: [n, k, d], what `forward` gives of the events up to it, in one pass.

        event_times int64 [n]: the time T each of them is an embedding of, from its event's time to the next one's.
        Only for models of which every event is encoded once for all later times: see `check_every_event`.
        """
        check_every_event(self.config, self.schema)
        (stream,) = self._run(batch, catalog, event_times).values()
        return self.compress(torch.cat(stream.pooled, dim=1))

    def _pooled(self, streams: dict[str, Stream], users: int) -> Tensor:
        """What all taps pooled: [B, n, d], zeros of the sources without events."""
        pooled: list[Tensor] = []
        for stack in self.sources():
            if stack.source in streams:
                pooled += streams[stack.source].pooled
            else:
                shape = (users, self.config.seeds, self.config.width)
                pooled += [self.table.new_zeros(shape) for _ in stack.taps]
        return torch.cat(pooled, dim=1)

    def _run(self, batch: EventBatch, catalog: Catalog, event_times: Tensor | None = None) -> dict[str, Stream]:
        """The batch's events through encoders, layers and taps, by source; sources without any are left out."""
        with op("encode"):
            streams = self._encode(batch, catalog, event_times)
        with self.autocast():
            self._run_layers(list(streams.values()))
        return streams

    def _encode(self, batch: EventBatch, catalog: Catalog, event_times: Tensor | None) -> dict[str, Stream]:
        sequences = {stack.source: batch.sequences[stack.source] for stack in self.sources()}
        rows = {source: catalog.event_rows(source, s) for source, s in sequences.items() if s.total}
        table, rows = gather_rows(self.table, rows)
        streams: dict[str, Stream] = {}
        for stack in self.sources():
            source, sequence = stack.source, sequences[stack.source]
            if sequence.total:
                dense = catalog.event_dense(source, sequence)
                tokens = stack.encoder(rows[source], table, dense, sequence, batch.as_of)
                streams[source] = Stream(stack, tokens, sequence, batch.as_of, event_times)
        return streams

    def _run_layers(self, streams: list[Stream]) -> None:
        """Layer by layer, the sources with the same number of heads together."""
        plans: dict[tuple[str, ...], AttentionPlan] = {}
        for depth in range(1, max((len(stream.stack.layers) for stream in streams), default=0) + 1):
            deep = [stream for stream in streams if depth <= len(stream.stack.layers)]
            for heads in dict.fromkeys(stream.stack.heads for stream in deep):
                together = [stream for stream in deep if stream.stack.heads == heads]
                key = tuple(stream.stack.source for stream in together)
                with op("plan"):
                    plan = plans[key] = plans.get(key) or plan_together(together, self.config.causal)
                layers = [stream.stack.layer(depth) for stream in together]
                found = run_together(layers, [stream.tokens for stream in together], plan)
                with op("pool"):
                    for stream, tokens in zip(together, found):
                        stream.tokens = tokens
                        stream.pool(depth)
            if self.config.exchange:
                with op("exchange"):
                    exchange_after(depth, streams)


def exchange_after(depth: int, streams: list[Stream]) -> None:
    """What the sources tell one another after layer `depth`; one that has no more layers tells what its last found."""
    hearing = [(stream, found) for stream in streams if (found := stream.stack.exchange(depth)) is not None]
    summaries = {stream.stack.source: stream.summary() for stream in streams} if hearing else {}
    for stream, found in hearing:
        stream.hear(found, summaries)


def snapshot_bound(config: ModelConfig) -> list[str]:
    """What makes an event's token depend on the snapshot it is read in; empty where it is one for all later times."""
    problems = []
    if not config.causal:
        problems.append("model.causal: expected true, as an event must not see later ones")
    late = [name for name in ("position", "age") if name in config.encoders]
    if late:
        problems.append(f"model.encoders: expected neither position nor age, which count from T; got {', '.join(late)}")
    return problems


def check_every_event(config: ModelConfig, schema: EventSchema) -> None:
    """Raise InputError unless a model can give an embedding after every event in one pass."""
    problems = snapshot_bound(config)
    if len(schema.sources) != 1:
        problems.append(f"events: expected one source, got {', '.join(schema.sources)}")
    if problems:
        listed = "\n  ".join(problems)
        raise InputError(f"training.labels: an embedding after every event needs another model:\n  {listed}")


def gather_rows(table: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows of `table` that a batch reads, and the batch's ids renumbered to them.

    Under autograd the table's gradient is then sparse: [rows of the batch, d_e] in place of [hash_rows, d_e]
    for every source. Without it the table is used as it is.
    """
    if not (torch.is_grad_enabled() and table.requires_grad) or not rows:
        return table, rows
    used = torch.zeros(table.shape[0] + 1, dtype=torch.bool, device=table.device)
    for ids in rows.values():
        used[ids] = True  # −1, a missing attribute, marks the extra last row
    used[-1] = False
    unique = used.nonzero().squeeze(1)
    number = torch.full_like(used, -1, dtype=torch.int64)
    number[unique] = torch.arange(unique.numel(), device=table.device)
    return F.embedding(unique, table, sparse=True), {name: number[ids] for name, ids in rows.items()}
