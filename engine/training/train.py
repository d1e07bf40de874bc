"""`train`: samples in, a checkpoint and its figures out."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alure.engine.config import ModelConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import AlureModel, EventSchema, model_digest
from alure.engine.model.checkpoint import check_replaceable, describe_differences, read_checkpoint
from alure.engine.model.user_model import check_every_event
from alure.engine.training.board import check_installed
from alure.engine.training.full_ranking import LeaveOneOut
from alure.engine.training.loop import Figures, Loop, Material, TrainReport, save_model
from alure.engine.training.processes import processes
from alure.engine.training.sampling import Sampler
from alure.engine.training.state import TrainingState
from alure.engine.training.targets import AdEvents, find_exposures, find_targets, first_times
from alure.engine.training.validation import Validation

PASSES, FEWEST_STEPS, MOST_STEPS = 4, 120, 600  # over the users, where the configuration gives no number of steps
NARROW = 64  # width


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

    The same seed gives the same checkpoint, bit for bit, on one CPU with one number of threads. A training that was
    killed goes on when it is called again with the same arguments, to the same checkpoint; with others it starts anew.
    InputError where the log, the configuration or the checkpoint to start from do not fit; AlureError where the loss
    stops being finite, with the last good checkpoint left in `out`; Interrupted after SIGTERM or SIGINT.
    device: the GPU by default, where there is one. Under torchrun the processes share every batch, and the first one
    writes.
    """
    check_replaceable(out)
    if config.tensorboard is not None:
        check_installed()
    if model_config.ad_level == "account" and config.labels != "all_action":
        raise InputError(
            f"training.labels: {config.labels} has items as labels, and model.ad_level is account; expected all_action"
        )
    as_of = events.manifest.last_timestamp if as_of is None else as_of
    with processes(device) as group, reproducible(group.device, seed, config.threads or default_threads(model_config)):
        ads = AdEvents.read(events, as_of)
        wanted = ads.of_accounts(events.items.accounts) if model_config.ad_level == "account" else ads
        targets, tasks, first = find_targets(wanted, config), find_exposures(ads, config), first_times(events)
        if not tasks and not config.retrieval_weight and not config.view_weight:
            raise InputError(
                "training: nothing to learn: retrieval_weight is 0 and there is no binary task, as the log lacks the "
                "event types of training.tasks or training.exposures is 0; raise retrieval_weight or name tasks"
            )
        last = config.held_out == "last_event"
        split = as_of if last else split_time(targets.timestamps, config.validation_share, as_of)
        sampler = Sampler(targets, tasks, first, config, split, seed)
        names = tuple(task.name for task in tasks)
        model = AlureModel(model_config, EventSchema.of(events.manifest), names, config.temperature)
        if min(config.batch_users, len(sampler.users)) < group.size:
            raise InputError(
                f"training: {group.size} processes share batches of {min(config.batch_users, len(sampler.users))} "
                "users; raise training.batch_users, or start fewer processes"
            )
        if config.labels != "all_action":
            check_every_event(model_config, model.schema)
        state = TrainingState(out, made_from(events, model_config, config, as_of, seed, warm_start, out))
        saved = state.load()
        group.check_equal(saved.step if saved else 0, "the step to go on from")
        if warm_start is not None and saved is None:
            continue_from(warm_start, model)
        model.to(group.device)
        catalog = model.user.catalog(events)
        validation: Figures | None = None
        if last:
            validation = LeaveOneOut(events, as_of, config.max_events, seed)
        elif split < as_of:
            validation = Validation(events, sampler, config, split, as_of, seed)
        report = TrainReport(
            model=str(out),
            as_of=as_of,
            steps=number_of_steps(config, len(sampler.users)),
            users=len(sampler.users),
            targets=int(sampler.count.sum()),
            parameters=sum(p.numel() for p in model.parameters()),
            processes=group.size,
            warm_start=None if warm_start is None else str(warm_start),
        )
        loop = Loop(model, Material(events, sampler, catalog, config, validation, seed, group), report, state)
        if saved is not None:
            loop.resume(saved)
        loop.run()
        if group.leads:
            save_model(model, report, loop.step)
            state.remove()
    return report


def made_from(
    events: Events,
    model: ModelConfig,
    config: TrainingConfig,
    as_of: int,
    seed: int,
    warm_start: Path | None,
    out: Path,
) -> dict[str, Any]:
    """What tells one training from another. Threads are left out: they change how fast it is, not what it is."""
    log = hashlib.sha256(events.manifest.model_dump_json().encode()).hexdigest()
    start = None
    if warm_start is not None:
        # a training that starts from the folder it writes into replaces that checkpoint on the way
        start = "the model's own folder" if warm_start.resolve() == out.resolve() else model_digest(warm_start)
    return {
        "log": log,
        "model": model.model_dump(mode="json"),
        "training": config.model_dump(mode="json", exclude={"threads", "tensorboard"}),
        "as_of": as_of,
        "seed": seed,
        "warm_start": start,
    }


def number_of_steps(config: TrainingConfig, num_users: int) -> int:
    if config.steps is not None:
        return config.steps
    return min(max(math.ceil(PASSES * num_users / config.batch_users), FEWEST_STEPS), MOST_STEPS)


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
    # neither the name of the shape nor dropout says anything of the weights
    there = saved.model.model_copy(update={"preset": model.config.preset, "dropout": model.config.dropout})
    problems = describe_differences(model.config, there, "model")
    problems += describe_differences(model.schema, saved.events, "events")
    if model.tasks != saved.tasks:
        problems.append(f"training.tasks: {list(saved.tasks)} in the checkpoint, {list(model.tasks)} here")
    if problems:
        raise InputError(
            f"warm start: the checkpoint {folder} does not fit:\n  "
            + "\n  ".join(problems)
            + "\nuse the checkpoint's configuration and event types, or train without a warm start"
        )
    model.fill(tensors, f"warm start: {folder}")


def default_threads(config: ModelConfig) -> int:
    """One for a narrow model, whose operations are too small to share; else PyTorch's own number.

    Small preset on 2 cores with another job on one of them: 0.29 s a step with 1 thread, 1.9 s with 2, as OpenMP waits
    at the end of every operation for a thread that is not running.
    """
    return 1 if config.width <= NARROW else torch.get_num_threads()


@contextmanager
def reproducible(device: torch.device, seed: int, num_threads: int) -> Iterator[None]:
    """PyTorch's generators from `seed` on, and its CPU threads, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
