"""Progress that a person watches on a terminal and a log collector reads elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

console = Console(stderr=True)  # stdout belongs to results
LOG_EVERY_S = 10.0
WIDE = 110  # columns of a terminal; a narrower one has no room for all
SUFFIXES = ("", "k", "M", "G", "T", "P", "E")
silent = False  # in a process that works beside the one that speaks


@contextmanager
def muted(mute: bool) -> Iterator[None]:
    """Inside the block neither lines nor bars appear, where `mute`."""
    global silent
    before, silent = silent, mute
    try:
        yield
    finally:
        silent = before


def say(message: str) -> None:
    """One line for whoever watches: styled on a terminal, plain elsewhere."""
    if silent:
        return
    if console.is_terminal:
        console.print(message, highlight=False, markup=False)
    else:
        print(message, file=sys.stderr, flush=True)  # noqa: T201


class Track:
    """Counts work done; `advance` from the loop that does it."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.before = self.done = done
        self.started = self.spoke = time.monotonic()

    @property
    def rate(self) -> float:
        return (self.done - self.before) / max(time.monotonic() - self.started, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.spoke >= LOG_EVERY_S:
            self.spoke = now
            left = f"{(self.total - self.done) / self.rate:,.0f} s left" if self.rate else "time left unknown"
            tail = f" · {note}" if note else ""
            counts = f"{self.done:,}/{self.total:,} {self.unit} · {figure(self.rate)}/s"
            say(f"{self.label}: {counts} · {left}{tail}")


def figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def short(number: float) -> str:
    """999, 1.23k, 45.6M: three digits."""
    power = 0
    while abs(number) >= 999.5 and power < len(SUFFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g}{SUFFIXES[power]}"


class _TerminalTrack(Track):
    def __init__(self, label: str, total: int, unit: str, done: int, bar: Progress) -> None:
        super().__init__(label, total, unit, done)
        self.bar = bar
        self.task = bar.add_task(label, total=total, completed=done, counts=self.counts(), note="")

    def counts(self) -> str:
        return f"{short(self.done)}/{short(self.total)} {self.unit} · {short(self.rate)}/s"

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.bar.update(self.task, advance=count, counts=self.counts(), note=note)


@contextmanager
def track(label: str, total: int, unit: str, done: int = 0) -> Iterator[Track]:
    """`with track("Embedding users", n, "users") as bar: ... bar.advance(64, note="loss 0.31")`.

    done: work of an earlier run that this one goes on from; it counts as done, but not to the rate.
    """
    if silent or not console.is_terminal:
        yield Track(label, total, unit, done)
        return
    note = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, max_width=max(console.width - 48, 1)))
    columns = [TextColumn("{task.description}"), TextColumn("{task.fields[counts]}"), TimeRemainingColumn(), note]
    if console.width >= WIDE:
        columns[1:1] = [BarColumn(10)]
        columns[3:3] = [TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        yield _TerminalTrack(label, total, unit, done, bar)
