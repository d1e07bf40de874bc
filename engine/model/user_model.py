"""`UserModel`: event histories to user embeddings. The half of a checkpoint that the batch refresh runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alure.engine.config import ModelConfig
from alure.engine.events import EventBatch, Events, EventSequence
from alure.engine.model.catalog import Catalog
from alure.engine.model.checkpoint import fill, read_checkpoint
from alure.engine.model.compression import make_compression
from alure.engine.model.encoder import SourceEncoder
from alure.engine.model.layers import AttentionLayer, SourceContext, Tap
from alure.engine.model.schema import EventSchema, module_plan


class UserState(NamedTuple):
    """What the model knows of a batch of users."""

    embeddings: Tensor  # [B, k, d], each of length 1
    contexts: dict[str, SourceContext]  # the deepest tokens of each source that has any, for context queries


class SourceStack(nn.Module):
    """One source's own encoder, layers and taps."""

    def __init__(self, config: ModelConfig, schema: EventSchema, source: str, tapped: list[int]) -> None:
        super().__init__()
        own = config.sources.get(source)
        heads = own.heads if own and own.heads else config.heads
        window = own.window if own and own.window else config.window
        self.source, self.heads = source, heads
        self.encoder = SourceEncoder(config, len(schema.event_attributes(source)), schema.event_dense_dim(source))
        self.layers = nn.ModuleList(AttentionLayer(config, heads, window) for _ in range(tapped[-1]))
        self.taps = nn.ModuleDict({str(layer): Tap(config, heads) for layer in tapped})

    def forward(
        self, tokens: Tensor, sequence: EventSequence, reference_times: Tensor
    ) -> tuple[list[Tensor], SourceContext]:
        """tokens [n, d] → (one [B, m, d] a tap, the last tap's keys and values). Absent users cost nothing."""
        present = sequence.lengths.nonzero().squeeze(1)
        offsets = torch.cat([sequence.offsets[present], sequence.offsets[-1:]])
        snapshot_times = reference_times[present]
        pooled: list[Tensor] = []
        for depth, layer in enumerate(self.layers, start=1):
            tokens = layer(tokens, offsets, sequence.timestamps)
            if str(depth) in self.taps:
                tap = self.taps[str(depth)]
                assert isinstance(tap, Tap)
                context = tap.context(tokens, offsets, sequence.timestamps)
                pooled.append(spread(tap(context, snapshot_times), present, reference_times.shape[0]))
        return pooled, context._replace(offsets=sequence.offsets)


def spread(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, …] with x at `rows`, increasing, and zeros elsewhere."""
    return x if rows.shape[0] == count else x.new_zeros(count, *x.shape[1:]).index_copy(0, rows, x)


class UserModel(nn.Module):
    """K sources × L layers of jagged attention over CFEE tokens; taps; compression to k unit embeddings a user."""

    def __init__(self, config: ModelConfig, schema: EventSchema) -> None:
        super().__init__()
        self.config, self.schema = config, schema
        self.table = nn.Parameter(torch.randn(config.hash_rows, config.attribute_width) * config.attribute_width**-0.5)
        plan = module_plan(config, schema)
        self.stacks = nn.ModuleList(SourceStack(config, schema, source, tapped) for source, tapped in plan.items())
        self.num_taps = sum(len(tapped) for tapped in plan.values())
        self.compression = make_compression(config, self.num_taps * config.seeds)

    @classmethod
    def load(cls, path: Path | str) -> "UserModel":
        """The user half of the checkpoint folder `path`, for inference; heads and ad tower are not read.

        Raises InputError where the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration.
        """
        config, tensors = read_checkpoint(Path(path), "user")
        with torch.random.fork_rng(devices=[]):  # the start values are replaced at once
            model = cls(config.model, config.events)
        fill(model, tensors, f"model: {path}")
        return model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.table.device

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

    def encode(self, batch: EventBatch, catalog: Catalog) -> UserState:
        """Embeddings, and the tokens that context queries attend to."""
        sequences = {stack.source: batch.sequences[stack.source] for stack in self.sources()}
        rows = {source: catalog.event_rows(source, s) for source, s in sequences.items() if s.total}
        table, rows = gather_rows(self.table, rows)
        pooled: list[Tensor] = []
        contexts: dict[str, SourceContext] = {}
        for stack in self.sources():
            source, sequence = stack.source, sequences[stack.source]
            if not sequence.total:
                shape = (len(batch), self.config.seeds, self.config.width)
                pooled += [self.table.new_zeros(shape) for _ in stack.taps]
                continue
            dense = catalog.event_dense(source, sequence)
            tokens = stack.encoder(rows[source], table, dense, sequence, batch.as_of)
            tapped, contexts[source] = stack(tokens, sequence, batch.as_of)
            pooled += tapped
        return UserState(self.compression(torch.cat(pooled, dim=1)), contexts)


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
