"""Ablations: what each part of the model adds, by leaving it out.

Every variant is trained on the same log with the same seeds as the whole model. Recall@50 of the two-tower head and
the click model's NE are of the newest tenth of the engagements, which training did not see. A difference is that of
the mean over seeds from the whole model's, paired by seed, with Student's 95 % interval; where it includes zero, the
part has not been shown to earn its place.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from alure.bench.quality.results import Results, matching
from alure.bench.quality.snapshots import world_log
from alure.engine.config import ENCODERS, EventsConfig, ModelConfig, TrainingConfig
from alure.engine.events import Events, ingest
from alure.engine.progress import say
from alure.engine.training import train

EXPERIMENT = "ablations"
WHOLE = "whole model"
TRAINING: dict[str, Any] = {"steps": 120, "threads": 1, "batch_users": 64}
WORLD_USERS = 1_500
REAL = ("retail_rocket", "checkins", "ml-1m")
TIME: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "no time bias": {"time_bias": False},
    "no cyclic time bias": {"bias_periods": []},
    "no position bias": {"position_bias": False},
}
PARTS: dict[str, dict[str, Any]] = {
    **TIME,
    **{f"no {name} encoder": {"encoders": [other for other in ENCODERS if other != name]} for name in ENCODERS},
    "interaction compression": {"compression": "interaction"},
    "k = 1": {"num_embeddings": 1},
    "k = 4": {"num_embeddings": 4},
    "last layer's taps only": {"taps": "last"},
    "ad sources only": {"sources": "ads"},
}


def settings_of(log: str) -> dict[str, Any]:
    return {"log": log, "training": TRAINING} | ({"users": WORLD_USERS} if log == "world" else {})


def run(data: Path | None, results: Results, seeds: tuple[int, ...]) -> None:
    """Every variant on the synthetic world; the time bias also on the real sets that `data` holds."""
    for log in ("world", *REAL):
        if log != "world" and (data is None or not (data / log / "events.parquet").is_file()):
            say(
                f"ablations: {log} left out: "
                + ("no --data" if data is None else f"{data / log} has no events.parquet")
            )
            continue
        variants = PARTS if log == "world" else TIME
        for seed in seeds:
            left = [name for name in variants if results.find(name, seed, settings_of(log)) is None]
            if left:
                with tempfile.TemporaryDirectory() as scratch:
                    measure(log, left, seed, data, Path(scratch), results)


def measure(log: str, left: list[str], seed: int, data: Path | None, scratch: Path, results: Results) -> None:
    """Train the variants `left` on one log; a row each."""
    events = world_log(scratch, WORLD_USERS, seed) if log == "world" or data is None else real_log(data / log, scratch)
    for name in left:
        say(f"ablations: {log}, seed {seed}, {name}")
        chosen, change = events, dict(PARTS[name])
        if change.pop("sources", None):
            chosen = only_ads(scratch)
        if change.get("taps") == "last":
            change["taps"] = [(ModelConfig().layers, source) for source in events.manifest.sources]
        model = ModelConfig.model_validate(change)
        config = TrainingConfig.model_validate(TRAINING)
        report = train(chosen, model, config, scratch / name.replace(" ", "-"), seed=seed)
        figures = {"validation": report.validation, "training_seconds": report.seconds, "parameters": report.parameters}
        results.append(name, seed, settings_of(log), figures)


def real_log(folder: Path, scratch: Path) -> Events:
    ingest(EventsConfig(inputs=[folder / "events.parquet"]), scratch / "log")
    return Events.open(scratch / "log")


def only_ads(scratch: Path) -> Events:
    """The world's log without the sources that are not ads."""
    ads = Events.open(scratch / "log").manifest.ad_sources
    world = scratch / "world"
    config = EventsConfig(
        inputs=[world / "events.parquet"], items=world / "items.parquet", sources=ads, max_quarantine_share=1.0
    )
    ingest(config, scratch / "ads")
    return Events.open(scratch / "ads")


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    lines = ["## Ablations", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    for log in ("world", *REAL):
        rows = matching(results, settings_of(log))
        title = "the synthetic ads world" if log == "world" else log
        lines += [f"### On {title}", ""]
        lines += [*table(rows, PARTS if log == "world" else TIME), ""] if rows else ["Not yet measured.", ""]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | seeds | recall@50 | difference | NE (CTR) | difference |", "|---|---|---|---|---|---|"]
    for name in variants:
        own = [row for row in rows if row["variant"] == name]
        cells = []
        for read in (recall_of, ne_of):
            values = [value for row in own if (value := read(row)) is not None]
            cells += [spread(values), difference(apart_of(rows, name, read)) if name != WHOLE else ""]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    seconds = np.mean([row["training_seconds"] for row in rows])
    lines += ["", verdict(rows, variants)]
    return [*lines, "", f"Trained in {seconds:.0f} s a run ({rows[0]['device']}, {rows[0]['threads']} thread)."]


def verdict(rows: list[dict[str, Any]], variants: dict[str, dict[str, Any]]) -> str:
    """Which variants lose recall or NE against the whole model beyond the interval, in words."""
    worse, better = [], []
    for name in variants:
        signs = [sign * beyond(apart_of(rows, name, read)) for read, sign in ((recall_of, 1), (ne_of, -1))]
        worse += [name] if min(signs) < 0 else []
        better += [name] if max(signs) > 0 else []
    named = "; ".join(
        f"{text}: {', '.join(names)}" for text, names in (("Worse than the whole", worse), ("better", better)) if names
    )
    rest = "For all others" if named else "For all of them"
    return (f"{named}. " if named else "") + f"{rest} the interval includes zero: they are not shown to matter here."


def apart_of(rows: list[dict[str, Any]], name: str, read: Callable[[dict[str, Any]], float | None]) -> list[float]:
    """A variant's differences from the whole model, one a seed that has both."""
    whole = {row["seed"]: read(row) for row in rows if row["variant"] == WHOLE}
    own = {row["seed"]: read(row) for row in rows if row["variant"] == name and name != WHOLE}
    pairs = [(value, whole.get(seed)) for seed, value in own.items()]
    return [a - b for a, b in pairs if a is not None and b is not None]


def recall_of(row: dict[str, Any]) -> float | None:
    return row["validation"]["retrieval"].get("recall", {}).get("50")


def ne_of(row: dict[str, Any]) -> float | None:
    return row["validation"]["tasks"].get("ctr", {}).get("ne")


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def difference(apart: list[float]) -> str:
    """Mean and Student's 95 % interval; one seed has no interval."""
    if len(apart) < 2:
        return f"{apart[0]:+.4f}, one seed" if apart else "–"
    found = "excludes zero" if beyond(apart) else "includes zero"
    return f"{np.mean(apart):+.4f} ± {reach(apart):.4f}: {found}"


def reach(apart: list[float]) -> float:
    """Half of Student's 95 % interval of the mean."""
    error = float(np.std(apart, ddof=1)) / len(apart) ** 0.5
    return error * float(stats.t.ppf(0.975, len(apart) - 1))


def beyond(apart: list[float]) -> int:
    """The sign of the mean where its interval excludes zero, else 0."""
    if len(apart) < 2 or abs(np.mean(apart)) <= reach(apart):
        return 0
    return 1 if np.mean(apart) > 0 else -1
