"""What the plots of the races share: one look, names at the ends of their lines, SVG files that repeat to the byte."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
OURS = "#0a58ca"


@contextmanager
def saved_figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of `size` in inches, written to `path` at the end."""
    style: Any = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "alure"}
    with plt.rc_context(style | {"text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED}):
        figure = plt.figure(figsize=size)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
        plt.close(figure)


def conditions(row: dict[str, Any]) -> str:
    """Where and how a row was measured."""
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['device']}, {threads}, {row['clock']}. PyTorch {row['torch']}."


def name_at_end(axis: Axes, name: str, end: tuple[float, float], place: float, colour: str) -> None:
    """The name of a line beside the axes at height `place`, tied to the line's end."""
    axis.annotate(
        name,
        end,
        (1.03, place),
        textcoords=axis.get_yaxis_transform(),
        va="center",
        color=colour,
        fontweight="bold" if name.startswith("alure") else "normal",
        arrowprops={"arrowstyle": "-", "color": GRID, "lw": 0.8, "shrinkA": 1, "shrinkB": 2},
    )


def apart(values: list[float], gap: float) -> list[float]:
    """The values moved up just as far as keeps `gap` between any two."""
    places, last = list(values), -float("inf")
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        last = places[index] = max(values[index], last + gap)
    return places


def quiet(axis: Axes, grid: Literal["x", "y"]) -> None:
    axis.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(axis=grid, color=GRID, lw=0.8)
    axis.set_axisbelow(True)
