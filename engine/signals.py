"""SIGTERM and SIGINT as a flag that long work looks at between steps, so that it stops where nothing is half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from alure.engine.errors import Interrupted


class StopFlag:
    """Set by a signal; `check` raises Interrupted from then on."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.signal_name = ""

    def set(self, number: int, frame: FrameType | None = None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.signal_name = signal.Signals(number).name

    def check(self) -> None:
        if self.signal_name:
            raise Interrupted(f"{self.what}: stopped by {self.signal_name}; run the same command again to go on")


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGINT raise Interrupted at once, in work that keeps no flag; earlier handlers are put back."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; run the same command again to go on")

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For the end of a process, whose result is out."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_flag(what: str) -> Iterator[StopFlag]:
    """The flag that signals set while the block runs; earlier handlers are put back.

    Python takes signals in the main thread only: in another thread the flag is never set.
    """
    flag = StopFlag(what)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, flag.set) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
