"""The attention race as a figure: rate against length, and how many times as long as ours on lengths that differ."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from alure.bench.figure import INK, MUTED, OURS, apart, conditions, name_at_end, quiet, saved_figure

COLOURS = {
    "alure": OURS,
    "Flex": "#bc4c00",
    "SDPA": "#57606a",
    "HSTU": "#8250df",
    "Flash": "#1a7f37",
    "PyTorch": "#1a7f37",
}
PEERS_OF_BARS = 8


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes an SVG of the forward rows of the attention suite at head_dim 64, in the dtype with most cases."""
    rows = [r for r in rows if r["suite"] == "attention" and r.get("median_s") and not r["backward"]]
    rows = [r for r in rows if r["head_dim"] == 64 and "no plan" not in r["implementation"]]
    if not rows:
        raise ValueError("plot: expected timed rows of the attention suite with head_dim 64, got none")
    dtypes = [row["dtype"] for row in rows]
    dtype = max(dict.fromkeys(dtypes), key=dtypes.count)
    rows = [row for row in rows if row["dtype"] == dtype]
    jagged = list(dict.fromkeys(row["shape"] for row in rows if not row["shape"].startswith("equal")))
    with saved_figure(path, (8.4, 7.6 if jagged else 4.2)) as figure:
        below = 0.5 if jagged else 0.0  # the bars' part of the height
        _rates(figure.add_axes((0.045, below + 0.12 * (1 - below), 0.6, (1 - below) * 0.76)), rows)
        for index, shape in enumerate(jagged):
            place = (0.02 + index / len(jagged), 0.085, 0.92 / len(jagged), below - 0.175)
            _ratios(figure.add_axes(place), [row for row in rows if row["shape"] == shape])
        case = f"Forward, {rows[0]['heads']} heads of {rows[0]['head_dim']}, {dtype}."
        figure.text(0.02, 0.015, f"{case} {conditions(rows[0])} Dashed: without a bias.", color=MUTED, fontsize=8)


def _rates(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Lines of the equal lengths, each with its name at its end."""
    rows = [row for row in rows if row["shape"].startswith("equal")]
    unit, divisor = ("TFLOP/s", 1e3) if max((row["gflops"] for row in rows), default=0) >= 1e4 else ("GFLOP/s", 1.0)
    ends = {}
    for name in dict.fromkeys(row["implementation"] for row in rows):
        points = sorted((row["longest"], row["gflops"] / divisor) for row in rows if row["implementation"] == name)
        axis.plot(*zip(*points), **_style(name))
        ends[name] = points[-1]
    axis.set_xscale("log", base=2)
    lengths = sorted({row["longest"] for row in rows})
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(bottom=0)
    axis.set_title(f"Sequences of equal length: {unit}", loc="left", color=INK, fontsize=9)
    axis.set_xlabel("events in a sequence", color=MUTED)
    quiet(axis, "y")
    if not lengths:
        return
    axis.set_xlim(lengths[0] * 0.85, lengths[-1] * 1.15)
    for (name, end), place in zip(ends.items(), apart([y for _, y in ends.values()], axis.get_ylim()[1] / 17)):
        name_at_end(axis, name, end, place, _colour(name))


def _ratios(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Bars: the time over ours, fastest on top."""
    rows = sorted(rows, key=lambda row: row["ours_is_faster_by"])[:PEERS_OF_BARS]
    places = range(len(rows))
    ratios = [row["ours_is_faster_by"] for row in rows]
    axis.barh(places, ratios, height=0.34, color=[_colour(row["implementation"]) for row in rows])
    for place, row in zip(places, rows):
        name, ratio = row["implementation"], row["ours_is_faster_by"]
        weight = "bold" if name.startswith("alure") else "normal"
        axis.text(0, place - 0.3, name, va="bottom", fontsize=8, fontweight=weight)
        axis.text(ratio + max(ratios) * 0.02, place, f"{ratio:.2f}×", va="center", fontsize=8, color=INK)
    axis.set_xlim(0, max(ratios) * 1.18)
    axis.set_ylim(len(rows) - 0.4, -0.8)
    axis.set_yticks([])
    users = f"{rows[0]['users']:,} users, the longest of {rows[0]['longest']:,} events"
    axis.set_title(
        f"{rows[0]['shape'].capitalize()} lengths: time, ours = 1\n{users}", loc="left", color=INK, fontsize=9
    )
    quiet(axis, "x")


def _style(name: str) -> dict[str, Any]:
    ours = name.startswith("alure")
    dashes = "-" if "time bias" in name or "dense bias" in name or "HSTU" in name else (0, (4, 2))  # dashed: no bias
    return {
        "color": _colour(name),
        "lw": 2.4 if ours else 1.5,
        "ls": dashes,
        "marker": "o",
        "ms": 4,
        "zorder": 3 if ours else 2,
    }


def _colour(name: str) -> str:
    return next((colour for word, colour in COLOURS.items() if word in name), MUTED)
