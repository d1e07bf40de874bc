"""MovieLens-1M, leave-one-out, full ranking: the two-tower head beside published sequential recommenders.

Trained on all but the last two ratings of each user, on their order alone (no genres, no rating values). The last but
one chooses the model; it is then part of the history from which the last one, the test, is ranked among all films that
the user has not rated.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alure.bench.quality.results import Results
from alure.engine.config import EventsConfig, ModelConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events, ingest
from alure.engine.progress import say
from alure.engine.training import train
from alure.engine.training.full_ranking import rank_truth

EXPERIMENT = "ml-1m"
SEEDS = (0, 1, 2)
NEWEST = 200  # events that are read, as by SASRec
MODEL: dict[str, Any] = {
    "width": 96,
    "layers": 2,
    "heads": 2,
    "taps": [[2, "rating"]],
    "seeds": 1,
    "num_embeddings": 1,
    "attribute_width": 96,
    "causal": True,
    "encoders": ["frequency", "gap", "cyclic"],
    "dropout": 0.2,
}
TRAINING: dict[str, Any] = {
    "labels": "next_event",
    "held_out": "last_event",
    "negatives": 4_096,  # more than there are films: the exact softmax
    "max_events": NEWEST,
    "windows": "random",
    "batch_users": 64,
    "steps": 3_500,
    "learning_rate": 2e-3,
    "table_learning_rate": 0.8,
    "precision": "float32",
    "validate_every": 500,
}
PUBLISHED = [  # HR@10, NDCG@10 on this split; HSTU's has 3,706 items
    ("SASRec (gSASRec's authors)", 0.2392, 0.1259),
    ("SASRec (HSTU's authors)", 0.2853, 0.1603),
    ("gSASRec", 0.3003, 0.1726),
    ("HSTU", 0.3097, 0.1720),
    ("SASRec+, cross entropy (antklen)", 0.3152, 0.1821),
    ("HSTU-large", 0.3294, 0.1893),
]


def run(data: Path, results: Results, seeds: tuple[int, ...] = SEEDS) -> None:
    """Train and test every seed that has no row yet. data: the folder with ml-1m/{events,valid,test}.parquet."""
    settings = {"model": MODEL, "training": TRAINING}
    missing = [seed for seed in seeds if results.find("next event", seed, settings) is None]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        log = make_log(data / "ml-1m", Path(scratch))
        for seed in missing:
            say(f"ml-1m: seed {seed}")
            model, config = ModelConfig.model_validate(MODEL), TrainingConfig.model_validate(TRAINING)
            began = os.times()
            report = train(log, model, config, Path(scratch) / f"model-{seed}", seed=seed)
            ended = os.times()
            truth = data / "ml-1m" / "test.parquet"
            test = rank_truth(Path(report.model), log, truth, [10, 50, 200], max_events=NEWEST)
            figures = {
                "test": vars(test),
                "validation": report.validation,
                "best_step": report.best_step,
                "training_seconds": report.seconds,
                "training_cpu_seconds": ended.user + ended.system - began.user - began.system,
                "parameters": report.parameters,
            }
            results.append("next event", seed, settings, figures)


def make_log(folder: Path, scratch: Path) -> Events:
    """The ratings before the last one, in the order that the data set gives."""
    rows = []
    for name in ("events", "valid"):
        path = folder / f"{name}.parquet"
        if not path.is_file():
            raise InputError(f"ml-1m: {path} does not exist; --data is the folder that holds ml-1m/")
        table = pq.read_table(path)
        position = table["position"] if "position" in table.column_names else pa.array(np.full(len(table), 32_767))
        rows.append(table.select(["user_id", "item_id", "timestamp"]).append_column("position", position.cast("int64")))
    table = pa.concat_tables(rows).sort_by([("user_id", "ascending"), ("position", "ascending")])
    times = distinct_times(table["user_id"].to_numpy(), table["timestamp"].to_numpy())
    path = scratch / "ratings.parquet"
    source = pa.array(["rating"] * len(table))
    pq.write_table(table.set_column(2, "timestamp", pa.array(times)).append_column("source", source), path)
    ingest(EventsConfig(inputs=[path]), scratch / "log")
    return Events.open(scratch / "log")


def distinct_times(users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Times that keep the order of a user's rows, a fifth of which share their second with the row before.

    A rating that is not later than the one before it comes a second after it. users, times: int64 [n], users sorted.
    """
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    counts = np.diff(np.r_[starts, len(users)])
    place = np.arange(len(users)) - np.repeat(starts, counts)
    slack = times - place
    span = int(slack.max() - slack.min()) + 1
    user = np.repeat(np.arange(len(starts)), counts)  # a larger user's slack is larger: one running maximum for all
    return np.maximum.accumulate(slack - slack.min() + user * span) - user * span + slack.min() + place


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    rows = [row for row in results.rows() if row["settings"] == json.loads(json.dumps(settings_now()))]
    lines = ["## MovieLens-1M: next film, leave-one-out, full ranking", "", (__doc__ or "").split("\n\n", 1)[1].strip()]
    lines += ["", "| | HR@10 | NDCG@10 | HR@50 | HR@200 |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {hr:.4f} | {ndcg:.4f} | | |" for name, hr, ndcg in PUBLISHED]
    for row in rows:
        test = row["test"]
        hits = [f"{test['hit_rate'][k]['value']:.4f}" for k in ("10", "50", "200")]
        first = test["hit_rate"]["10"]
        lines.append(
            f"| **alure**, seed {row['seed']} | {hits[0]} ({first['low']:.3f}–{first['high']:.3f}) | "
            f"{test['ndcg']['10']['value']:.4f} | {hits[1]} | {hits[2]} |"
        )
    if len(rows) > 1:
        means = [
            np.array([row["test"][metric][k]["value"] for row in rows])
            for metric, k in (("hit_rate", "10"), ("ndcg", "10"), ("hit_rate", "50"), ("hit_rate", "200"))
        ]
        shown = " | ".join(f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" for x in means)
        lines.append(f"| **alure**, mean and deviation of {len(rows)} seeds | {shown} |")
    if rows:
        cpu = np.mean([row["training_cpu_seconds"] for row in rows]) / 60
        lines += [
            "",
            "The others' figures are as published. Ours have 95 % bootstrap intervals over users; "
            f"{rows[0]['parameters']:,} parameters, most of them rows of the hashed table, were trained in {cpu:.0f} "
            f"minutes of one core ({rows[0]['device']}).",
        ]
    return "\n".join(lines) + "\n"


def settings_now() -> dict[str, Any]:
    return {"model": MODEL, "training": TRAINING}
