"""Who works on which unit: any number of processes that share the store take units as they come free.

A lease saves work, it does not guard the result: a unit that two write is committed once. So a lease may be lost, or
taken over from a holder that is only slow, at no cost but time.
"""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from alure.engine.store.location import Location
from alure.engine.store.s3 import S3Location

EXPIRES_S = 120.0  # without a sign of life from a holder on another machine; of a dead process on this one at once


class Leases(Protocol):
    """Of one holder, in STORE/leases/<generation>."""

    def claim(self, unit: str) -> bool:
        """Take the unit, unless someone alive has it."""

    def keep(self) -> None:
        """A sign of life."""

    def release(self, unit: str) -> None: ...

    def close(self) -> None: ...


def open_leases(folder: Location) -> Leases:
    return S3Leases(folder) if isinstance(folder, S3Location) else FileLeases(folder)


class FileLeases:
    """A file a holder, touched while it lives, and hard links to it named as the units."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.holder = folder, _this_process()
        self.mine = folder / f"holder {self.holder}"
        self._appear()

    def _appear(self) -> None:
        while not self.mine.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # whoever left last, or published, took the folder again
                self.mine.write_text(self.holder)

    def claim(self, unit: str) -> bool:
        try:
            os.link(self.mine, self.folder / unit)
        except FileExistsError:
            if not self._abandoned(self.folder / unit):
                return False
            self.release(unit)
            return self.claim(unit)
        except FileNotFoundError:  # the generation is published, or was vacuumed, and its leases are gone
            self._appear()
            return self.claim(unit)
        return True

    def keep(self) -> None:
        with suppress(FileNotFoundError):
            os.utime(self.mine)

    def release(self, unit: str) -> None:
        (self.folder / unit).unlink(missing_ok=True)

    def close(self) -> None:
        self.mine.unlink(missing_ok=True)
        with suppress(OSError):  # others are there, or it is gone
            self.folder.rmdir()  # made again by a straggler, after the publication

    def _abandoned(self, path: Path) -> bool:
        try:
            holder, touched = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return True
        return _abandoned(holder, self.holder, time.time() - touched)


class S3Leases:
    """An object a unit, that holds its holder's name and is written again while the holder lives."""

    def __init__(self, folder: S3Location) -> None:
        self.folder, self.holder = folder, _this_process()
        self.held: dict[str, S3Location] = {}
        self.kept_at = time.monotonic()

    def claim(self, unit: str) -> bool:
        lease = self.folder / unit
        while not lease.write_once(self.holder.encode()):
            found = lease.read()
            if found is not None:
                holder, age_s = found
                if not _abandoned(holder.decode(), self.holder, age_s):
                    return False
                lease.delete()
        self.held[unit] = lease
        return True

    def keep(self) -> None:
        if time.monotonic() - self.kept_at > EXPIRES_S / 4:
            for lease in list(self.held.values()):
                lease.write(self.holder.encode())
            self.kept_at = time.monotonic()

    def release(self, unit: str) -> None:
        self.held.pop(unit, None)
        (self.folder / unit).delete()

    def close(self) -> None:
        pass


def _this_process() -> str:
    return f"{_beginning(os.getpid())}@{socket.gethostname()}:{os.getpid()}"


def _abandoned(holder: str, mine: str, age_s: float) -> bool:
    """Whether a lease may be taken over, given its holder, who asks, and the age of the holder's last sign of life."""
    place, _, process = holder.rpartition(":")
    beginning, _, host = place.partition("@")
    if host == mine.rpartition(":")[0].partition("@")[2]:
        return holder == mine or _beginning(int(process)) != beginning
    return age_s > EXPIRES_S


def _beginning(process: int) -> str | None:
    """When a live process began, None where there is none: ids are given again, in a container started anew the very
    same. Without /proc "live".
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else "live"
    return None if fields[0] in "ZX" else fields[19]  # a zombie is dead; 19: its start, in ticks since the system's
