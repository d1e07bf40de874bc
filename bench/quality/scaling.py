"""Scaling: recall and NE against the FLOPs of embedding a user, over length, width and depth.

One of the three is changed at a time, from the preset small with 128 events a source and 2 layers. Every model is
trained on the same log of the synthetic ads world with the same steps and seeds. Recall@50 of the two-tower head and
the click model's NE are of the newest tenth of the engagements, which training did not see. FLOPs are those of the
products of the forward pass, a mean over the users.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from alure.bench.figure import INK, MUTED, OURS, apart, name_at_end, quiet, saved_figure
from alure.bench.quality.ablations import ne_of, recall_of, spread
from alure.bench.quality.results import Results, matching
from alure.bench.quality.snapshots import world_log
from alure.engine.config import ModelConfig, TrainingConfig
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.model.flops import ForwardFlops
from alure.engine.progress import say
from alure.engine.training import train

EXPERIMENT = "scaling"
FIGURE = "scaling.svg"
LENGTH = 128  # events a source
SETTINGS: dict[str, Any] = {
    "users": 3_000,
    "training": {"steps": 300, "threads": 1, "batch_users": 64, "max_events": LENGTH},
}
AXES: dict[str, list[int]] = {"length": [8, 32, LENGTH], "width": [16, 32, 64, 128], "depth": [1, 2, 4]}
COLOURS = {"length": OURS, "width": "#bc4c00", "depth": "#1a7f37"}
BESIDE = {"length": (3, -11), "width": (3, 5), "depth": (-8, 5)}  # points, from a model's dot to its size
TICKS = (2, 5, 10, 20, 50, 100)  # MFLOP
KEYS = {"length": "max_events", "width": "width", "depth": "layers"}


def variants() -> dict[str, tuple[str, int]]:
    """{name: the axis and its value}; the model that the axes have in common comes once for each."""
    return {f"{axis} {value}": (axis, value) for axis, values in AXES.items() for value in values}


def run(data: Path | None, results: Results, seeds: tuple[int, ...]) -> None:
    """Train every size and seed that has no row yet; needs no data."""
    for seed in seeds:
        left = [name for name in variants() if results.find(name, seed, SETTINGS) is None]
        if left:
            with tempfile.TemporaryDirectory() as scratch:
                measure(left, seed, Path(scratch), results)


def measure(left: list[str], seed: int, scratch: Path, results: Results) -> None:
    """A row for each of the sizes `left`; equal sizes are trained once."""
    events = world_log(scratch, SETTINGS["users"], seed)
    trained: dict[tuple[str, str], dict[str, Any]] = {}
    for name in left:
        axis, value = variants()[name]
        change = {KEYS[axis]: value}
        model = ModelConfig.model_validate({} if axis == "length" else change)
        config = TrainingConfig.model_validate(SETTINGS["training"] | (change if axis == "length" else {}))
        size = (model.model_dump_json(), config.model_dump_json())
        if size not in trained:
            say(f"scaling: seed {seed}, {name}")
            report = train(events, model, config, scratch / name.replace(" ", "-"), seed=seed)
            user = UserModel.load(report.model)
            trained[size] = {
                "validation": report.validation,
                "flops_a_user": flops_a_user(user, events, config.max_events),
                "training_seconds": report.seconds,
                "parameters": report.parameters,
            }
        results.append(name, seed, SETTINGS, trained[size])


def flops_a_user(model: UserModel, events: Events, max_events: int) -> float:
    """Mean FLOPs of a forward pass over every user's newest `max_events` of each source."""
    lengths = {
        stack.source: np.minimum(np.diff(np.asarray(events.source(stack.source).offsets)), max_events)
        for stack in model.sources()
    }
    return ForwardFlops(model)(lengths) / events.num_users


def section(results: Results) -> str:
    """This experiment's part of the quality page."""
    rows = matching(results, SETTINGS)
    lines = ["## Scaling", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    if not rows:
        return "\n".join([*lines, "Not yet measured."]) + "\n"
    lines += [f"![Recall and NE against FLOPs]({FIGURE})", ""]
    lines += ["| | MFLOP a user | seeds | recall@50 | NE (CTR) | training, s |", "|---|---|---|---|---|---|"]
    for name in variants():
        own = [row for row in rows if row["variant"] == name]
        if own:
            flops, seconds = (np.mean([row[key] for row in own]) for key in ("flops_a_user", "training_seconds"))
            cells = [spread([value for row in own if (value := read(row)) is not None]) for read in (recall_of, ne_of)]
            lines.append(f"| {name} | {flops / 1e6:.1f} | {len(own)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """An SVG of recall@50 and NE against FLOPs: a line for each of length, width and depth, means over the seeds."""
    rows = matching(results, SETTINGS)
    if not rows:
        return
    with saved_figure(path, (9.0, 3.4)) as figure:
        panels = ((recall_of, "recall@50, higher is better"), (ne_of, "NE of the click model, lower is better"))
        for index, (read, title) in enumerate(panels):
            panel = figure.add_axes((0.05 + 0.5 * index, 0.17, 0.36, 0.7))
            ends = {axis: draw_axis(panel, axis, rows, read) for axis in AXES}
            panel.set_xscale("log")
            panel.set_xticks(TICKS, [str(tick) for tick in TICKS])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_title(title, loc="left", color=INK, fontsize=9)
            panel.set_xlabel("MFLOP a user", color=MUTED)
            quiet(panel, "y")
            low, high = panel.get_ylim()
            places = apart([y for _, y in ends.values()], (high - low) / 12)
            panel.set_ylim(low, max(high, *places))
            for (axis, end), place in zip(ends.items(), places):
                name_at_end(panel, axis, end, place, COLOURS[axis])


def draw_axis(panel: Axes, axis: str, rows: list[dict[str, Any]], read: Callable[..., float | None]) -> Any:
    """One line, its points labelled with the axis's values; returns its end."""
    points = []
    for value in AXES[axis]:
        own = [row for row in rows if row["variant"] == f"{axis} {value}"]
        found = [figure for row in own if (figure := read(row)) is not None]
        if found:
            points.append((float(np.mean([row["flops_a_user"] for row in own])) / 1e6, float(np.mean(found)), value))
    panel.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", ms=4, color=COLOURS[axis])
    for x, y, value in points:
        panel.annotate(
            str(value), (x, y), textcoords="offset points", xytext=BESIDE[axis], fontsize=8, color=COLOURS[axis]
        )
    return points[-1][:2] if points else (1.0, 0.0)
