"""The neighbours' race as a figure: the time of all pairs against recall, the time of k-means against its objective."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from alure.bench.figure import INK, MUTED, OURS, apart, conditions, name_at_end, quiet, saved_figure

COLOURS = {
    "alure train_kmeans, k-means++": "#6ea8fe",
    "alure": OURS,
    "big_batch": "#bc4c00",
    "exact": "#57606a",
    "FAISS": "#1a7f37",
    "faiss": "#1a7f37",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes an SVG of the rows of the neighbors suite whose size has the most points of a curve."""
    rows = [row for row in rows if row["suite"] == "neighbors" and row.get("median_s")]
    pairs = _of_one_size([row for row in rows if "recall" in row])
    clusterings = _of_one_size([row for row in rows if "objective" in row])
    if not pairs and not clusterings:
        raise ValueError("plot: expected timed rows of the neighbors suite, got none")
    with saved_figure(path, (10.2, 4.2)) as figure:
        if pairs:
            axis = figure.add_axes((0.05, 0.2, 0.29, 0.66))
            size = f"{pairs[0]['users']:,} × {pairs[0]['channels']}, {pairs[0]['nlist']} lists"
            _curves(axis, pairs, "recall", "nprobe", f"All pairs, {size}: seconds")
            axis.set_xlabel("recall of the 15 nearest; numbers: lists searched", color=MUTED)
        if clusterings:
            axis = figure.add_axes((0.54, 0.2, 0.24, 0.66))
            size = f"{clusterings[0]['users']:,} × {clusterings[0]['channels']}, {clusterings[0]['nlist']} centroids"
            _curves(axis, clusterings, "objective", "niter", f"k-means, {size}: seconds")
            axis.set_xlabel("mean cosine to the centroid; numbers: iterations", color=MUTED)
        figure.text(0.02, 0.02, f"{conditions((pairs + clusterings)[0])} Less is faster.", color=MUTED, fontsize=8)


def _of_one_size(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sizes = [(row["users"], row["channels"]) for row in rows]
    return [row for row, size in zip(rows, sizes) if size == max(dict.fromkeys(sizes), key=sizes.count)]


def _curves(axis: Axes, rows: list[dict[str, Any]], x: str, label: str, title: str) -> None:
    """A line an implementation, seconds on a logarithmic axis; ours tells the `label` of its points."""
    ends = {}
    for name in dict.fromkeys(row["implementation"] for row in rows):
        points = sorted((row[label], row[x], row["median_s"]) for row in rows if row["implementation"] == name)
        _, across, seconds = zip(*points)
        ours = name.startswith("alure")
        axis.plot(across, seconds, color=_colour(name), lw=2.4 if ours else 1.5, marker="o", ms=4, zorder=2 + ours)
        ends[name] = (across[-1], seconds[-1])
        if _colour(name) == OURS and len(points) > 1:
            for number, place, seconds_of in points:
                axis.annotate(
                    f"{number}", (place, seconds_of), (0, -11), textcoords="offset points", ha="center", fontsize=7
                )
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.06, y=0.12)
    axis.set_title(title, loc="left", color=INK, fontsize=9)
    quiet(axis, "y")
    # In units of the axes, since seconds are logarithmic.
    heights = [axis.transAxes.inverted().transform(axis.transData.transform(end))[1] for end in ends.values()]
    for (name, end), height in zip(ends.items(), apart(heights, 0.075)):
        place = axis.transData.inverted().transform(axis.transAxes.transform((0, height)))[1]
        name_at_end(axis, name, end, place, _colour(name))


def _colour(name: str) -> str:
    return next((colour for word, colour in COLOURS.items() if word in name), MUTED)
