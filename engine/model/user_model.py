"""`UserModel`: event histories to user embeddings. The half of a checkpoint that the batch refresh runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alure.engine.config import ModelConfig
from alure.engine.errors import InputError, refuse_s3
from alure.engine.events import EventBatch, Events
from alure.engine.model.alignment import turn
from alure.engine.model.catalog import Catalog
from alure.engine.model.checkpoint import fill, read_checkpoint
from alure.engine.model.compression import make_compression
from alure.engine.model.layers import Exchange, SourceContext, run_together, summarize
from alure.engine.model.prepared import (
    PreparedBatch,
    PreparedSource,
    ValueKind,
    in_layers,
    names_of,
    number_rows,
    plan_together,
    prepare_source,
)
from alure.engine.model.schema import EventSchema, module_plan
from alure.engine.model.stack import SourceStack
from alure.engine.ranges import op
from alure.kernels import AttentionPlan
from alure.kernels.compression import InteractionPlan, normalize_int8


class UserState(NamedTuple):
    """What the model knows of a batch of users."""

    embeddings: Tensor  # [B, k, d], each of length 1
    contexts: dict[str, SourceContext]  # the deepest tokens of each source that has any, for context queries


class Stream:
    """One source's tokens on their way through its stack. Users without events in the source cost nothing."""

    def __init__(self, stack: SourceStack, tokens: Tensor, source: PreparedSource) -> None:
        self.stack, self.tokens, self.source = stack, tokens, source
        self.pooled: list[Tensor] = []  # [B, m, d] a tap; of every event [n, m, d]
        self.context: SourceContext | None = None  # of the last tap

    def pool(self, depth: int) -> None:
        """What the tap after layer `depth` sees, where there is one."""
        tap = self.stack.tap(depth)
        if tap is None:
            return
        context = tap.context(self.tokens, self.source.events.offsets, self.source.events.timestamps)
        pooled = tap(context, self.source.pooling)
        self.pooled.append(pooled if self.source.every_event else self.source.spread(pooled))
        self.context = context

    def summary(self) -> Tensor:
        """[B, d], zeros for users without events in the source."""
        return self.source.spread(summarize(self.tokens, self.source.offsets))

    def hear(self, exchange: Exchange, summaries: dict[str, Tensor]) -> None:
        """The tokens after an exchange, of the summaries of the sources that have any events."""
        silent = self.tokens.new_zeros(self.source.users, self.tokens.shape[1])
        others = torch.stack([summaries.get(source, silent) for source in self.stack.others], dim=1)
        self.tokens = exchange(self.tokens, self.source.offsets, self.source.of_present(others))


class UserModel(nn.Module):
    """K sources × L layers of jagged attention over CFEE tokens; taps; compression to k unit embeddings a user.

    rotations: float32 [k, d, d] that turn its embeddings onto another model's space, None where there are none.
    digest, space: of the checkpoint that it was loaded from, whatever lies there by now; "" where it was not.
    """

    rotations: Tensor | None
    digest, space = "", ""

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
        model.digest = config.digest()
        model.space = config.space or model.digest
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

    def value_kind(self) -> ValueKind:
        """Of the queries, keys and values of its layers and taps."""
        return ValueKind(self.device, torch.bfloat16 if self.mixed_precision else self.dtype)

    def autocast(self) -> torch.autocast:
        """bfloat16 products over float32 weights, where `mixed_precision` is on."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision)

    def catalog(self, events: Events, device: torch.device | None = None) -> Catalog:
        """What `prepare` and `forward` need of a log's items, on `device` (default: the model's).

        InputError where the log does not fit the model.
        """
        self.schema.check_log(EventSchema.of(events.manifest))
        return Catalog.of(events, self.config.hash_rows).to(self.device if device is None else device)

    def sources(self) -> Iterator[SourceStack]:
        """The module stack of every source, in the order of the schema."""
        for stack in self.stacks:
            assert isinstance(stack, SourceStack)
            yield stack

    def prepare(self, batch: EventBatch, catalog: Catalog, event_times: Tensor | None = None) -> PreparedBatch:
        """The batch with all that a forward pass must read of its values read and checked: that then only launches.

        Done where batch and catalog are; on the host for a model on a GPU, where the batch is `moved` to afterwards.
        event_times int64 [n]: of `encode_events`. Values out of range raise as in `alure.kernels`.
        """
        with op("plan"):
            stacks = [stack for stack in self.sources() if batch.sequences[stack.source].total]
            rows = {s.source: catalog.event_rows(s.source, batch.sequences[s.source]) for s in stacks}
            table_rows, num_rows = None, self.table.shape[0]
            if self._gathers() and rows:
                table_rows, rows = number_rows(num_rows, rows)
                num_rows = table_rows.shape[0]
            kind = self.value_kind()
            sources = {
                s.source: prepare_source(s, batch, catalog, rows[s.source], num_rows, event_times, kind) for s in stacks
            }
            layers: dict[tuple[str, ...], AttentionPlan] = {}
            for _, groups in in_layers(stacks):
                for together in groups:
                    names, of_each = names_of(together), [sources[stack.source] for stack in together]
                    layers[names] = layers.get(names) or plan_together(together, of_each, self.config.causal, kind)
            compression = self.compression.plan(len(batch), batch.as_of.device)
            return PreparedBatch(len(batch), sources, layers, compression, table_rows)

    def forward(self, batch: EventBatch | PreparedBatch, catalog: Catalog) -> Tensor:
        """Embeddings [B, k, d] of the batch's users at batch.as_of. A user with no events has a finite one too."""
        return self.encode(batch, catalog).embeddings

    def pool(self, batch: EventBatch | PreparedBatch, catalog: Catalog) -> Tensor:
        """[B, n, d]: what all taps find, which `compress` makes the embeddings of."""
        return self._pooled(self._run(self._prepared(batch, catalog), catalog), len(batch))

    def forward_int8(self, batch: EventBatch | PreparedBatch, catalog: Catalog) -> tuple[Tensor, Tensor]:
        """`forward` in bytes: codes int8 [B, k, d] and scales float32 [B, k], see `alure.kernels.compress_int8`."""
        batch = self._prepared(batch, catalog)
        return self.compress_int8(self.pool(batch, catalog), batch.compression)

    def compress(self, pooled: Tensor, plan: InteractionPlan | None = None) -> Tensor:
        """Embeddings [B, k, d] of what all taps pooled, [B, n, d]. plan: of the prepared batch."""
        with op("compress"):
            return turn(self.compression(pooled, plan), self.rotations)

    def compress_int8(self, pooled: Tensor, plan: InteractionPlan | None = None) -> tuple[Tensor, Tensor]:
        """`compress` in bytes."""
        with op("compress"):
            if self.rotations is None:
                return self.compression.forward_int8(pooled, plan)
            return normalize_int8(turn(self.compression(pooled, plan), self.rotations))

    def encode(self, batch: EventBatch | PreparedBatch, catalog: Catalog) -> UserState:
        """Embeddings, and the tokens that context queries attend to."""
        batch = self._prepared(batch, catalog)
        streams = self._run(batch, catalog)
        contexts = {source: stream.context for source, stream in streams.items() if stream.context is not None}
        return UserState(self.compress(self._pooled(streams, len(batch)), batch.compression), contexts)

    def encode_events(self, batch: EventBatch, catalog: Catalog, event_times: Tensor) -> Tensor:
        """The embedding after every event: [n, k, d], what `forward` gives of the events up to it, in one pass.

        event_times int64 [n]: the time T each of them is an embedding of, from its event's time to the next one's.
        Only for models of which every event is encoded once for all later times: see `check_every_event`.
        """
        check_every_event(self.config, self.schema)
        (stream,) = self._run(self.prepare(batch, catalog, event_times), catalog).values()
        return self.compress(torch.cat(stream.pooled, dim=1))

    def _prepared(self, batch: EventBatch | PreparedBatch, catalog: Catalog) -> PreparedBatch:
        return batch if isinstance(batch, PreparedBatch) else self.prepare(batch, catalog)

    def _gathers(self) -> bool:
        """Whether the rows that a batch reads are gathered first, so that the table's gradient is sparse."""
        return torch.is_grad_enabled() and self.table.requires_grad

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

    def _run(self, batch: PreparedBatch, catalog: Catalog) -> dict[str, Stream]:
        """The batch's events through encoders, layers and taps, by source; sources without any are left out."""
        with op("encode"):
            streams = self._encode(batch, catalog)
        with self.autocast():
            self._run_layers(streams, batch.layers)
        return streams

    def _encode(self, batch: PreparedBatch, catalog: Catalog) -> dict[str, Stream]:
        table = self.table if batch.table_rows is None else F.embedding(batch.table_rows, self.table, sparse=True)
        streams: dict[str, Stream] = {}
        for stack in self.sources():
            if stack.source in batch.sources:
                source = batch.sources[stack.source]
                tokens = stack.encoder(source.events, table, catalog.content(source.items, source.dense))
                streams[stack.source] = Stream(stack, tokens, source)
        return streams

    def _run_layers(self, streams: dict[str, Stream], plans: dict[tuple[str, ...], AttentionPlan]) -> None:
        for depth, groups in in_layers([stream.stack for stream in streams.values()]):
            for stacks in groups:
                together = [streams[stack.source] for stack in stacks]
                layers, plan = [stack.layer(depth) for stack in stacks], plans[names_of(stacks)]
                found = run_together(layers, [stream.tokens for stream in together], plan)
                with op("pool"):
                    for stream, tokens in zip(together, found):
                        stream.tokens = tokens
                        stream.pool(depth)
            if self.config.exchange:
                with op("exchange"):
                    exchange_after(depth, list(streams.values()))


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
    unique, numbered = number_rows(table.shape[0], rows)
    return F.embedding(unique, table, sparse=True), numbered
