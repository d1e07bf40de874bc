"""The one function that every worker runs, in this process, a process of this machine, a Ray actor or a Spark task."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.ranges import marker_of, op, stage
from alure.engine.refresh.embedder import Embedder, Snapshot, UnitResult, UnitTask, Work
from alure.engine.refresh.leases import open_leases
from alure.engine.refresh.memory import freed_memory_kept
from alure.engine.refresh.overlap import Behind
from alure.engine.refresh.planner import Unit
from alure.engine.signals import stop_flag
from alure.engine.store import EmbeddingStore
from alure.engine.store.location import Location

LOOK_AGAIN_S = 0.2  # while others work on all that is left


class Progress(Protocol):
    """Is told of every batch and every unit that is written; a `Work` of its own just sums them up."""

    def add(self, work: Work) -> None: ...


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: paths that it opens for itself, what lay there when the job began, and the work."""

    model: Path
    events: Path
    store: Location
    log: str  # the fingerprint of the event log
    snapshot: Snapshot
    units: list[Unit]


def run_shard(job: Job, device: str, progress: Progress | None = None) -> Work:
    """Open the model, the log and the store, and share the job's units with whoever else does. Raises InputError where
    another model or log has taken the place of the job's.
    """
    with stop_flag("refresh") as flag:
        model, events = UserModel.load(job.model), Events.open(job.events)
        events.hold()
        for path, found, expected in (
            (job.model, model.digest, job.snapshot.model),
            (job.events, events.manifest.fingerprint, job.log),
        ):
            if found != expected:
                raise InputError(
                    f"refresh: {path} is another ({found[:12]}) than when the job began ({expected[:12]}); nothing was "
                    "published. Run again for a generation of what is there now"
                )
        embedder = Embedder(model, events, job.snapshot, torch.device(device))
        return share_units(embedder, EmbeddingStore(job.store), job.units, flag.check, progress or Work())


def share_units(
    embedder: Embedder, store: EmbeddingStore, units: list[Unit], check: Callable[[], None], progress: Progress
) -> Work:
    """Take units that nobody works on until all are written, whoever writes them; returns what was done here.

    check: called between batches; what it raises abandons the unit at hand, which is then done again next time.
    On a GPU the next unit is begun before the last batches of one are there, and this one is written beside it.
    """
    generation, done = embedder.snapshot.generation, Work()
    leases = open_leases(leases_of(store, generation))
    claimed = set[str]()  # by this worker, and not yet handed on to be written

    def after_batch(work: Work) -> None:
        progress.add(replace(work, pending=work.embedded))
        leases.keep()
        check()

    def claim(units: list[Unit]) -> Iterator[UnitTask]:
        written = set[str]()
        for unit in units:
            check()
            if unit.name in written or not leases.claim(unit.name):
                continue
            claimed.add(unit.name)
            written = store.written_units(generation, [unit.name for unit in units])
            if unit.name in written:
                release(unit)
            else:
                yield embedder.begin(unit, store)

    def release(unit: Unit) -> None:
        claimed.discard(unit.name)
        leases.release(unit.name)

    def write(task: UnitTask) -> Work:
        try:
            result = embedder.rows(task)
            refuse_many_bad(embedder.snapshot, done.bad + result.work.bad, result)
            write_unit(store, generation, task.unit, result)
            return result.work
        finally:
            leases.release(task.unit.name)

    def count(work: Work) -> None:
        done.add(work)
        done.units += 1
        progress.add(Work(units=1, bad=work.bad, pending=-work.embedded))

    refreshing = stage("refresh", marker_of(embedder.device))
    with freed_memory_kept(), closing(leases), refreshing, Behind(embedder.depth) as behind:
        try:
            while units:
                with closing(embedder.embed_all(claim(units), after_batch)) as embedded:
                    for task in embedded:
                        behind.wait()
                        claimed.discard(task.unit.name)
                        behind.run(partial(write, task), then=count)
                behind.wait()
                written = store.written_units(generation, [unit.name for unit in units])
                units = [unit for unit in units if unit.name not in written]
                if units:
                    time.sleep(LOOK_AGAIN_S)
        finally:
            for name in claimed:
                leases.release(name)
    return done


def leases_of(store: EmbeddingStore, generation: str) -> Location:
    return store.path / "leases" / generation


def write_unit(store: EmbeddingStore, generation: str, unit: Unit, result: UnitResult) -> None:
    """Exactly once, whoever else writes it: first who is left out, then the rows, whose commit says that it is done."""
    with op("write"):
        if result.bad:
            rows = [json.dumps({"user_id": user}) for user in result.bad]
            store.write_quarantine(f"refresh {generation}", unit.name, rows, "the embedding is not finite")
        store.write_unit(generation, unit.name, result.rows)


def refuse_many_bad(snapshot: Snapshot, bad: int, result: UnitResult) -> None:
    if bad > snapshot.most_bad:
        named = ", ".join(map(str, result.bad[:5]))
        raise AlureError(
            f"refresh: the embeddings of {bad:,} users are not finite, among them {named}; nothing was published. The "
            "model's weights or these users' dense vectors hold NaN, Inf or huge numbers. Up to max_quarantine_share "
            f"of the users ({snapshot.most_bad:,}) are left out and kept in the table quarantine"
        )
