"""What every chart of the report shares: the palette, the axes' looks, and SVG that follows the page's theme.

Charts are drawn once. In the report their colours are names (CSS variables), so the same drawing is right on a light
and on a dark page; elsewhere (the README) they are the light theme's colours.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter


@dataclass(frozen=True)
class Palette:
    """Colours by role. `sources` are told apart within one chart, in this order."""

    ink: str
    muted: str
    grid: str
    alure: str
    blend: str
    rival: str
    social: str
    ppr: str
    popularity: str
    good: str
    bad: str

    def of_set(self, name: str) -> str:
        """The colour of a graph, or of a candidate set (graphs joined by "+")."""
        graphs = name.split("+")
        if len(graphs) > 1:
            return self.blend if "alure" in graphs else self.rival
        return {"alure": self.alure, "social": self.social, "ppr": self.ppr, "popularity": self.popularity}.get(
            name, self.rival
        )


LIGHT = Palette(
    ink="#1b1d27", muted="#676c7e", grid="#e4e6ee", alure="#4f46e5", blend="#8b2fc9", rival="#b7791f",
    social="#e0922f", ppr="#0f9f8f", popularity="#8a90a3", good="#15803d", bad="#c2410c",
)  # fmt: skip
DARK = Palette(
    ink="#eceef6", muted="#9aa1b5", grid="#2b3040", alure="#8f8bff", blend="#cf8bf5", rival="#d9a441",
    social="#f2b25c", ppr="#40cdbb", popularity="#8a90a3", good="#4ade80", bad="#fb923c",
)  # fmt: skip
ROLES = [f.name for f in fields(Palette)]
THEMED = Palette(**{role: f"#01f0{i:02x}" for i, role in enumerate(ROLES)})  # stand-ins, replaced by CSS variables

# Told apart at small sizes on light and dark; for points drawn as pixels, which cannot follow a theme.
CATEGORIES = (
    "#5b6cf0", "#e2793f", "#27a57c", "#d14d8b", "#b08d1e", "#4aa3df", "#8f5bd0", "#7a9a2e", "#d0524f", "#3bb3b3",
    "#a86f4c", "#6d7fa3", "#c76fd1", "#4f9d4f", "#e0a03a", "#7f6fe0",
)  # fmt: skip
OTHERS = "#8a90a3"

LABELS = {
    "alure": "ALURE",
    "social": "Follows (BFF)",
    "ppr": "PPR",
    "popularity": "Popularity",
}


def label(name: str) -> str:
    """What a graph or candidate set is called in text: "ALURE + BFF + PPR"."""
    if name in LABELS:
        return LABELS[name]
    short = {"alure": "ALURE", "social": "BFF", "ppr": "PPR"}
    return " + ".join(short.get(graph, graph) for graph in name.split("+"))


@contextmanager
def style(palette: Palette) -> Iterator[None]:
    """Matplotlib settings of all charts."""
    settings: dict[Any, Any] = {
        "font.size": 10.0,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
        "axes.titlecolor": palette.ink,
        "axes.labelcolor": palette.muted,
        "axes.labelsize": 9.5,
        "axes.edgecolor": palette.grid,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.8,
        "figure.facecolor": "none",
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "xtick.labelsize": 9.0,
        "ytick.labelsize": 9.0,
        "xtick.minor.visible": False,
        "text.color": palette.ink,
        "legend.frameon": False,
        "legend.fontsize": 9.0,
        "legend.labelcolor": palette.ink,
        "svg.hashsalt": "alure",
        "text.parse_math": False,  # names come from the input: a "$" is a dollar
    }
    with matplotlib.rc_context(settings):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` × `height` inches, not known to pyplot."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(made)
    return made


def to_svg(drawn: Figure, title: str) -> str:
    """An inline <svg> for the page: text stays text, colours become CSS variables, size follows the page."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "alure"}):
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for role in ROLES:
        text = text.replace(getattr(THEMED, role), f"var(--{role})")
    text = re.sub(r" font-family: [^;\"]*;", "", text).replace("font-weight: 700", "font-weight: 620")
    # ids are unique within one drawing only; the page holds many
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*pt"', "", head)
    head = re.sub(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"| version="[^"]*"', "", head)
    width = float(drawn.get_figwidth()) * 96
    return f'{head} role="img" aria-label="{title}" style="max-width: {width:.0f}px">{rest}'.strip()


def thousands(axis_value: float, _position: int = 0) -> str:
    """12 → 12, 12 000 → 12k, 3 400 000 → 3.4M: axis labels."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(axis_value) >= size:
            return f"{axis_value / size:.3g}{letter}"
    return f"{axis_value:.3g}"


COUNTS = FuncFormatter(thousands)
PERCENT = FuncFormatter(lambda value, _position: f"{100 * value:.3g}%")


def only_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Grid lines across `axis` ("x" or "y") only, and no tick marks."""
    axes.grid(False)
    axes.grid(True, axis=axis)
    axes.tick_params(length=0)


def row_labels(axes: Axes, names: Sequence[str]) -> None:
    """Categories down the y axis, the first on top."""
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
