"""A strict reader of Prometheus' text format 0.0.4: what it lets through, every scraper reads."""

import re
from dataclasses import dataclass, field

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
COMMENT = re.compile(rf"# (HELP|TYPE) ({NAME}) (.+)")
ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass
class Metric:
    kind: str
    help: str
    samples: dict[tuple[tuple[str, str], ...], float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return self.samples[()]


def parse_exposition(text: str) -> dict[str, Metric]:
    """Raises ValueError unless every metric is one group of lines: HELP, TYPE, then samples, no two with one label."""
    if text and not text.endswith("\n"):
        raise ValueError("the last line has no end")
    found: dict[str, Metric] = {}
    explained: tuple[str, str] | None = None
    open_name = ""
    for line in text.split("\n")[:-1]:
        if comment := COMMENT.fullmatch(line):
            kind, name, rest = comment.groups()
            if name in found:
                raise ValueError(f"{name}: a second group: {line!r}")
            if kind == "HELP":
                explained = (name, rest)
            elif explained is None or explained[0] != name or rest not in ("counter", "gauge"):
                raise ValueError(f"TYPE without HELP, or of a type unknown: {line!r}")
            else:
                found[name], open_name, explained = Metric(rest, explained[1]), name, None
        elif (sample := SAMPLE.fullmatch(line)) and sample[1] == open_name:
            labels = tuple(
                (label, re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], value))
                for label, value in re.findall(LABEL, sample[2] or "")
            )
            if labels in found[open_name].samples:
                raise ValueError(f"twice: {line!r}")
            found[open_name].samples[labels] = float(sample[sample.lastindex or 0])
        else:
            raise ValueError(f"neither a comment nor a sample of {open_name}: {line!r}")
    for name, metric in found.items():
        if not metric.samples or (metric.kind == "counter") != name.endswith("_total"):
            raise ValueError(f"{name}: {metric}")
    return found
