"""RefreshJob: every user of an event log through the model, written unit by unit, published as one generation.

Killed at any moment and run again it ends with the same rows: a unit is a range of users, written in one commit that
carries the unit's name, and a unit whose name is in the store is not done again.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.model import UserModel, model_digest
from alure.engine.progress import say, track
from alure.engine.refresh.embedder import Embedder, Snapshot, Work, resolve_precision
from alure.engine.refresh.planner import Unit, count_events, generation_id, plan_units
from alure.engine.refresh.report import RefreshReport
from alure.engine.refresh.workers import Paths, embed_units, run_workers
from alure.engine.signals import StopFlag, stop_flag
from alure.engine.store import EmbeddingStore, Generation

CALIBRATE_FROM = 16  # batches; shorter jobs are over before an estimate helps
LATEST = 253_402_300_799  # the end of the year 9999, the last that a date can name


class RefreshJob:
    """model, events, store: paths, or the opened things (several workers need paths). The store is made when missing.

    as_of: unix seconds; events after it are not seen (default: the log's last). incremental: users whose events have
    not changed since the newest earlier generation are carried forward from it. workers: processes.
    Running it again after an interruption goes on; a generation that is published already is left as it is.
    """

    def __init__(
        self,
        model: Path | str | UserModel,
        events: Path | str | Events,
        store: Path | str | EmbeddingStore,
        *,
        as_of: int | None = None,
        incremental: bool = False,
        config: RefreshConfig | None = None,
        workers: int = 1,
    ) -> None:
        self.model_path = None if isinstance(model, UserModel) else Path(model)
        self.model = model if isinstance(model, UserModel) else UserModel.load(model)
        self.events = events if isinstance(events, Events) else Events.open(events)
        self.store = store if isinstance(store, EmbeddingStore) else EmbeddingStore(store, create=True)
        self.as_of = self.events.manifest.last_timestamp if as_of is None else as_of
        self.incremental = incremental
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = config or RefreshConfig()
        self.config = config.model_copy(update={"precision": resolve_precision(config.precision, device)})
        self.workers = workers
        if not 0 <= self.as_of <= LATEST:
            raise InputError(f"as_of: expected unix seconds from 0 to {LATEST}, got {self.as_of}; milliseconds?")
        if workers < 1:
            raise InputError(f"workers: expected at least 1, got {workers}")
        if workers > 1 and self.model_path is None:
            raise InputError(
                f"workers: {workers} processes need the model as a path to open, got a UserModel in memory"
            )
        self.digest = memory_digest(self.model) if self.model_path is None else model_digest(self.model_path)

    def run(self) -> RefreshReport:
        """Do what is left to do and publish. Raises Interrupted on SIGTERM or SIGINT, AlureError where it fails."""
        started = time.monotonic()
        snapshot = self._snapshot()
        units = plan_units(self.events.num_users, self.config.unit_users)
        published = self.store.log.find(snapshot.generation, "embeddings")
        if published is not None:
            say(f"refresh: generation {snapshot.generation} is published already, with {published.rows:,} users")
            return self._report(snapshot, published, (units, len(units)), None, started)
        done = self.store.written_units(snapshot.generation, [unit.name for unit in units])
        left = [unit for unit in units if unit.name not in done]
        with stop_flag("refresh") as flag:
            work = self._embed(snapshot, left, len(done), flag)
            self._check_complete(snapshot, units)
            published = self.store.publish(self._generation(snapshot))
        return self._report(snapshot, published, (units, len(done)), work, started)

    def _snapshot(self) -> Snapshot:
        full = generation_id(self.as_of, self.digest, self.events, self.config, None)
        base = None
        if self.incremental and self.store.log.find(full, "embeddings") is None:
            base = self._base()
        generation = generation_id(self.as_of, self.digest, self.events, self.config, base)
        return Snapshot(generation, self.as_of, self.digest, base, self.config)

    def _base(self) -> str | None:
        """The newest generation before as_of; InputError where its rows cannot stand beside this model's."""
        earlier = [g for g in self.store.generations("embeddings") if g.as_of < self.as_of]
        if not earlier:
            say("refresh: no earlier generation to carry users forward from, so every user is embedded")
            return None
        base = earlier[-1]
        if base.model != self.digest:
            raise InputError(
                f"--incremental: generation {base.generation} is of model {base.model[:12]}, this one is "
                f"{self.digest[:12]}; embeddings of two models are never mixed. Run without --incremental"
            )
        for name in ("max_events", "precision"):
            if base.properties.get(name) != getattr(self.config, name):
                raise InputError(
                    f"--incremental: generation {base.generation} has {name} = {base.properties.get(name)}, "
                    f"got {getattr(self.config, name)}; run without --incremental"
                )
        return base.generation

    def _embed(self, snapshot: Snapshot, units: list[Unit], num_done: int, flag: StopFlag) -> Work:
        counts = [count_events(self.events, unit, self.as_of, self.config.max_events) for unit in units]
        users = sum(int((events > 0).sum()) for events, _ in counts)
        tokens = sum(int(t.sum()) for _, t in counts)
        devices = [
            f"cuda:{i % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu" for i in range(self.workers)
        ]
        say(
            f"refresh: generation {snapshot.generation}: {users:,} users with {tokens:,} events in {len(units)} units"
            + (f" ({num_done} more are done)" if num_done else "")
            + f" on {', '.join(sorted(set(devices)))}"
        )
        with track("Embedding users", users, "users") as bar:
            if self.workers > 1 and len(units) > 1 and self.model_path is not None:
                paths = Paths(self.model_path, self.events.path, self.store.path)
                return run_workers(paths, snapshot, units, devices[: len(units)], flag, bar)
            embedder = Embedder(self.model, self.events, snapshot, torch.device(devices[0]))
            if tokens > CALIBRATE_FROM * self.config.token_budget:
                say(f"refresh: about {self._calibrate(embedder, units, counts) * tokens:,.0f} s on one worker")
            return embed_units(embedder, self.store, units, flag, bar)

    def _calibrate(self, embedder: Embedder, units: list[Unit], counts: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Seconds a token, from two batches of users spread evenly over the work, of which the first warms up."""
        users = np.concatenate([np.arange(unit.first, unit.last) for unit in units])
        tokens = np.concatenate([t for _, t in counts])
        users, tokens = users[tokens > 0], tokens[tokens > 0]
        step = max(1, round(2 * tokens.sum() / self.config.token_budget))
        for start in (0, step // 2):
            chosen = slice(start, None, step)
            started = time.monotonic()
            embedder.embed(users[chosen], tokens[chosen], lambda users: None)
        return (time.monotonic() - started) / max(int(tokens[chosen].sum()), 1)

    def _check_complete(self, snapshot: Snapshot, units: list[Unit]) -> None:
        names = {unit.name for unit in units}
        missing = names - self.store.written_units(snapshot.generation, sorted(names))
        if missing:
            raise AlureError(
                f"refresh: generation {snapshot.generation}: units {', '.join(sorted(missing)[:5])} are not in "
                f"{self.store.path} after they were written; nothing was published. Run again"
            )

    def _generation(self, snapshot: Snapshot) -> Generation:
        config = self.model.config
        properties = {
            "k": config.num_embeddings,
            "d": config.width,
            "max_events": self.config.max_events,
            "precision": self.config.precision,
            "base": snapshot.base,
            "events": self.events.manifest.fingerprint,
        }
        rows = self.store.count_written(snapshot.generation)
        if not rows:
            first = self.events.manifest.first_timestamp
            raise InputError(f"refresh: no user has an event up to as_of = {self.as_of}; the log begins at {first}")
        return Generation(snapshot.generation, "embeddings", "", rows, self.as_of, self.digest, properties)

    def _report(
        self,
        snapshot: Snapshot,
        published: Generation,
        units: tuple[list[Unit], int],
        done: Work | None,
        started: float,
    ) -> RefreshReport:
        seconds, work = time.monotonic() - started, done or Work()
        embedded = self.store.count_written(snapshot.generation, as_of=self.as_of)
        return RefreshReport(
            generation=snapshot.generation,
            as_of=self.as_of,
            model=self.digest,
            base=snapshot.base,
            already_published=done is None,
            users=published.rows,
            embedded=embedded,
            carried=published.rows - embedded,
            skipped=self.events.num_users - published.rows,
            k=self.model.config.num_embeddings,
            d=self.model.config.width,
            units=len(units[0]),
            units_reused=units[1],
            embedded_now=work.embedded,
            tokens=work.tokens,
            batches=work.batches,
            seconds=seconds,
            users_per_second=work.embedded / max(seconds, 1e-9),
            device="cuda" if torch.cuda.is_available() else "cpu",
            precision=self.config.precision,
            workers=self.workers,
        )


def memory_digest(model: UserModel) -> str:
    """What tells a model in memory from others, of its tensors, configuration and schema; not a checkpoint's digest."""
    digest = hashlib.sha256(model.config.model_dump_json().encode() + model.schema.model_dump_json().encode())
    digest.update(save({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}))
    return digest.hexdigest()
