"""The steps of a training: what is saved on the way, when the model is validated, and where it stops."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alure.engine.config import TrainingConfig
from alure.engine.errors import AlureError, Interrupted
from alure.engine.events import Events
from alure.engine.model import AlureModel, Catalog
from alure.engine.model.checkpoint import CheckpointConfig, save_checkpoint
from alure.engine.progress import say, track
from alure.engine.signals import StopFlag, stop_flag
from alure.engine.training.board import Board
from alure.engine.training.curve import Curve
from alure.engine.training.optimizer import Optimization, schedule
from alure.engine.training.processes import Processes
from alure.engine.training.sampling import Sample, Sampler
from alure.engine.training.selection import Selection, watched
from alure.engine.training.state import Saved, TrainingState, prefixed, under
from alure.engine.training.step import compute_losses, part_weights

SAVES = 4  # on the way, beside the last
SAVE_EVERY_S = 300.0  # at the latest
AGAIN = "run the same command again to go on"
NAMED_USERS = 8  # of a batch that fails


@dataclass
class TrainReport:
    """What a training did; metrics.json holds the same."""

    model: str  # the checkpoint's folder
    as_of: int
    steps: int  # that were planned
    seconds: float = 0.0
    steps_per_second: float = 0.0
    users: int = 0  # that have a target to learn from
    targets: int = 0
    parameters: int = 0
    temperature: float = 0.0
    warm_start: str | None = None
    processes: int = 1
    resumed_at: int | None = None  # steps that an earlier, interrupted run had done
    stopped_at: int | None = None  # steps that were done, where validations got no better
    best_step: int | None = None  # of the model that is kept, where it was chosen by validations
    curve: list[dict[str, float]] = field(
        default_factory=list
    )  # step, loss and its parts, means since the point before
    validations: list[dict[str, float]] = field(default_factory=list)  # step and the watched figure
    validation: dict[str, Any] | None = None  # of the model that is kept


class Figures(Protocol):
    """A validation: figures of a model on what is held out."""

    def measure(self, model: AlureModel, catalog: Catalog) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Material:
    """What a training learns from, and how."""

    events: Events
    sampler: Sampler
    catalog: Catalog
    config: TrainingConfig
    validation: Figures | None
    seed: int
    group: Processes


class Loop:
    """Goes on from `state` where an earlier run left one. Fills in the report."""

    def __init__(self, model: AlureModel, material: Material, report: TrainReport, state: TrainingState) -> None:
        self.model, self.material, self.report, self.state = model, material, report, state
        self.config, self.group = material.config, material.group
        model.user.mixed_precision = self.config.precision == "bfloat16"
        self.weights = part_weights(material.sampler, self.config)
        self.optimization = Optimization(
            model,
            model.user.table,
            self.config.learning_rate,
            self.config.weight_decay,
            report.steps,
            self.config.table_learning_rate,
        )
        self.curve = Curve(report.steps)
        self.selection = Selection(self.config.patience)
        self.save_every = max(1, math.ceil(report.steps / (SAVES + 1)))
        self.step = 0  # that are done
        self.kept: int | None = None  # step of the checkpoint in the model's folder
        self.seconds = 0.0  # of earlier runs
        self.board = Board(None)
        self.stopping = False  # a signal came, to this process or another

    def resume(self, saved: Saved) -> None:
        self.model.fill(under("model", saved.tensors), f"training: {self.state.folder}")
        self.optimization.load_state(under("optimizer", saved.tensors))
        facts = saved.facts
        self.material.sampler.load_state(facts["sampler"], under("sampler", saved.tensors))
        self.curve.load_state(facts["curve"])
        self.selection.load_state(facts["selection"], under("best", saved.tensors))
        self.step, self.kept, self.seconds = saved.step, facts["kept"], facts["seconds"]
        self.report.resumed_at = saved.step
        say(f"training: goes on after step {saved.step:,} of {self.report.steps:,}")

    def run(self) -> None:
        first, started = self.step, time.monotonic()
        self.report.seconds, self.saved_at = self.seconds, started
        self.report.curve, self.report.validations = self.curve.points, self.selection.points
        self.model.train()
        with Board(self.config.tensorboard if self.group.leads else None, first) as self.board:
            if self.config.validate_every and self.report.warm_start and not first:
                self._validate()  # no step need make the model that it starts from better
            with track("Training", self.report.steps, "steps", done=first) as bar, stop_flag("training") as stop:
                while self.step < self.report.steps and not self.selection.exhausted:
                    self._advance(stop)
                    self.report.seconds = self.seconds + time.monotonic() - started
                    bar.advance(note=f"loss {self.curve.recent:.3f}")
            self.report.steps_per_second = (self.step - first) / max(time.monotonic() - started, 1e-9)
            self.report.stopped_at = self.step if self.step < self.report.steps else None
            self.group.check_in_step(self.model)
            self._save_state()  # once more: whatever happens to the last checkpoint, it can be written again
            self._conclude()
        self.report.temperature = float(self.model.temperature.detach())

    def _advance(self, stop: StopFlag) -> None:
        """A step, and what is due after it. Raises Interrupted where a signal came, once the step is saved."""
        values = self._take(stop)
        self.step += 1
        self.curve.add(self.step, values)
        if self.board.writer is not None:
            self.board.add(self.step, self._shown(values))
        fifth = self.step % self.save_every == 0 and self.step < self.report.steps
        if fifth:
            self.group.check_in_step(self.model)
        if self._validate_if_due() or (fifth and not self.config.validate_every):
            self._save_checkpoint()
        elif fifth or self.stopping or time.monotonic() - self.saved_at > SAVE_EVERY_S:
            self._save_state()
        if self.stopping:
            raise Interrupted(f"training: stopped by {stop.signal_name or 'a signal to another process'}; {AGAIN}")

    def _take(self, stop: StopFlag) -> dict[str, float]:
        """One step; the losses."""
        material, step, group = self.material, self.step, self.group
        # what torch draws (dropout, labels) depends on seed, step and rank alone: after a kill it is the same
        torch.manual_seed(
            int(np.random.SeedSequence([material.seed, step, group.rank]).generate_state(1, np.uint64)[0])
        )
        sample = material.sampler.draw()
        own = sample.share(group.rank, group.size)
        batch = material.events.batch(own.users, own.as_of, self.config.max_events, own.without_newest)
        batch = batch.to(group.device)
        parts = compute_losses(self.model, batch, own, material.sampler, self.config, material.catalog)
        *counts, signals = group.sum([*self._by_part({n: p.count for n, p in parts.items()}), bool(stop.signal_name)])
        self.stopping = signals > 0
        whole = dict(zip(self.weights, counts))
        # a mean over this process's share, times that share of the batch: their sum is the mean over the batch
        means = {name: part.mean * (part.count / whole[name]) for name, part in parts.items()}
        read = {}
        if means:
            torch.stack([self.weights[name] * mean for name, mean in means.items()]).sum().backward()
            read = dict(zip(means, torch.stack([mean.detach() for mean in means.values()]).tolist()))
        found = {name: mean for name, mean in zip(whole, group.sum(self._by_part(read))) if whole[name]}
        values = {"loss": sum(self.weights[name] * mean for name, mean in found.items()), **found}
        group.sum_gradients(self.optimization.dense, self.optimization.table)
        if not (math.isfinite(values["loss"]) and self.optimization.step(step)):
            raise AlureError(self._failure(sample, values))
        return values

    def _by_part(self, values: Mapping[str, float]) -> list[float]:
        return [values.get(name, 0) for name in self.weights]

    def _shown(self, values: dict[str, float]) -> dict[str, float]:
        losses = {f"loss/{'total' if name == 'loss' else name}": value for name, value in values.items()}
        rate = self.config.learning_rate * schedule(self.step - 1, self.report.steps)
        return {**losses, "learning_rate": rate, "temperature": self.model.temperature.item()}

    def _failure(self, sample: Sample, values: dict[str, float]) -> str:
        left = f"the checkpoint of step {self.kept} is in {self.report.model}"
        ids = self.material.events.users["user_id"]
        named = ", ".join(f"{user} (id {ids[int(user)]})" for user in sample.users[:NAMED_USERS])
        more = f" and {len(sample.users) - NAMED_USERS} more" if len(sample.users) > NAMED_USERS else ""
        return (
            f"training: the loss or its gradient stopped being finite at step {self.step + 1} of {self.report.steps} "
            f"({', '.join(f'{name} {value:.4g}' for name, value in values.items())}); its batch: users {named}{more}, "
            f"at times {sample.as_of.min()} to {sample.as_of.max()}; "
            f"{left if self.kept else 'no checkpoint was written'}; "
            f"try a training.learning_rate below {self.config.learning_rate:g}"
        )

    def _validate_if_due(self) -> bool:
        """Whether the model was validated and is the best so far."""
        every = self.config.validate_every
        return every is not None and self.step % every == 0 and self._validate()

    def _validate(self) -> bool:
        """The first process measures, and all hear the score."""
        figures, name, value, score = {}, "", 0.0, 0.0
        if self.group.leads:
            figures = self._measure()
            name, value, score = watched(figures)
            self.board.add(self.step, {f"validation/{name}": value})
        (score,) = self.group.sum([score])
        return self.selection.add({"step": self.step, name: value}, score, figures, self.model)

    def _measure(self) -> dict[str, Any]:
        assert self.material.validation is not None
        figures = self.material.validation.measure(self.model.eval(), self.material.catalog)
        self.model.train()
        return figures

    def _conclude(self) -> None:
        """The model that is kept, and its figures."""
        if self.material.validation is None:
            return
        if not self.config.validate_every:
            self.report.validation = self._measure() if self.group.leads else None
            return
        if not self.selection.points or self.selection.points[-1]["step"] != self.step:
            self._validate()
        best = self.selection.best
        assert best is not None
        self.model.fill(best.tensors, "training: the best model")
        self.step = self.report.best_step = best.step
        self.report.validation = best.figures

    def _save_state(self) -> None:
        if not self.group.leads:
            return
        tensors = prefixed("model", self.model.state_dict()) | prefixed("optimizer", self.optimization.state())
        if self.selection.best is not None:
            tensors |= prefixed("best", self.selection.best.tensors)
        sampler, sampled = self.material.sampler.state()
        tensors |= prefixed("sampler", sampled)
        facts = {
            "sampler": sampler,
            "curve": self.curve.state(),
            "selection": self.selection.state(),
            "kept": self.kept,
            "seconds": self.report.seconds,
        }
        self.board.flush()
        self.state.save(Saved(self.step, facts, tensors))
        self.saved_at = time.monotonic()

    def _save_checkpoint(self) -> None:
        """The state first: whatever happens to the checkpoint, the training goes on and writes it again."""
        self.kept = self.step
        self._save_state()
        if self.group.leads:
            save_model(self.model, self.report, self.step)


def save_model(model: AlureModel, report: TrainReport, step: int) -> None:
    config = CheckpointConfig(model=model.config, events=model.schema, tasks=model.tasks, step=step, sha256="")
    save_checkpoint(Path(report.model), model, config, asdict(report))
