"""`alure align`: a checkpoint whose embeddings lie in the space of an earlier one, so that generations compare.

A model trained anew puts the same users elsewhere: all cosines may be as good, and yet every reader of the embeddings
(a feature, an index, an average over generations) sees other numbers. The matrices found here are written into the
checkpoint, where the user tower and the ad tower both apply them: no cosine, score or logit of the model changes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from alure.engine.config import RefreshConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import UserModel, model_digest, model_space
from alure.engine.model.alignment import procrustes, turn
from alure.engine.model.checkpoint import METRICS, check_replaceable, read_checkpoint, write_checkpoint
from alure.engine.progress import say, track
from alure.engine.refresh.embedder import Embedder, Snapshot
from alure.engine.refresh.planner import Unit, count_events, spread

HELD_OUT = 5  # every fifth anchor only measures
ROTATIONS = "user.rotations"


@dataclass(frozen=True)
class AlignReport:
    """Cosines between the two models' embeddings of one user, a mean over slots and over the held-out users."""

    model: str  # the aligned checkpoint's folder
    space: str  # digest of the model whose space it is in
    as_of: int
    users: int  # that the matrices were found on
    held_out: int  # that only measure
    mean_cosine_before: float
    mean_cosine: float


def align(
    model: Path,
    to: Path,
    events: Events,
    out: Path,
    *,
    as_of: int | None = None,
    max_events: int | None = None,
    anchors: int = 10_000,
) -> AlignReport:
    """Write to the folder `out` the checkpoint `model`, turned onto the space of the checkpoint `to`.

    anchors: at most so many users with an event up to as_of (default: the log's last), whom both models embed.
    Raises InputError where the models' shapes differ, a model does not fit the log, or fewer than two users can be
    embedded.
    """
    if out.resolve() in (model.resolve(), to.resolve()):
        raise InputError(f"--out: {out} is one of the two models; give another folder, so that neither is lost")
    check_replaceable(out)
    as_of = events.manifest.last_timestamp if as_of is None else as_of
    config = RefreshConfig(precision="float32", max_events=max_events)
    users, tokens = draw_anchors(events, as_of, config, anchors)
    old, new = (embed(path, events, users, tokens, as_of, config) for path in (to, model))
    if old.shape[1:] != new.shape[1:]:
        raise InputError(
            f"align: {model} has {new.shape[1]} embeddings of width {new.shape[2]}, {to} has {old.shape[1]} of width "
            f"{old.shape[2]}; only spaces of one shape turn onto each other"
        )
    finite = (old.isfinite() & new.isfinite()).all(dim=(1, 2))
    old, new = old[finite], new[finite]
    if len(old) < 2:
        raise InputError(
            f"align: {len(old)} users have an event up to as_of = {as_of} and finite embeddings of both models, "
            "expected at least 2; give a later --as-of or another log"
        )
    measured = torch.arange(len(old)) % HELD_OUT == HELD_OUT - 1
    measured[-1] = True
    rotations = procrustes(new[~measured], old[~measured])
    report = AlignReport(
        model=str(out),
        space=model_space(to),
        as_of=as_of,
        users=int((~measured).sum()),
        held_out=int(measured.sum()),
        mean_cosine_before=mean_cosine(new[measured], old[measured]),
        mean_cosine=mean_cosine(turn(new[measured], rotations), old[measured]),
    )
    if report.users < new.shape[2]:
        say(f"align: {report.users:,} users for a space of {new.shape[2]} dimensions; some of it is turned arbitrarily")
    write_aligned(model, out, rotations, report)
    return report


def draw_anchors(events: Events, as_of: int, config: RefreshConfig, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(users, tokens), int64 [n <= most], of those with an event."""
    num_events, tokens = count_events(events, Unit(0, events.num_users), as_of, config.max_events)
    chosen = spread(np.flatnonzero(num_events > 0), most)
    return chosen, tokens[chosen]


def embed(
    path: Path, events: Events, users: np.ndarray, tokens: np.ndarray, as_of: int, config: RefreshConfig
) -> torch.Tensor:
    """[n, k, d] of a checkpoint."""
    model, device = UserModel.load(path), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder = Embedder(model, events, Snapshot("", as_of, model_digest(path), None, config), device)
    with track(f"Embedding with {path.name}", int(tokens.sum()), "events") as bar:
        vectors, _ = embedder.embed(users, tokens, lambda work: bar.advance(work.tokens))
    return torch.from_numpy(vectors.values).unflatten(1, (model.config.num_embeddings, model.config.width))


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of unit vectors [n, k, d]."""
    return float((a.double() * b.double()).sum(-1).mean())


def write_aligned(model: Path, out: Path, rotations: torch.Tensor, report: AlignReport) -> None:
    """`model` with the matrices behind those that it may have."""
    config, tensors = read_checkpoint(model)
    if ROTATIONS in tensors:
        rotations = tensors[ROTATIONS].double() @ rotations
    metrics = json.loads((model / METRICS).read_text()) if (model / METRICS).is_file() else {}
    write_checkpoint(
        out,
        {**tensors, ROTATIONS: rotations.float()},
        config.model_copy(update={"space": report.space}),
        {**metrics, "alignment": asdict(report)},
    )
