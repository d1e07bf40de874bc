"""The report's charts, each from plain numbers: every function returns an inline <svg>; `readme` writes a file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
        drawn = figure(10.4, 0.5 + 1.9 * rows)
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
            axes.set_xticks(ticks, [_power(b) for b in ticks])
        for axes in panels[len(sources) :]:
            axes.set_visible(False)
        drawn.supxlabel("events of the source a user (bins double)", fontsize=9.5, color=THEMED.muted)
        drawn.supylabel("users", fontsize=9.5, color=THEMED.muted)
        return to_svg(drawn, "Sequence lengths by source")


def training(curve: Sequence[Mapping[str, float]], validation: Sequence[tuple[str, float, float, str]]) -> str:
    """Loss and its parts over steps; beside it validation figures: (what, the model's, the baseline's, its name)."""
    recalls = [v for v in validation if v[0].startswith("recall")]
    entropies = [v for v in validation if not v[0].startswith("recall")]
    beside = [part for part in (recalls, entropies) if part]
    with style(THEMED):
        drawn = figure(10.4, 3.2)
        panels = np.atleast_1d(drawn.subplots(1, 1 + len(beside), width_ratios=[2.2, *[1.0] * len(beside)]))
        axes = panels[0]
        steps = [point["step"] for point in curve]
        parts = [k for k in curve[0] if k not in ("step", "loss") and all(_is_number(p.get(k)) for p in curve)]
        colours = [THEMED.ppr, THEMED.social, THEMED.popularity, THEMED.blend, THEMED.rival]
        for part, colour in zip(parts[: len(colours)], colours):
            axes.plot(steps, [p[part] for p in curve], color=colour, linewidth=1.4, label=part.replace("_", " "))
        axes.plot(steps, [p["loss"] for p in curve], color=THEMED.alure, linewidth=2.2, label="loss (weighted sum)")
        axes.set_xlabel("step")
        axes.set_ylabel("nats")
        axes.set_ylim(bottom=0)
        axes.set_title("Loss while training")
        only_grid(axes, "y")
        axes.legend(loc="upper right", ncols=2)
        for axes, pairs in zip(panels[1:], beside):
            _beside_baseline(axes, pairs)
        return to_svg(drawn, "Training loss and validation")


def _beside_baseline(axes: Axes, pairs: Sequence[tuple[str, float, float, str]]) -> None:
    """Recall as bars from zero; entropies as points, because what matters are small differences near 1."""
    place = np.arange(len(pairs))
    is_recall = pairs[0][0].startswith("recall")
    for shift, index, colour in ((-0.19, 1, THEMED.alure), (0.19, 2, THEMED.popularity)):
        heights = [float(pair[index]) for pair in pairs]
        if is_recall:
            axes.bar(place + shift, heights, width=0.36, color=colour)
        else:
            axes.plot(place + shift, heights, "o", color=colour, markersize=8)
        for x, height in zip(place + shift, heights):
            text = f"{100 * height:.1f}%" if is_recall else f"{height:.3f}"
            axes.annotate(
                text, (x, height), xytext=(0, 3 if is_recall else 7), textcoords="offset points", ha="center",
                fontsize=8.5, color=THEMED.ink,
            )  # fmt: skip
    axes.set_xticks(place, [pair[0].removeprefix("NE ").upper() if not is_recall else pair[0] for pair in pairs])
    axes.set_title(f"{'Recall' if is_recall else 'NE'} (grey: {pairs[0][3]})")
    if is_recall:
        axes.yaxis.set_major_formatter(PERCENT)
    else:
        axes.axhline(1.0, color=THEMED.muted, linewidth=1.0, linestyle=(0, (3, 3)))
        axes.set_xlim(-0.7, len(pairs) - 0.3)
    axes.margins(y=0.2)
    only_grid(axes, "y")


def embedding_map(points: Sequence[Sequence[float]], labels: Sequence[str], kind: str) -> str:
    """Users laid out in the plane, coloured by `labels` (pixels inside the SVG: thousands of points)."""
    with style(THEMED):
        drawn = figure(10.4, 6.0)
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
        drawn = figure(10.4, 2.8)
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
        drawn = figure(10.4, 3.2)
        axes = drawn.subplots()
        for name, graph in graphs.items():
            counts = np.array(graph["in_degree_counts"], dtype=np.float64)  # users with in-degree 0, 1, 2, …
            share = np.cumsum(counts[::-1])[::-1] / counts.sum()
            axes.step(
                np.arange(1, len(counts)), share[1:], where="post", color=THEMED.of_set(name), linewidth=1.8,
                label=f"{label(name)}\nat most {len(counts) - 1:,} · nobody's: {counts[0] / counts.sum():.1%}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("users who have this user as a neighbour (in-degree)")
        axes.set_ylabel("share of users with at least as many")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.xaxis.set_major_formatter(COUNTS)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), labelspacing=1.0)
        axes.tick_params(length=0, which="both")
        return to_svg(drawn, "In-degree distribution by graph")


def candidates(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The paper's Figure 8: users by number of retrieved ads, one panel a candidate set."""
    with style(THEMED):
        columns = min(len(sets), 3)
        rows = math.ceil(len(sets) / columns)
        drawn = figure(10.4, 0.4 + 2.0 * rows)
        panels = drawn.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, (name, counted) in zip(panels, sets.items()):
            axes.stairs(counted["counts"], counted["edges"], fill=True, color=THEMED.of_set(name), alpha=0.85)
            axes.axvline(counted["mean"], color=THEMED.ink, linewidth=1.0, linestyle=(0, (3, 3)))
            axes.set_title(f"{label(name)}: mean {counted['mean']:,.0f}")
            axes.yaxis.set_major_formatter(COUNTS)
            axes.xaxis.set_major_formatter(COUNTS)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            only_grid(axes, "y")
        for axes in panels[len(sets) :]:
            axes.set_visible(False)
        drawn.supxlabel("ads retrieved for a user", fontsize=9.5, color=THEMED.muted)
        drawn.supylabel("users", fontsize=9.5, color=THEMED.muted)
        return to_svg(drawn, "Candidates a user")


def recall(sets: Sequence[Mapping[str, Any]], ks: Sequence[int], metric: str = "recall") -> str:
    """Points with 95 % intervals, one panel a K, candidate sets down the side."""
    with style(THEMED):
        drawn = figure(10.4, 1.0 + 0.34 * len(sets))
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
            _interval(axes, found, row, colour, f"{100 * found['value']:.1f}%", palette)
        axes.set_title(f"{TITLES[metric]}@{k}")
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(PERCENT)
        only_grid(axes, "x")
        row_labels(axes, [figures["name"] for figures in sets])


def differences(found: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> str:
    """Paired differences of recall with 95 % intervals; what crosses zero is not significant."""
    rows = list(dict.fromkeys((d["set"], d["baseline"]) for d in found))
    rows.sort(key=lambda pair: ("alure" not in pair[0].split("+"), len(pair[0]), pair[1]))
    with style(THEMED):
        drawn = figure(10.4, 1.0 + 0.32 * len(rows))
        panels = drawn.subplots(1, len(ks), sharey=True, squeeze=False).ravel()
        for axes, k in zip(panels, ks):
            axes.axvline(0, color=THEMED.ink, linewidth=1.0)
            for d in found:
                if d["metric"] != "recall" or d["k"] != k:
                    continue
                row = rows.index((d["set"], d["baseline"]))
                colour = THEMED.muted if not d["significant"] else THEMED.good if d["value"] > 0 else THEMED.bad
                _interval(axes, d, row, colour, f"{100 * d['value']:+.1f}", THEMED)
            axes.set_title(f"Δ recall@{k}, percentage points")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{100 * value:+.3g}" if value else "0"))
            axes.margins(x=0.24)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            only_grid(axes, "x")
            axes.set_yticks(range(len(rows)), [f"{label(a)} − {label(b)}" for a, b in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
        return to_svg(drawn, "Paired differences of recall")


def ne_gains(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """NE of the ranker without and with ALURE features (lower is better), and the relative gain, 95 % intervals."""
    with style(THEMED):
        drawn = figure(10.4, 1.1 + 0.62 * len(tasks))
        left, right = drawn.subplots(1, 2, sharey=True)
        names = list(tasks)
        for row, name in enumerate(names):
            for shift, key, colour in ((-0.17, "ne_without", THEMED.popularity), (0.17, "ne_with", THEMED.alure)):
                one = tasks[name][key]
                text = f"{one['value']:.4f} {key.removeprefix('ne_')}"
                _interval(left, one, row + shift, colour, text, THEMED)
            gain = tasks[name]["gain"]
            colour = (
                THEMED.muted if not tasks[name]["significant"] else THEMED.good if gain["value"] > 0 else THEMED.bad
            )
            _interval(right, gain, row, colour, f"{100 * gain['value']:+.2f}%", THEMED)
        left.set_title("Normalized entropy (lower is better)")
        right.set_title("Gain from ALURE's features")
        right.axvline(0, color=THEMED.ink, linewidth=1.0)
        right.xaxis.set_major_formatter(PERCENT)
        left.set_yticks(range(len(names)), [name.upper() for name in names])
        left.set_ylim(len(names) - 0.5, -0.5)
        for axes in (left, right):
            axes.margins(x=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            only_grid(axes, "x")
        return to_svg(drawn, "Normalized entropy with and without ALURE features")


def _interval(axes: Axes, found: Mapping[str, float], row: float, colour: str, text: str, palette: Palette) -> None:
    """A point with its 95 % interval, and `text` outwards of it."""
    axes.plot([found["low"], found["high"]], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot([found["value"]], [row], "o", color=colour, markersize=6)
    outwards = -1 if found["value"] < 0 else 1
    axes.annotate(
        text, (found["low" if outwards < 0 else "high"], row), xytext=(7 * outwards, 0), textcoords="offset points",
        ha="right" if outwards < 0 else "left", va="center", fontsize=8.5, color=palette.ink,
    )  # fmt: skip


def _power(bin_: int) -> str:
    """The first length of a bin of doubling widths."""
    first = 0 if bin_ == 0 else 2 ** (bin_ - 1)
    return str(first) if first < 1_000 else f"{first // 1_000}k"


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
            kind = "planted interest" if "planted" in mapped["kind"] else mapped["kind"]
            panels[-1].set_title(f"Embeddings, by {kind}")
        drawn.savefig(path, dpi=150, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
