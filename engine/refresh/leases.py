"""Who works on which unit: any number of processes that share the store's disk take units as they come free.

A lease saves work, it does not guard the result: a unit that two write is committed once. So a lease may be lost, or
taken over from a holder that is only slow, at no cost but time.
"""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

EXPIRES_S = 120.0  # without a sign of life from a holder on another machine; of a dead process on this one at once


class Leases:
    """STORE/leases/<generation>: a file a holder, touched while it lives, and hard links to it named as the units."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.holder = folder, f"{socket.gethostname()}:{os.getpid()}"
        self.mine = folder / f"holder {self.holder}"
        self.mine.write_text(self.holder)

    def claim(self, unit: str) -> bool:
        """Take the unit, unless someone alive has it."""
        try:
            os.link(self.mine, self.folder / unit)
        except FileExistsError:
            if not self._abandoned(self.folder / unit):
                return False
            self.release(unit)
            return self.claim(unit)
        except FileNotFoundError:  # the generation is published, and its leases are gone
            return False
        return True

    def keep(self) -> None:
        """A sign of life."""
        with suppress(FileNotFoundError):
            os.utime(self.mine)

    def release(self, unit: str) -> None:
        (self.folder / unit).unlink(missing_ok=True)

    def close(self) -> None:
        self.mine.unlink(missing_ok=True)

    def _abandoned(self, path: Path) -> bool:
        try:
            holder, touched = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return True
        host, _, process = holder.rpartition(":")
        if host == self.holder.rpartition(":")[0]:
            return holder == self.holder or not _alive(int(process))
        return time.time() - touched > EXPIRES_S


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
