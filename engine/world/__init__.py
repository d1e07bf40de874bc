"""The synthetic ads world: an event log with a planted truth, for the demo, the tests and the benchmarks."""

from alure.engine.world.build import World, build_world

__all__ = ["World", "build_world"]
