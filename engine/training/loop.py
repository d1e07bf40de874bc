"""The steps of a training: what is saved on the way, when the model is validated, and where it stops."""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from alure.engine.config import TrainingConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.model import AlureModel, Catalog
from alure.engine.model.checkpoint import CheckpointConfig, fill, save_checkpoint
from alure.engine.progress import say, track
from alure.engine.signals import stop_flag
from alure.engine.training.curve import Curve
from alure.engine.training.optimizer import Optimization
from alure.engine.training.sampling import Sample, Sampler
from alure.engine.training.state import Saved, TrainingState, prefixed, under
from alure.engine.training.step import compute_losses

SAVES = 4  # on the way, beside the last
SAVE_EVERY_S = 300.0  # at the latest
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


@dataclass(frozen=True)
class Best:
    """The best model of the validations so far."""

    step: int
    value: float
    figures: dict[str, Any]
    tensors: dict[str, Tensor]


class Loop:
    """Goes on from `state` where an earlier run left one. Fills in the report."""

    def __init__(self, model: AlureModel, material: Material, report: TrainReport, state: TrainingState) -> None:
        self.model, self.material, self.report, self.state = model, material, report, state
        self.config = material.config
        self.optimization = Optimization(
            model, model.user.table, self.config.learning_rate, self.config.weight_decay, report.steps
        )
        self.curve = Curve(report.steps)
        self.save_every = max(1, math.ceil(report.steps / (SAVES + 1)))
        self.step = 0  # that are done
        self.kept: int | None = None  # step of the checkpoint in the model's folder
        self.best: Best | None = None
        self.seconds = 0.0  # of earlier runs

    def resume(self, saved: Saved) -> None:
        fill(self.model, under("model", saved.tensors), f"training: {self.state.folder}")
        self.optimization.load_state(under("optimizer", saved.tensors))
        facts, best = saved.facts, saved.facts["best"]
        self.material.sampler.load_state({**facts["sampler"], "round": saved.tensors["sampler.round"].numpy()})
        self.curve.load_state(facts["curve"])
        self.report.validations = facts["validations"]
        self.best = best and Best(**best, tensors=under("best", saved.tensors))
        self.step, self.kept, self.seconds = saved.step, facts["kept"], facts["seconds"]
        self.report.resumed_at = saved.step
        say(f"training: goes on after step {saved.step:,} of {self.report.steps:,}")

    def run(self) -> None:
        steps, first = self.report.steps, self.step
        started = self.saved_at = time.monotonic()
        self.report.seconds, self.report.curve = self.seconds, self.curve.points
        self.model.train()
        with track("Training", steps, "steps", done=first) as bar, stop_flag("training") as stop:
            while self.step < steps and not self._out_of_patience():
                self.curve.add(self.step + 1, self._take())
                self.step += 1
                bar.advance(note=f"loss {self.curve.recent:.3f}")
                self.report.seconds = self.seconds + time.monotonic() - started
                fifth = self.step % self.save_every == 0 and self.step < steps
                if self._validate_if_due() or (fifth and not self.config.validate_every):
                    self._save_checkpoint()
                elif fifth or stop.signal_name or time.monotonic() - self.saved_at > SAVE_EVERY_S:
                    self._save_state()
                stop.check()
        self.report.steps_per_second = (self.step - first) / max(time.monotonic() - started, 1e-9)
        self.report.stopped_at = self.step if self.step < steps else None
        self._save_state()  # once more: whatever happens to the last checkpoint, it can be written again
        self._conclude()
        self.report.temperature = float(self.model.temperature.detach())

    def _take(self) -> dict[str, float]:
        """One step; the losses."""
        material, step = self.material, self.step
        # what torch draws (dropout, labels) depends on the seed and the step alone: after a kill it is the same
        torch.manual_seed(int(np.random.SeedSequence([material.seed, step]).generate_state(1, np.uint64)[0]))
        sample = material.sampler.draw()
        batch = material.events.batch(sample.users, sample.as_of, self.config.max_events, sample.without_newest)
        batch = batch.to(material.catalog.items.device)
        losses = compute_losses(self.model, batch, sample, material.sampler, self.config, material.catalog)
        losses.total.backward()
        values = {"loss": losses.total.item(), **{name: part.item() for name, part in losses.parts.items()}}
        if not (math.isfinite(values["loss"]) and self.optimization.step(step)):
            raise AlureError(self._failure(sample, values))
        return values

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
        assert self.material.validation is not None
        figures = self.material.validation.measure(self.model.eval(), self.material.catalog)
        self.model.train()
        name, value = watched(figures)
        self.report.validations.append({"step": self.step, name: value})
        if self.best is None or better(name, value, self.best.value):
            tensors = {name: tensor.detach().clone().cpu() for name, tensor in self.model.state_dict().items()}
            self.best = Best(self.step, value, figures, tensors)
        return self.best.step == self.step

    def _out_of_patience(self) -> bool:
        if self.config.patience is None or self.best is None:
            return False
        since = sum(point["step"] > self.best.step for point in self.report.validations)
        return since >= self.config.patience

    def _conclude(self) -> None:
        """The model that is kept, and its figures."""
        validation = self.material.validation
        if validation is None:
            return
        if not self.config.validate_every:
            self.report.validation = validation.measure(self.model.eval(), self.material.catalog)
            return
        if not self.report.validations or self.report.validations[-1]["step"] != self.step:
            self._validate()
        assert self.best is not None
        fill(self.model, self.best.tensors, "training: the best model")
        self.step = self.report.best_step = self.best.step
        self.report.validation = self.best.figures

    def _save_state(self) -> None:
        tensors = prefixed("model", self.model.state_dict()) | prefixed("optimizer", self.optimization.state())
        sampler = self.material.sampler.state()
        tensors["sampler.round"] = torch.from_numpy(sampler.pop("round"))
        best = None
        if self.best is not None:
            tensors |= prefixed("best", self.best.tensors)
            best = {"step": self.best.step, "value": self.best.value, "figures": self.best.figures}
        facts = {
            "sampler": sampler,
            "curve": self.curve.state(),
            "validations": self.report.validations,
            "best": best,
            "kept": self.kept,
            "seconds": self.report.seconds,
        }
        self.state.save(Saved(self.step, facts, tensors))
        self.saved_at = time.monotonic()

    def _save_checkpoint(self) -> None:
        """The state first: whatever happens to the checkpoint, the training goes on and writes it again."""
        self.kept = self.step
        self._save_state()
        save_model(self.model, self.report, self.step)


def save_model(model: AlureModel, report: TrainReport, step: int) -> None:
    config = CheckpointConfig(model=model.config, events=model.schema, tasks=model.tasks, step=step, sha256="")
    save_checkpoint(Path(report.model), model, config, asdict(report))


def watched(figures: dict[str, Any]) -> tuple[str, float]:
    """The figure that the best model is chosen by: NDCG@10 of held-out events or Recall@10 of the held-out time; the
    mean NE of the tasks where nothing is retrieved."""
    if "ndcg" in figures:
        return "ndcg@10", figures["ndcg"]["10"]["value"]
    if "recall" in figures["retrieval"]:
        return "recall@10", figures["retrieval"]["recall"]["10"]
    found = [task["ne"] for task in figures["tasks"].values() if task.get("ne") is not None]
    if not found:
        raise InputError(
            "training.validate_every: the validation time has neither targets nor exposures of both labels, so no "
            "model is better than another; raise training.validation_share, or leave validate_every out"
        )
    return "ne", float(np.mean(found))


def better(name: str, value: float, before: float) -> bool:
    return value < before if name == "ne" else value > before
