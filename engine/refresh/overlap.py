"""Work beside work, so that a device never waits for the host: what comes next is read and prepared, what is done is
written.

On a CPU both take what the model would use, and `depth` is 0: everything happens in the caller's thread, in order.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")


def ahead(make: Callable[[T], U], things: Iterable[T], depth: int) -> Generator[tuple[T, U, int], None, None]:
    """Each thing, make(thing), and how many more are ready, in order; up to `depth` are made beforehand, by as many
    threads.

    What `make` raises is raised where its thing is due. Nothing more is begun once the iterator is closed.
    """
    if not depth:
        for thing in things:
            yield thing, make(thing), 0
        return
    with ThreadPoolExecutor(depth, thread_name_prefix="alure ahead") as pool:
        waiting: deque[tuple[T, Future[U]]] = deque()

        def first() -> tuple[T, U, int]:
            due, made = waiting.popleft()
            return due, made.result(), sum(other.done() for _, other in waiting)

        try:
            for thing in things:
                waiting.append((thing, pool.submit(copy_context().run, make, thing)))
                if len(waiting) > depth:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, made in waiting:
                made.cancel()


class Behind:
    """Runs one task at a time beside the caller; at the end of the `with` block it is done.

    What a task raises is raised by the next `run`, by `wait`, or at the end of the block unless that fails itself.
    """

    def __init__(self, depth: int) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="alure behind") if depth else None
        self.running: tuple[Future[Any], Callable[[Any], None]] | None = None

    def __enter__(self) -> "Behind":
        return self

    def run(self, task: Callable[[], T], then: Callable[[T], None]) -> None:
        """Waits for the task before, then starts this one; with depth 0 it is done on return.

        then: called with what the task gives, in the caller's thread, once it is done.
        """
        self.wait()
        if self.pool is None:
            then(task())
        else:
            self.running = self.pool.submit(copy_context().run, task), then

    def wait(self) -> None:
        if self.running is not None:
            (running, then), self.running = self.running, None
            then(running.result())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self.pool is not None:
                self.pool.shutdown()
