"""Refresh in several processes: worker w of W takes units w, w + W, …; the store's commits keep them apart."""

import multiprocessing
import os
import queue
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.refresh.embedder import Embedder, Snapshot, Work
from alure.engine.refresh.planner import Unit
from alure.engine.signals import StopFlag, stop_flag
from alure.engine.store import EmbeddingStore


@dataclass(frozen=True)
class Paths:
    """What each process opens for itself."""

    model: Path
    events: Path
    store: Path


class Progress(Protocol):
    def advance(self, count: int = 1, note: str = "") -> None: ...


def embed_units(embedder: Embedder, store: EmbeddingStore, units: list[Unit], flag: StopFlag, bar: Progress) -> Work:
    """Write every unit; between batches a signal abandons the one at hand, which then is done again next time."""
    done = Work()

    def after_batch(users: int) -> None:
        bar.advance(users)
        flag.check()

    for unit in units:
        flag.check()
        rows, work = embedder.unit_rows(unit, store, after_batch)
        store.write_unit(embedder.snapshot.generation, unit.name, rows)
        done.add(work)
    return done


def run_workers(
    paths: Paths, snapshot: Snapshot, units: list[Unit], devices: list[str], flag: StopFlag, bar: Progress
) -> Work:
    """`embed_units` in one process a device; all stop where one fails. Raises what the first to fail raised."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    processes = [
        context.Process(
            target=_work,
            args=(paths, snapshot, units[index :: len(devices)], device, len(devices), messages),
            daemon=True,
        )
        for index, device in enumerate(devices)
    ]
    for process in processes:
        process.start()
    done, finished = Work(), 0
    try:
        while finished < len(processes):
            flag.check()
            try:
                kind, value = messages.get(timeout=0.5)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode]
                if dead:
                    raise AlureError(
                        f"refresh: a worker died with exit code {dead[0]} (−9: out of memory?); finished "
                        "units are kept, run again with fewer workers or a smaller --token-budget"
                    ) from None
                continue
            if kind == "advance":
                bar.advance(value)
            elif kind == "done":
                done.add(value)
                finished += 1
            else:
                raise _ERRORS[kind](value)
    finally:
        for process in processes:
            if process.is_alive() and finished < len(processes):
                process.terminate()
        _drain(processes, messages)
    return done


def _drain(processes: Sequence[Any], messages: Any) -> None:
    """Wait for all to end; a process ends only once its messages are read."""
    while any(process.is_alive() for process in processes):
        try:
            messages.get(timeout=0.1)
        except queue.Empty:
            continue


_ERRORS: dict[str, type[AlureError]] = {kind.__name__: kind for kind in (AlureError, InputError, Interrupted)}


class Reporter:
    """A worker's progress, told to the parent."""

    def __init__(self, messages: Any) -> None:
        self.messages = messages

    def advance(self, count: int = 1, note: str = "") -> None:
        self.messages.put(("advance", count))


def _work(paths: Paths, snapshot: Snapshot, units: list[Unit], device: str, workers: int, messages: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    try:
        with stop_flag("refresh") as flag:
            model = UserModel.load(paths.model)
            embedder = Embedder(model, Events.open(paths.events), snapshot, torch.device(device))
            work = embed_units(embedder, EmbeddingStore(paths.store), units, flag, Reporter(messages))
        messages.put(("done", work))
    except AlureError as error:
        messages.put((type(error).__name__, str(error)))
        sys.exit(0)  # the parent raises it
