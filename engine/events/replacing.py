"""A folder that is replaced as a whole: built beside the old one, then renamed into its place."""

import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alure.engine.errors import AlureError, InputError
from alure.engine.events.inputs import check_delta_path
from alure.engine.events.manifest import MANIFEST_FILE


def check_replaceable(out: Path) -> None:
    check_delta_path(out)  # the quarantine table lies in it
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; expected a folder to make, or an event log to replace")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise InputError(f"out: {out} is not empty and not an event log, so it is not replaced; name another folder")


def siblings(out: Path, label: str) -> list[Path]:
    out = out.resolve()
    return [Path(p) for p in glob.glob(f"{glob.escape(str(out.parent / f'.{out.name}.{label}'))}-*")]


def recover(out: Path) -> None:
    """Mend what a run left that was killed between the two renames of `publish`: the old folder goes back."""
    out = out.resolve()  # where a link leads; the link stays
    for old in siblings(out, "replaced"):
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A locked sibling folder of `out` to build in; what killed runs have left is removed first."""
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {out.parent} cannot be made: {error.strerror}") from None
    for leftover in siblings(out, "building"):
        with locked(leftover, out):
            shutil.rmtree(leftover)
    folder = out.parent / f".{out.name}.building-{os.getpid()}-{time.time_ns():x}"
    try:
        folder.mkdir()
    except OSError as error:
        raise InputError(f"out: {out.parent} cannot be written: {error.strerror}") from None
    try:
        with locked(folder, out):
            yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when this process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise AlureError(f"out: another process is writing {out}; wait for it, or end it") from None
    finally:
        os.close(handle)


def publish(folder: Path, out: Path) -> None:
    """Put `folder` in the place of `out`. Readers that have the old files mapped keep reading them."""
    out = out.resolve()
    if not out.exists() or not any(out.iterdir()):
        folder.rename(out)  # an empty folder is replaced by the rename itself
        return
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    out.rename(old)
    folder.rename(out)
    shutil.rmtree(old)
