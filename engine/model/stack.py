"""`SourceStack`: the modules of one source."""

from collections.abc import Iterator

from torch import nn

from alure.engine.config import ModelConfig
from alure.engine.model.encoder import SourceEncoder
from alure.engine.model.layers import AttentionLayer, Exchange, Tap
from alure.engine.model.schema import EventSchema


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

    def each_tap(self) -> Iterator[Tap]:
        for found in self.taps.values():
            assert isinstance(found, Tap)
            yield found

    def exchange(self, depth: int) -> Exchange | None:
        """What is between layer `depth` and the next one."""
        if depth > len(self.exchanges):
            return None
        found = self.exchanges[depth - 1]
        assert isinstance(found, Exchange)
        return found
