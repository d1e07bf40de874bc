"""The shard function in several processes of this machine. One that dies leaves its unit to the others."""

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.progress import say
from alure.engine.refresh.embedder import Work
from alure.engine.refresh.shard import Job, Progress, run_shard
from alure.engine.signals import StopFlag


def run_workers(job: Job, devices: list[str], flag: StopFlag, progress: Progress) -> Work:
    """`run_shard` in one process a device. Raises what the first to fail raised, AlureError where all died."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    for device in devices:
        receiver, sender = context.Pipe(duplex=False)
        workers[receiver] = context.Process(target=_work, args=(job, device, len(devices), sender), daemon=True)
        workers[receiver].start()
        sender.close()
    try:
        return _collect(dict(workers), flag, progress)
    finally:
        for receiver, process in workers.items():
            receiver.close()
            process.terminate()
        for process in workers.values():
            process.join()


def _collect(workers: dict[Connection, SpawnProcess], flag: StopFlag, progress: Progress) -> Work:
    done, finished, code = Work(), 0, None
    told = {receiver: Work() for receiver in workers}
    while workers:
        flag.check()
        ready = wait(list(workers), timeout=0.5)
        for receiver in [pipe for pipe in workers if pipe in ready]:
            try:
                kind, value = receiver.recv()
            except EOFError:
                process = workers.pop(receiver)
                process.join()
                code = process.exitcode or code
                lost = told[receiver]  # of a dead one, whose unit is done again
                progress.add(Work(pending=-lost.pending, ready=-lost.ready))
                if process.exitcode:
                    say(f"refresh: a worker died with exit code {process.exitcode}; the others take its unit over")
                continue
            if kind == "work":
                told[receiver].add(value)
                progress.add(value)
            elif kind == "done":
                done.add(value)
                finished += 1
            else:
                raise _ERRORS[kind](value)
    if not finished:
        raise AlureError(
            f"refresh: all workers died, the last with exit code {code} (−9: out of memory?); finished units are kept, "
            "run again with fewer workers or a smaller --token-budget"
        )
    return done


_ERRORS: dict[str, type[AlureError]] = {kind.__name__: kind for kind in (AlureError, InputError, Interrupted)}


class Reporter:
    """A worker's progress, told to the parent."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent

    def add(self, work: Work) -> None:
        self.parent.send(("work", work))


def threads_of(workers: int) -> int:
    """Of each worker, where several share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // workers)


def _work(job: Job, device: str, workers: int, parent: Connection) -> None:
    torch.set_num_threads(threads_of(workers))
    try:
        try:
            parent.send(("done", run_shard(job, device, Reporter(parent))))
        except AlureError as error:
            parent.send((type(error).__name__, str(error)))  # it is raised there
    except BrokenPipeError:
        sys.exit(1)  # the parent has stopped, and says why
