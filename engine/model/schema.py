"""What of an event log the user model depends on, and the checks that a log fits a model."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from alure.engine.config import ModelConfig
from alure.engine.errors import InputError

if TYPE_CHECKING:
    from alure.engine.events import Manifest


class EventSchema(BaseModel):
    """Sources and columns a model reads. Two logs of one schema can be read by one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[str, ...]
    event_types: tuple[str, ...] = ()
    has_accounts: bool = False
    has_categories: bool = False
    dense_dim: int = Field(0, description="width of the items' content vectors, 0 = none")
    semantic_levels: int = Field(0, description="levels of the items' semantic ids, 0 = none")
    event_dense_dims: dict[str, int] = Field(default_factory=dict, description="source: width of its events' vectors")
    event_semantic_levels: dict[str, int] = Field(default_factory=dict, description="source: levels of its events")

    @classmethod
    def of(cls, manifest: "Manifest") -> "EventSchema":
        return cls(
            sources=tuple(manifest.sources),
            event_types=tuple(manifest.event_types),
            has_accounts=manifest.num_accounts > 0,
            has_categories=manifest.num_categories > 0,
            dense_dim=manifest.dense_dim,
            semantic_levels=manifest.semantic_levels,
            event_dense_dims=manifest.event_dense_dims,
            event_semantic_levels=manifest.event_semantic_levels,
        )

    @property
    def item_attributes(self) -> tuple[str, ...]:
        """The hashed ids of one item, in the order of `Catalog.item_rows`."""
        names = ["item", "item_again"]
        names += ["account"] if self.has_accounts else []
        names += ["category"] if self.has_categories else []
        return (*names, *(f"semantic_{level}" for level in range(self.semantic_levels)))

    def event_attributes(self, source: str) -> tuple[str, ...]:
        """The hashed ids of one event of `source`, in the order of `Catalog.event_rows` and the encoder's weights."""
        own = self.event_semantic_levels.get(source, 0)
        types = ("event_type",) if self.event_types else ()
        return (*self.item_attributes, *types, *(f"event_semantic_{level}" for level in range(own)))

    def event_dense_dim(self, source: str) -> int:
        """Width of an event's content: its item's vector and its own."""
        return self.dense_dim + self.event_dense_dims.get(source, 0)

    def check_log(self, other: "EventSchema") -> None:
        """Raise InputError unless a model of this schema can read a log of schema `other`; names every difference.

        The log may lack event types the model knows; it must have the model's sources, and columns of their shapes.
        """
        problems = []
        if set(self.sources) != set(other.sources):
            problems.append(
                f"sources: the model knows {', '.join(self.sources)}; the log has {', '.join(other.sources)}"
            )
        new_types = sorted(set(other.event_types) - set(self.event_types))
        if new_types:
            known = ", ".join(self.event_types) or "none"
            problems.append(f"event_types: the model knows {known}; the log also has {', '.join(new_types)}")
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name not in ("sources", "event_types") and mine != theirs:
                problems.append(f"{name}: the model was trained with {mine}, the log has {theirs}")
        if problems:
            listed = "\n  ".join(problems)
            raise InputError(
                f"event log: it does not fit the model:\n  {listed}\ntrain a model on this log (alure train), "
                "or ingest it with the sources and columns of the model"
            )


def module_plan(config: ModelConfig, schema: EventSchema) -> dict[str, list[int]]:
    """source: its tapped layers, counted from 1, ascending. Untapped sources are left out, and not heard by others.

    Raises InputError where the configuration names a source or a layer that does not exist, or an exchange is of none.
    """
    known = ", ".join(schema.sources)
    unknown = sorted(set(config.sources) - set(schema.sources))
    if unknown:
        raise InputError(f"model.sources: the event log has no source {', '.join(unknown)}; it has {known}")
    depth = {name: _depth(config, name) for name in schema.sources}
    plan = {name: list(range(1, depth[name] + 1)) for name in schema.sources}
    if config.taps is not None:
        plan = _tapped(config.taps, depth)
    if config.exchange and (len(plan) < 2 or max(layers[-1] for layers in plan.values()) < 2):
        raise InputError(
            "model.exchange: expected two sources and two layers or more, as sources exchange between layers; got "
            + ", ".join(f"{name} to layer {layers[-1]}" for name, layers in plan.items())
        )
    return plan


def _tapped(taps: list[tuple[int, str]], depth: dict[str, int]) -> dict[str, list[int]]:
    plan: dict[str, set[int]] = {}
    for layer, source in taps:
        if source not in depth:
            raise InputError(f"model.taps: the event log has no source {source!r}; it has {', '.join(depth)}")
        if not 1 <= layer <= depth[source]:
            raise InputError(f"model.taps: {source} has layers 1 to {depth[source]}, got layer {layer}")
        plan.setdefault(source, set()).add(layer)
    if not plan:
        raise InputError("model.taps: expected at least one (layer, source) pair, got none")
    return {name: sorted(plan[name]) for name in depth if name in plan}


def _depth(config: ModelConfig, source: str) -> int:
    own = config.sources.get(source)
    return config.layers if own is None or own.layers is None else own.layers
