"""What a job is doing now: the note beside its progress bar, and the live figures that Prometheus reads."""

import math
import time
from typing import Any

from alure.engine.progress import Track, short
from alure.engine.refresh.embedder import Work
from alure.engine.refresh.outlook import Outlook


class Watch:
    """Sums up what all workers of a run do; `figures` may be called from any thread."""

    def __init__(self) -> None:
        self.began, self.embedding_since = time.monotonic(), math.inf
        self.done, self.outlook = Work(), Outlook()
        self.units = self.reused = 0
        self.matrix_rate: float | None = None  # FLOP/s, one device's times their number; None: not measured
        self.bar: Track | None = None

    def plan(self, outlook: Outlook, units: int, reused: int) -> None:
        """units: of the generation, of which `reused` were written before."""
        self.outlook, self.units, self.reused = outlook, units, reused

    def start(self, bar: Track) -> None:
        """From now on users are embedded, which `bar` counts by their events."""
        self.embedding_since, self.bar = time.monotonic(), bar

    def add(self, work: Work) -> None:
        self.done.add(work)
        if self.bar is not None:
            self.bar.advance(work.tokens, note=self.note())

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def rate(self, amount: float) -> float:
        """A second of embedding; 0 before it begins."""
        return amount / max(time.monotonic() - self.embedding_since, 1e-9)

    def share_of_matrix_rate(self) -> float | None:
        return self.rate(self.done.flops) / self.matrix_rate if self.matrix_rate else None

    def note(self) -> str:
        """For one line of a terminal."""
        done, share = self.done, self.share_of_matrix_rate()
        parts = [f"{short(self.rate(done.embedded))} users/s"]
        parts += [] if share is None else [f"MFU {share:.1%}"]
        parts += [f"{self.reused + done.units}/{self.units} units", f"{short(done.pending)} to write"]
        parts += [f"{done.ready} read ahead"] if done.ready else []
        return " · ".join(parts)

    def figures(self) -> dict[str, Any]:
        """By the names of `report.FIGURES`."""
        done, outlook = self.done, self.outlook
        rate, left = self.rate(done.tokens), outlook.tokens - done.tokens
        return {
            "users_to_embed": outlook.users,
            "users_embedded_total": done.embedded,
            "users_pending": done.pending,
            "events_to_embed": outlook.tokens,
            "events_embedded_total": done.tokens,
            "events_reused_total": done.reused,
            "batches_total": done.batches,
            "batches_ready": done.ready,
            "flops_total": done.flops,
            "units": self.units,
            "units_reused": self.reused,
            "units_written_total": done.units,
            "units_waiting": self.units - self.reused - done.units,
            "quarantined_total": done.bad,
            "users_per_second": self.rate(done.embedded),
            "tokens_per_second": rate,
            "share_of_matrix_rate": self.share_of_matrix_rate(),
            "seconds": self.seconds,
            "seconds_left": max(left, 0) / rate if rate else None,
        }
