"""How figures are written in the report's text."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def count(value: Any) -> str:
    return f"{int(value):,}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{100 * found['value']:.1f}% ± {50 * (found['high'] - found['low']):.1f}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def log_share(count: float, widest: float) -> float:
    """Length of a bar on a log scale from 1 to `widest`."""
    return math.log10(max(count, 1)) / max(math.log10(max(widest, 10)), 1e-9)


def when(timestamp: int | None) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC") if timestamp is not None else "unknown"
