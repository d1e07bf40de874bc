"""`train`: samples in, a checkpoint and its figures out."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alure.engine.config import ModelConfig, TrainingConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.model import AlureModel, Catalog, EventSchema
from alure.engine.model.checkpoint import CheckpointConfig, describe_differences, fill, read_checkpoint, save_checkpoint
from alure.engine.model.user_model import check_every_event
from alure.engine.progress import track
from alure.engine.training.full_ranking import LeaveOneOut
from alure.engine.training.optimizer import Optimization
from alure.engine.training.sampling import Sampler
from alure.engine.training.step import compute_losses
from alure.engine.training.targets import AdEvents, find_exposures, find_targets, first_times
from alure.engine.training.validation import Validation

SAVES = 4  # checkpoints on the way, beside the last
CURVE_POINTS = 100
PASSES, FEWEST_STEPS, MOST_STEPS = 4, 120, 600  # over the users, where the configuration gives no number of steps
NARROW = 64  # width


@dataclass
class TrainReport:
    """What a training did; metrics.json holds the same."""

    model: str  # the checkpoint's folder
    as_of: int
    steps: int
    seconds: float = 0.0
    steps_per_second: float = 0.0
    users: int = 0  # that have a target to learn from
    targets: int = 0
    parameters: int = 0
    temperature: float = 0.0
    warm_start: str | None = None
    curve: list[dict[str, float]] = field(
        default_factory=list
    )  # step, loss and its parts, means since the point before
    validation: dict[str, Any] | None = None


def train(
    events: Events,
    model_config: ModelConfig,
    config: TrainingConfig,
    out: Path,
    *,
    as_of: int | None = None,
    seed: int = 0,
    warm_start: Path | None = None,
    device: torch.device | str | None = None,
) -> TrainReport:
    """Train on the events up to `as_of` (default: all) and write a checkpoint to the folder `out`.

    The same seed gives the same checkpoint, bit for bit, on one CPU with one number of threads. InputError where the
    log, the configuration or the checkpoint to start from do not fit; AlureError where the loss stops being finite,
    with the last good checkpoint left in `out`. device: the GPU by default, where there is one.
    """
    if out.is_file():
        raise InputError(f"model: {out} is a file, expected a folder to write the checkpoint into")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    as_of = events.manifest.last_timestamp if as_of is None else as_of
    with threads(config.threads or default_threads(model_config)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ads = AdEvents.read(events, as_of)
        targets, tasks, first = find_targets(ads, config), find_exposures(ads, config), first_times(events)
        last = config.held_out == "last_event"
        split = as_of if last else split_time(targets.timestamps, config.validation_share, as_of)
        sampler = Sampler(targets, tasks, first, config, split, seed)
        names = tuple(task.name for task in tasks)
        model = AlureModel(model_config, EventSchema.of(events.manifest), names, config.temperature)
        if warm_start is not None:
            continue_from(warm_start, model)
        model.to(device)
        catalog = model.user.catalog(events)
        report = TrainReport(
            model=str(out),
            as_of=as_of,
            steps=number_of_steps(config, len(sampler.users)),
            users=len(sampler.users),
            targets=int(sampler.count.sum()),
            parameters=sum(p.numel() for p in model.parameters()),
            warm_start=None if warm_start is None else str(warm_start),
        )
        if config.labels != "all_action":
            check_every_event(model_config, model.schema)
        fit(model, events, sampler, config, catalog, report)
        if last:
            report.validation = LeaveOneOut(events, as_of, config.max_events, seed).measure(model.eval(), catalog)
        elif split < as_of:
            validation = Validation(events, sampler, config, split, as_of, seed)
            report.validation = validation.measure(model.eval(), catalog)
        save(model, report, report.steps)
    return report


def fit(
    model: AlureModel, events: Events, sampler: Sampler, config: TrainingConfig, catalog: Catalog, report: TrainReport
) -> None:
    """Run report.steps steps; fills in the report's curve, rate and temperature."""
    device, steps = catalog.items.device, report.steps
    optimization = Optimization(model, model.user.table, config.learning_rate, config.weight_decay, steps)
    curve = Curve(steps)
    save_every = math.ceil(steps / (SAVES + 1))
    saved = None
    started = time.monotonic()
    model.train()
    with track("Training", steps, "steps") as bar:
        for step in range(steps):
            sample = sampler.draw()
            batch = events.batch(sample.users, sample.as_of, config.max_events, sample.without_newest).to(device)
            losses = compute_losses(model, batch, sample, sampler, config, catalog)
            losses.total.backward()
            values = {"loss": losses.total.item(), **{name: part.item() for name, part in losses.parts.items()}}
            if not (math.isfinite(values["loss"]) and optimization.step(step)):
                left = f"the checkpoint of step {saved} is in {report.model}" if saved else "no checkpoint was written"
                raise AlureError(
                    f"training: the loss or its gradient stopped being finite at step {step + 1} of {steps} "
                    f"({', '.join(f'{name} {value:.4g}' for name, value in values.items())}); {left}; "
                    f"try a training.learning_rate below {config.learning_rate:g}"
                )
            curve.add(step + 1, values)
            if (step + 1) % save_every == 0 and step + 1 < steps:
                save(model, report, saved := step + 1)
            bar.advance(note=f"loss {curve.recent:.3f}")
    report.seconds = time.monotonic() - started
    report.steps_per_second = steps / max(report.seconds, 1e-9)
    report.curve = curve.points
    report.temperature = float(model.temperature.detach())


def number_of_steps(config: TrainingConfig, num_users: int) -> int:
    if config.steps is not None:
        return config.steps
    return min(max(math.ceil(PASSES * num_users / config.batch_users), FEWEST_STEPS), MOST_STEPS)


class Curve:
    """Means of the losses over stretches of steps, CURVE_POINTS of them or fewer."""

    def __init__(self, steps: int) -> None:
        self.steps, self.every = steps, math.ceil(steps / CURVE_POINTS)
        self.points: list[dict[str, float]] = []
        self.pending: dict[str, list[float]] = {}
        self.recent = math.nan

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.pending.setdefault(name, []).append(value)
        self.recent = values["loss"] if math.isnan(self.recent) else 0.95 * self.recent + 0.05 * values["loss"]
        if step % self.every == 0 or step == self.steps:
            self.points.append({"step": step, **{name: sum(v) / len(v) for name, v in self.pending.items()}})
            self.pending = {}


def split_time(target_times: np.ndarray, validation_share: float, as_of: int) -> int:
    """Where validation begins: `validation_share` of the targets are newer.

    Counted in targets, not in seconds: logs have long thin tails, where a tenth of the time holds next to nothing.
    """
    if not validation_share or not len(target_times):
        return as_of
    newest = max(1, round(validation_share * len(target_times)))
    return int(np.partition(target_times, -newest)[-newest]) - 1


def continue_from(folder: Path, model: AlureModel) -> None:
    """Load every tensor of a checkpoint; InputError names what differs."""
    saved, tensors = read_checkpoint(folder)
    problems = describe_differences(model.config, saved.model, "model")
    problems += describe_differences(model.schema, saved.events, "events")
    if model.tasks != saved.tasks:
        problems.append(f"training.tasks: {list(saved.tasks)} in the checkpoint, {list(model.tasks)} here")
    if problems:
        raise InputError(
            f"warm start: the checkpoint {folder} does not fit:\n  "
            + "\n  ".join(problems)
            + "\nuse the checkpoint's configuration and event types, or train without a warm start"
        )
    fill(model, tensors, f"warm start: {folder}")


def save(model: AlureModel, report: TrainReport, step: int) -> None:
    config = CheckpointConfig(model=model.config, events=model.schema, tasks=model.tasks, step=step, sha256="")
    save_checkpoint(Path(report.model), model, config, asdict(report))


def default_threads(config: ModelConfig) -> int:
    """One for a narrow model, whose operations are too small to share; else PyTorch's own number.

    Small preset on 2 cores with another job on one of them: 0.29 s a step with 1 thread, 1.9 s with 2, as OpenMP waits
    at the end of every operation for a thread that is not running.
    """
    return 1 if config.width <= NARROW else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
