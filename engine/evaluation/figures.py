"""The report's charts, each from plain numbers. Every function returns an inline <svg> or, for `readme`, writes a file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from alure.engine.evaluation.charts import (
    CATEGORIES,
    COUNTS,
    LIGHT,
    OTHERS,
    PERCENT,
    THEMED,
    Palette,
    figure,
    label,
    only_grid,
    row_labels,
    style,
    to_svg,
)

SOURCE_COLUMNS = 3
TITLES = {"recall": "Recall", "ndcg": "NDCG", "hit_rate": "Hit rate"}


def sequence_lengths(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Users by length of history, one panel a source; bin b > 0 holds lengths 2^(b − 1) to 2^b − 1."""
    with style(THEMED):
        rows = math.ceil(len(sources) / SOURCE_COLUMNS)
        columns = min(len(sources), SOURCE_COLUMNS)
        drawn = figure(9.6, 0.5 + 1.9 * rows)
        panels = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        bins = max(len(source["histogram"]) for source in sources.values())
        for axes, (name, source) in zip(panels, sources.items()):
            heights = source["histogram"]
            axes.bar(range(1, len(heights)), heights[1:], width=0.86, color=THEMED.alure)
            axes.bar([0], heights[:1], width=0.86, color=THEMED.popularity)
            axes.set_title(name.replace("_", " "))
            axes.text(
                0.99, 0.95, f"{source['events']:,} events\nmedian {source['p50']:,} · longest {source['longest']:,}",
                transform=axes.transAxes, ha="right", va="top", fontsize=8.5, color=THEMED.muted, linespacing=1.5,
            )  # fmt: skip
            only_grid(axes, "y")
            axes.yaxis.set_major_formatter(COUNTS)
        ticks = [0, *range(1, bins, 2)]
        for axes in panels:
            axes.set_xticks(ticks, ["0" if b == 0 else COUNTS(2 ** (b - 1)) for b in ticks])
        for axes in panels[len(sources) :]:
            axes.set_visible(False)
        drawn.supxlabel("events of the source a user (bins double)", fontsize=9.5, color=THEMED.muted)
        drawn.supylabel("users", fontsize=9.5, color=THEMED.muted)
        return to_svg(drawn, "Sequence lengths by source")


def training_curve(curve: Sequence[Mapping[str, float]]) -> str:
    """Loss and its parts over training steps."""
    with style(THEMED):
        drawn = figure(5.4, 3.1)
        axes = drawn.subplots()
        steps = [point["step"] for point in curve]
        parts = [k for k in curve[0] if k not in ("step", "loss") and all(_is_number(p.get(k)) for p in curve)]
        colours = [THEMED.ppr, THEMED.social, THEMED.popularity, THEMED.blend, THEMED.rival]
        for part, colour in zip(parts[: len(colours)], colours):
            axes.plot(steps, [p[part] for p in curve], color=colour, linewidth=1.4, label=part.replace("_", " "))
        axes.plot(steps, [p["loss"] for p in curve], color=THEMED.alure, linewidth=2.2, label="loss (weighted sum)")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats")
        axes.set_ylim(bottom=0)
        axes.set_title("Loss while training")
        only_grid(axes, "y")
        axes.legend(loc="upper right", ncols=2)
        return to_svg(drawn, "Training loss by step")


def validation_bars(groups: Sequence[tuple[str, float, float, str]]) -> str:
    """Pairs of bars: (what, the model's figure, the baseline's, the baseline's name)."""
    with style(THEMED):
        drawn = figure(4.2, 3.1)
        axes = drawn.subplots()
        place = np.arange(len(groups))
        for shift, index, colour in ((-0.2, 1, THEMED.alure), (0.2, 2, THEMED.popularity)):
            heights = [float(g[index]) for g in groups]  # type: ignore[arg-type]
            axes.bar(place + shift, heights, width=0.36, color=colour)
            for x, height in zip(place + shift, heights):
                axes.text(x, height, f"{height:.3f}", ha="center", va="bottom", fontsize=8.5, color=THEMED.muted)
        axes.set_xticks(place, [f"{g[0]}\nvs {g[3]}" for g in groups])
        axes.set_title("Validation: model and baseline")
        axes.margins(y=0.15)
        only_grid(axes, "y")
        return to_svg(drawn, "Validation figures beside their baselines")


def embedding_map(points: Sequence[Sequence[float]], labels: Sequence[str], kind: str) -> str:
    """Users laid out in the plane, coloured by `labels` (pixels inside the SVG: thousands of points)."""
    with style(THEMED):
        drawn = figure(9.6, 5.6)
        axes = drawn.subplots()
        draw_map(axes, points, labels, THEMED)
        axes.set_title(f"{len(points):,} users, colour: {kind}")
        return to_svg(drawn, "Map of user embeddings")


def draw_map(
    axes: Axes, points: Sequence[Sequence[float]], labels: Sequence[str], palette: Palette, size: float = 9.0
) -> None:
    """Points coloured by label, the rarest in grey; a legend to the right, the commonest label first."""
    xy, names = np.asarray(points, dtype=np.float64), np.asarray(labels)
    found, counts = np.unique(names, return_counts=True)
    order = [str(found[i]) for i in np.lexsort((found, -counts))]
    named = order if len(order) <= len(CATEGORIES) else order[: len(CATEGORIES) - 1]
    colour_of = dict(zip(named, CATEGORIES))
    shuffled = np.random.default_rng(0).permutation(len(xy))  # so that no colour lies on top everywhere
    colours = np.array([colour_of.get(str(name), OTHERS) for name in names])
    axes.scatter(
        xy[shuffled, 0], xy[shuffled, 1], s=size, c=colours[shuffled], alpha=0.8, linewidths=0, rasterized=True
    )
    for name in named:
        axes.scatter([], [], s=26, color=colour_of[name], label=name)
    if len(named) < len(order):
        axes.scatter([], [], s=26, color=OTHERS, label=f"{len(order) - len(named)} others")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2, labelspacing=0.55)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.set_frame_on(False)
    axes.set_aspect("equal", adjustable="datalim")


def similarities(graphs: Mapping[str, Mapping[str, Any]]) -> str:
    """Distribution of edge similarities, one panel a graph (their scales differ)."""
    with style(THEMED):
        drawn = figure(9.6, 2.7)
        panels = drawn.subplots(1, len(graphs), squeeze=False).ravel()
        for axes, (name, graph) in zip(panels, graphs.items()):
            edges, counts = np.array(graph["similarity_edges"]), np.array(graph["similarity_counts"])
            axes.stairs(counts, edges, fill=True, color=THEMED.of_set(name), alpha=0.85)
            axes.set_title(f"{label(name)}: median {graph['similarity_median']:.3g}")
            axes.set_xlabel("cosine" if name == "alure" else "similarity")
            axes.yaxis.set_major_formatter(COUNTS)
            only_grid(axes, "y")
        panels[0].set_ylabel("edges")
        return to_svg(drawn, "Similarity of linked users by graph")


def degrees(graphs: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of users with at least x incoming edges, log-log, all graphs in one panel."""
    with style(THEMED):
        drawn = figure(6.4, 3.0)
        axes = drawn.subplots()
        for name, graph in graphs.items():
            counts = np.array(graph["in_degree_counts"], dtype=np.float64)  # users with in-degree 0, 1, 2, …
            share = np.cumsum(counts[::-1])[::-1] / counts.sum()
            axes.step(
                np.arange(1, len(counts)), share[1:], where="post", color=THEMED.of_set(name), linewidth=1.8,
                label=f"{label(name)}: max {len(counts) - 1:,}, nobody's neighbour {counts[0] / counts.sum():.1%}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("users who have this user as a neighbour (in-degree)")
        axes.set_ylabel("share of users with at least as many")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.xaxis.set_major_formatter(COUNTS)
        axes.legend(loc="lower left")
        axes.tick_params(length=0, which="both")
        return to_svg(drawn, "In-degree distribution by graph")


def candidates(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The paper's Figure 8: users by number of retrieved ads, one panel a candidate set."""
    with style(THEMED):
        columns = min(len(sets), 3)
        rows = math.ceil(len(sets) / columns)
        drawn = figure(9.6, 0.4 + 2.0 * rows)
        panels = drawn.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, (name, counted) in zip(panels, sets.items()):
            axes.stairs(counted["counts"], counted["edges"], fill=True, color=THEMED.of_set(name), alpha=0.85)
            axes.axvline(counted["mean"], color=THEMED.ink, linewidth=1.0, linestyle=(0, (3, 3)))
            axes.set_title(f"{label(name)}: mean {counted['mean']:,.0f}")
            axes.yaxis.set_major_formatter(COUNTS)
            axes.xaxis.set_major_formatter(COUNTS)
            only_grid(axes, "y")
        for axes in panels[len(sets) :]:
            axes.set_visible(False)
        drawn.supxlabel("ads retrieved for a user", fontsize=9.5, color=THEMED.muted)
        drawn.supylabel("users", fontsize=9.5, color=THEMED.muted)
        return to_svg(drawn, "Candidates a user")


def recall(sets: Sequence[Mapping[str, Any]], ks: Sequence[int], metric: str = "recall") -> str:
    """Points with 95 % intervals, one panel a K, candidate sets down the side."""
    with style(THEMED):
        drawn = figure(9.6, 1.0 + 0.34 * len(sets))
        panels = drawn.subplots(1, len(ks), sharey=True, squeeze=False).ravel()
        draw_recall(panels, sets, ks, metric, THEMED)
        return to_svg(drawn, f"{metric.replace('_', ' ')} of the candidate sets")


def draw_recall(
    panels: Any, sets: Sequence[Mapping[str, Any]], ks: Sequence[int], metric: str, palette: Palette
) -> None:
    for axes, k in zip(panels, ks):
        for row, figures in enumerate(sets):
            found = figures["metrics"][metric][str(k)]
            if found is None:
                continue
            colour = palette.of_set(figures["name"])
            axes.barh(row, found["value"], height=0.56, color=colour, alpha=0.24)
            axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot([found["value"]], [row], "o", color=colour, markersize=6)
            axes.annotate(
                f"{100 * found['value']:.1f} %", (found["high"], row), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=palette.ink,
            )  # fmt: skip
        axes.set_title(f"{TITLES[metric]}@{k}")
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PERCENT)
        only_grid(axes, "x")
        row_labels(axes, [figures["name"] for figures in sets])


def differences(found: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> str:
    """Paired differences of recall with 95 % intervals; what crosses zero is not significant."""
    rows = list(dict.fromkeys((d["set"], d["baseline"]) for d in found))
    with style(THEMED):
        drawn = figure(9.6, 1.0 + 0.32 * len(rows))
        panels = drawn.subplots(1, len(ks), sharey=True, squeeze=False).ravel()
        for axes, k in zip(panels, ks):
            axes.axvline(0, color=THEMED.ink, linewidth=1.0)
            for d in found:
                if d["metric"] != "recall" or d["k"] != k:
                    continue
                row = rows.index((d["set"], d["baseline"]))
                colour = THEMED.muted if not d["significant"] else THEMED.good if d["value"] > 0 else THEMED.bad
                axes.plot([d["low"], d["high"]], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
                axes.plot([d["value"]], [row], "o", color=colour, markersize=6)
            axes.set_title(f"Difference of recall@{k}")
            axes.xaxis.set_major_formatter(PERCENT)
            axes.margins(x=0.12)
            only_grid(axes, "x")
            axes.set_yticks(range(len(rows)), [f"{label(a)} − {label(b)}" for a, b in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
        return to_svg(drawn, "Paired differences of recall")


def ne_gains(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """NE of the ranker without and with ALURE features, with 95 % intervals; lower is better, 1 is the base rate."""
    with style(THEMED):
        drawn = figure(6.4, 0.9 + 0.62 * len(tasks))
        axes = drawn.subplots()
        names = list(tasks)
        for row, name in enumerate(names):
            for shift, key, colour in ((-0.16, "ne_without", THEMED.popularity), (0.16, "ne_with", THEMED.alure)):
                one = tasks[name][key]
                axes.plot([one["low"], one["high"]], [row + shift] * 2, color=colour, linewidth=2.2)
                axes.plot([one["value"]], [row + shift], "o", color=colour, markersize=6)
                axes.annotate(
                    f"{one['value']:.4f} {'with' if key == 'ne_with' else 'without'} ALURE", (one["high"], row + shift),
                    xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, color=THEMED.ink,
                )  # fmt: skip
        axes.axvline(1.0, color=THEMED.muted, linewidth=1.0, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(names)), [name.upper() for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("normalized entropy (dashed: always predicting the base rate)")
        axes.margins(x=0.3)
        only_grid(axes, "x")
        return to_svg(drawn, "Normalized entropy with and without ALURE features")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def readme(path: Path, sets: Sequence[Mapping[str, Any]], ks: Sequence[int], mapped: Mapping[str, Any] | None) -> None:
    """One figure for the README: recall of every candidate set, and the map of users. `path` ends in .svg or .png."""
    with style(LIGHT), matplotlib.rc_context({"svg.fonttype": "path"}):
        drawn = figure(11.0, 3.6 if mapped else 1.2 + 0.34 * len(sets))
        drawn.set_facecolor("white")
        widths = [1.0] * len(ks) + ([1.5] if mapped else [])
        panels = drawn.subplots(1, len(widths), width_ratios=widths)
        panels = np.atleast_1d(panels)
        draw_recall(panels[: len(ks)], sets, ks, "recall", LIGHT)
        for axes in panels[1 : len(ks)]:
            axes.set_yticklabels([])
        if mapped:
            draw_map(panels[-1], mapped["points"], mapped["labels"], LIGHT, size=3.5)
            panels[-1].get_legend().remove()
            panels[-1].set_title(f"Users by embedding, colour: {mapped['kind']}")
        drawn.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
