"""Freshness: Recall of the engagements of three days by embeddings that are an hour to two weeks old.

One model, trained on what happened before the oldest snapshot; the same users, ads and engagements at every age. The
ads are ranked by the two-tower score alone, so the figures are those of the embeddings and not of a list of candidates.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from alure.bench.quality.results import Results, matching
from alure.bench.quality.snapshots import embed, embed_ads, world_log
from alure.engine.config import DAY, ModelConfig, TrainingConfig
from alure.engine.evaluation.metrics import bootstrap_means, interval
from alure.engine.model import AlureModel
from alure.engine.progress import say
from alure.engine.training import train
from alure.engine.training.metrics import top_columns
from alure.engine.training.targets import AdEvents, find_targets

EXPERIMENT = "freshness"
VARIANT = "two-tower"
K = 50
SETTINGS: dict[str, Any] = {
    "users": 1_500,
    "days": 3,
    "ages_hours": [0, 1, 6, 24, 72, 168, 336],
    "training": {"steps": 120, "threads": 1, "batch_users": 64, "validation_share": 0.0},
}


def run(data: Path | None, results: Results, seeds: tuple[int, ...]) -> None:
    """Measure every seed that has no row yet; needs no data."""
    for seed in seeds:
        if results.find(VARIANT, seed, SETTINGS) is None:
            say(f"freshness: seed {seed}")
            with tempfile.TemporaryDirectory() as scratch:
                results.append(VARIANT, seed, SETTINGS, measure(Path(scratch), seed))


def measure(scratch: Path, seed: int) -> dict[str, Any]:
    """Recall@K at every age, and its paired difference from the freshest, with intervals over users."""
    events = world_log(scratch, SETTINGS["users"], seed)
    config = TrainingConfig.model_validate(SETTINGS["training"])
    now = events.manifest.last_timestamp - SETTINGS["days"] * DAY
    ages = [hours * 3_600 for hours in SETTINGS["ages_hours"]]
    report = train(events, ModelConfig(), config, scratch / "model", as_of=now - max(ages), seed=seed)
    model = AlureModel.load(scratch / "model")

    targets = find_targets(AdEvents.read(events, events.manifest.last_timestamp), config)
    later = np.flatnonzero(targets.timestamps > now)
    pairs = np.unique(np.stack([targets.users[later], targets.items[later]], axis=1), axis=0)
    known = events.num_events(now - max(ages)) > 0  # who can be embedded at every age
    pairs = pairs[known[pairs[:, 0]]]
    users, rows = np.unique(pairs[:, 0], return_inverse=True)
    ads = embed_ads(model, events)
    columns = []
    for age in ages:
        top = top_columns(embed(model, events, now - age, config.max_events)[users], ads, K).numpy()
        hit = (top[rows] == pairs[:, 1:]).any(axis=1)
        columns.append(np.bincount(rows, weights=hit) / np.bincount(rows))
    values = np.stack(columns, axis=1)  # [users, ages]
    means, samples = values.mean(0), bootstrap_means(values, 1_000, seed)
    return {
        "evaluated_users": len(users),
        "recall": [vars(interval(means[i], samples[:, i])) for i in range(len(ages))],
        "difference": [vars(interval(means[i] - means[0], samples[:, i] - samples[:, 0])) for i in range(len(ages))],
        "training_seconds": report.seconds,
    }


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    rows = matching(results, SETTINGS)
    lines = ["## Freshness", "", (__doc__ or "").split(": ", 1)[1].strip(), ""]
    if not rows:
        return "\n".join([*lines, "Not yet measured."]) + "\n"
    lines += ["| age, hours | " + " | ".join(f"recall@{K}, seed {row['seed']}" for row in rows) + " | mean loss |"]
    lines += ["|---" * (len(rows) + 2) + "|"]
    for i, hours in enumerate(SETTINGS["ages_hours"]):
        cells = []
        for row in rows:
            apart = row["difference"][i]
            mark = "" if i == 0 else " *" if apart["high"] < 0 or apart["low"] > 0 else " (as the freshest)"
            cells.append(f"{row['recall'][i]['value']:.4f}{mark}")
        loss = np.mean([row["difference"][i]["value"] / row["recall"][0]["value"] for row in rows])
        lines.append(f"| {hours} | " + " | ".join(cells) + f" | {loss:+.1%} |")
    seconds = np.mean([row["training_seconds"] for row in rows])
    lines += [
        "",
        "\\* differs from the freshest: the paired 95 % bootstrap interval over users excludes zero. "
        f"Users: {', '.join(str(row['evaluated_users']) for row in rows)}; trained in {seconds:.0f} s a seed.",
    ]
    return "\n".join(lines) + "\n"
