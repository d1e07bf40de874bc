"""RefreshJob: every user of an event log through the model, written unit by unit, published as one generation.

Killed at any moment and run again it ends with the same rows: a unit is a range of users, written in one commit that
carries the unit's name, and a unit whose name is in the store is not done again.
"""

import hashlib
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.limits import SHORT_S, matrix_limit
from alure.engine.metrics import exposition
from alure.engine.model import UserModel
from alure.engine.model.key_values import check_reusable
from alure.engine.progress import say, track
from alure.engine.refresh.clusters import run_on_ray, run_on_spark
from alure.engine.refresh.drift import LOOKED_UP, Drift, check_drift
from alure.engine.refresh.embedder import DTYPES, Embedder, Snapshot, Work, resolve_precision, token_budget
from alure.engine.refresh.outlook import SPARE, Outlook, look_ahead, seconds_a_token
from alure.engine.refresh.planner import Unit, generation_id, plan_units, spread
from alure.engine.refresh.report import FIGURES, RefreshReport, freshness
from alure.engine.refresh.reuse import KvFolders, row_bytes
from alure.engine.refresh.shard import Job, leases_of, share_units
from alure.engine.refresh.watch import Watch
from alure.engine.refresh.workers import run_workers, threads_of
from alure.engine.results import to_dict
from alure.engine.signals import StopFlag, stop_flag
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.kv_cache import kept_by, kv_cache_folder
from alure.engine.store.location import remove

ENGINES = ("local", "ray", "spark")
CALIBRATE_FROM = 16  # batches; shorter jobs are over before an estimate helps
LATEST = 253_402_300_799  # the end of the year 9999, the last that a date can name


class RefreshJob:
    """model, events, store: paths, or the opened things (several workers need paths); the store's may be an s3:// URL.
    It is made when missing.

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
        engine: str = "local",
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
        self.workers, self.engine = workers, engine
        self.watch = Watch()
        if not isinstance(self.as_of, (int, np.integer)):
            raise InputError(f"as_of: expected unix seconds as an int, got {self.as_of!r}")
        if not 0 <= self.as_of <= LATEST:
            raise InputError(f"as_of: expected unix seconds from 0 to {LATEST}, got {self.as_of}; milliseconds?")
        if self.config.kv_cache:
            check_reusable(self.model.config)
            if not isinstance(self.store.path, Path):
                raise InputError(f"refresh.kv_cache: expected a store on a disk, got {self.store.path}")
        if workers < 1:
            raise InputError(f"workers: expected at least 1, got {workers}")
        if engine not in ENGINES:
            raise InputError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
        if (workers > 1 or engine != "local") and self.model_path is None:
            raise InputError("workers: other processes need the model as a path to open, got a UserModel in memory")
        self.digest = memory_digest(self.model) if self.model_path is None else self.model.digest

    def run(self) -> RefreshReport:
        """Do what is left to do and publish. Raises Interrupted on SIGTERM or SIGINT, AlureError where it fails."""
        self.watch = Watch()
        self.store.check_dtype(self.config.output_dtype)
        snapshot = self._snapshot()
        units = plan_units(self.events.num_users, self.config.unit_users)
        published = self.store.log.find(snapshot.generation, "embeddings")
        if published is not None:
            say(f"refresh: generation {snapshot.generation} is published already, with {published.rows:,} users")
            return self._report(snapshot, published, (units, len(units)), None, None)
        self._refuse_withdrawn(snapshot.generation)
        self.events.hold()
        names = [unit.name for unit in units]
        done = self.store.written_units(snapshot.generation, names)
        with stop_flag("refresh") as flag:
            outlook = look_ahead(snapshot, units, done, self.events, self.store)
            most_bad = int(self.config.max_quarantine_share * outlook.present)
            snapshot = replace(snapshot, most_bad=most_bad)
            left = [unit for unit in units if unit.name not in done]
            self.watch.plan(outlook, len(units), len(done))
            work = self._embed(snapshot, outlook, left, flag) if left else Work()
            new = self._generation(snapshot, names, outlook.present)
            drift = self._check_drift(new)
            published = self.store.publish(new)
        remove(leases_of(self.store, snapshot.generation))  # those of the dead
        return self._report(snapshot, published, (units, len(done)), work, drift)

    def metrics(self, report: RefreshReport | None = None) -> str:
        """The figures of the run for Prometheus, from any thread while it goes on; those of its report at the end."""
        figures = self.watch.figures()
        if report is not None:
            figures |= {**to_dict(report), "finished_timestamp_seconds": time.time()}
        return exposition("refresh", figures, FIGURES)

    def _snapshot(self) -> Snapshot:
        full = generation_id(self.as_of, self.digest, self.events, self.config, None)
        base = None
        if self.incremental and self.store.log.find(full, "embeddings") is None:
            base = self._base()
        if self.config.max_minutes is not None and base is None:
            raise InputError(
                "--max-minutes: needs --incremental and an earlier generation, which whom the time does not reach are "
                "carried forward from; make the first one in full"
            )
        generation = generation_id(self.as_of, self.digest, self.events, self.config, base)
        kv_cache = self._kv_cache(generation, base) if self.config.kv_cache else None
        return Snapshot(generation, self.as_of, self.digest, base, self.config, kv_cache=kv_cache)

    def _kv_cache(self, generation: str, base: str | None) -> KvFolders:
        """Of the generations that this one is carried forward from, as far back as they kept keys and values."""
        assert isinstance(self.store.path, Path)
        folder = partial(kv_cache_folder, self.store.path.resolve())
        return KvFolders(tuple(map(folder, reversed(kept_by(self.store.log, base)))), folder(generation))

    def _base(self) -> str | None:
        """The newest generation before as_of, or one of as_of that a time limit cut short; InputError where its rows
        cannot stand beside this model's.
        """
        unlimited = self.config.max_minutes is None
        earlier = [
            g
            for g in self.store.generations("embeddings")
            if g.as_of < self.as_of or (g.as_of == self.as_of and unlimited and g.properties.get("max_minutes"))
        ]
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

    def _refuse_withdrawn(self, generation: str) -> None:
        withdrawn = any(g.key == (generation, "embeddings", "") for g in self.store.log.withdrawn())
        if withdrawn and self.store.count_written(generation):
            raise InputError(
                f"refresh: generation {generation} was rolled back. `alure rollback --to {generation}` brings it back; "
                "to make it anew, `alure vacuum` its rows first"
            )

    def _embed(self, snapshot: Snapshot, outlook: Outlook, units: list[Unit], flag: StopFlag) -> Work:
        devices = self._devices()
        say(
            f"refresh: generation {snapshot.generation}: {outlook.users:,} users with {outlook.tokens:,} events in "
            f"{len(units)} units on {', '.join(sorted(set(devices)))}"
        )
        if snapshot.kv_cache is not None:
            sizes = row_bytes(self.model, DTYPES[self.config.precision]).values()
            say(f"refresh: an event's keys and values take {max(sizes):,} bytes in {snapshot.kv_cache.write}")
        alone = self.engine == "local" and self.workers == 1
        long = outlook.tokens > CALIBRATE_FROM * token_budget(self.config, torch.device(devices[0]))
        embedder = None
        if alone or long or self.config.max_minutes is not None:
            embedder = Embedder(self.model, self.events, snapshot, torch.device(devices[0]))
        if embedder is not None and (long or self.config.max_minutes is not None) and outlook.tokens:
            rate = self.workers / seconds_a_token(embedder, outlook)
            self.watch.matrix_rate = limit = self._matrix_rate(embedder)
            say(
                f"refresh: about {outlook.tokens / rate:,.0f} s with --workers {self.workers}; "
                f"MFU is a share of {limit / 1e9:,.0f} GFLOP/s, measured here"
            )
            embedder.snapshot = snapshot = self._limited(snapshot, outlook, rate)
        with track("Embedding", outlook.tokens, "events") as bar:
            self.watch.start(bar)
            if alone:
                assert embedder is not None
                return share_units(embedder, self.store, units, flag.check, self.watch)
            assert self.model_path is not None
            paths = (self.model_path.resolve(), self.events.path.resolve(), self.store.path.resolve())
            job = Job(*paths, self.events.manifest.fingerprint, snapshot, units)
            if self.engine == "local":
                return run_workers(job, devices, flag, self.watch)
            on_ray = self.engine == "ray"
            work = run_on_ray(job, self.workers, flag.check) if on_ray else run_on_spark(job, self.workers)
            self.watch.add(work)
            return work

    def _devices(self) -> list[str]:
        """One a worker. torchrun gives each of its processes a LOCAL_RANK, from which its devices are counted."""
        if not torch.cuda.is_available():
            return ["cpu"] * self.workers
        first, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        return [f"cuda:{(first + worker) % count}" for worker in range(self.workers)]

    def _num_devices(self) -> int:
        """GPUs, or cores, of all workers."""
        if torch.cuda.is_available():
            return len(set(self._devices()))
        if self.engine != "local":
            return self.workers
        threads = torch.get_num_threads() if self.workers == 1 else self.workers * threads_of(self.workers)
        return min(threads, os.cpu_count() or 1)

    def _matrix_rate(self, embedder: Embedder) -> float:
        """FLOP/s of all devices together: one's times their number, as threads that wait for a core say little."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._num_devices() * matrix_limit(embedder.device, embedder.model.dtype, seconds=SHORT_S)
        finally:
            torch.set_num_threads(threads)

    def _limited(self, snapshot: Snapshot, outlook: Outlook, rate: float) -> Snapshot:
        """`snapshot` with what max_minutes allows at `rate` tokens a second."""
        if self.config.max_minutes is None:
            return snapshot
        seconds = 60 * self.config.max_minutes
        least = outlook.reach(SPARE * seconds * rate)
        reached = f"the users whose embedding has not seen at least {least:.1%} of their history" if least else "all"
        say(f"refresh: {self.config.max_minutes:g} minutes reach {reached}; whom they do not is carried forward")
        return replace(snapshot, least_unseen=least, deadline=time.time() + seconds)

    def _generation(self, snapshot: Snapshot, names: list[str], present: int) -> Generation:
        """What is published, once every unit is written and the rows are as many as the log says."""
        missing = set(names) - self.store.written_units(snapshot.generation, names)
        if missing:
            raise AlureError(
                f"refresh: generation {snapshot.generation}: units {', '.join(sorted(missing)[:5])} are not in "
                f"{self.store.path} after they were written; nothing was published. Run again"
            )
        rows = self.store.count_written(snapshot.generation)
        bad = self.store.count_quarantined(f"refresh {snapshot.generation}")
        if bad > snapshot.most_bad:
            raise AlureError(
                f"refresh: {bad:,} users have no finite embedding, more than max_quarantine_share allows "
                f"({snapshot.most_bad:,}); nothing was published. They are in the table quarantine of {self.store.path}"
            )
        if rows > present - bad or (rows < present - bad and self.config.max_minutes is None):
            raise AlureError(
                f"refresh: generation {snapshot.generation}: expected {present - bad:,} rows, one a user with an "
                f"event, found {rows:,}; nothing was published. `alure vacuum` them, then run again"
            )
        if not rows:
            first = self.events.manifest.first_timestamp
            raise InputError(f"refresh: no user has an event up to as_of = {self.as_of}; the log begins at {first}")
        properties = {
            "k": self.model.config.num_embeddings,
            "d": self.model.config.width,
            "max_events": self.config.max_events,
            "precision": self.config.precision,
            "output_dtype": self.config.output_dtype,
            "base": snapshot.base,
            "space": self.digest if self.model_path is None else self.model.space,
            "max_minutes": self.config.max_minutes,
            "kv_cache": self.config.kv_cache,
            "events": self.events.manifest.fingerprint,
            "quarantined": bad,
        }
        return Generation(snapshot.generation, "embeddings", "", rows, self.as_of, self.digest, properties)

    def _check_drift(self, new: Generation) -> Drift | None:
        users = spread(np.arange(self.events.num_users), LOOKED_UP * self.config.drift.anchors)
        return check_drift(self.store, new, self.events.users["user_id"].take(users).to_pylist(), self.config.drift)

    def _report(
        self,
        snapshot: Snapshot,
        published: Generation,
        units: tuple[list[Unit], int],
        done: Work | None,
        drift: Drift | None,
    ) -> RefreshReport:
        seconds, work, devices = self.watch.seconds, done or Work(), self._num_devices()
        ages = self.store.count_as_ofs(published)
        embedded = ages.get(self.as_of, 0)
        hours = seconds * devices / 3600
        limit = self.watch.matrix_rate
        return RefreshReport(
            generation=snapshot.generation,
            as_of=self.as_of,
            model=self.digest,
            base=snapshot.base,
            already_published=done is None,
            users=published.rows,
            embedded=embedded,
            carried=published.rows - embedded,
            quarantined=published.properties.get("quarantined", 0),
            skipped=self.events.num_users - published.rows,
            freshness=freshness(ages, self.as_of),
            drift=drift,
            k=self.model.config.num_embeddings,
            d=self.model.config.width,
            units=len(units[0]),
            units_reused=units[1],
            embedded_now=work.embedded,
            tokens=work.tokens,
            tokens_reused=work.reused,
            batches=work.batches,
            flops=work.flops,
            seconds=seconds,
            users_per_second=work.embedded / seconds,
            tokens_per_second=work.tokens / seconds,
            share_of_matrix_rate=work.flops / seconds / limit if limit else None,
            devices=devices,
            device_hours=hours,
            device_hours_per_billion_users=hours * 1e9 / work.embedded if work.embedded else None,
            device="cuda" if torch.cuda.is_available() else "cpu",
            precision=self.config.precision,
            output_dtype=self.config.output_dtype,
            workers=self.workers,
        )


def memory_digest(model: UserModel) -> str:
    """What tells a model in memory from others, of its tensors, configuration and schema; not a checkpoint's digest."""
    digest = hashlib.sha256(model.config.model_dump_json().encode() + model.schema.model_dump_json().encode())
    digest.update(save({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}))
    return digest.hexdigest()
