"""What a retrieval handed out."""

from dataclasses import dataclass, field

import numpy as np

from alure.engine.retrieval.blend import REASON_BITS
from alure.engine.retrieval.engagements import REASONS
from alure.kernels import Candidates

HISTOGRAM_BINS = 30


@dataclass(frozen=True)
class RetrievalReport:
    """`histogram`: users by number of candidates (the paper's Figure 8): counts[b] have edges[b] <= n < edges[b + 1],
    the last bin with its upper edge. Shares are of all candidates; those of graphs sum to over 1 where graphs agree.
    """

    generation: str
    name: str
    as_of: int
    users: int
    users_without_neighbors: int
    users_without_candidates: int
    users_at_cap: int
    candidates: int
    cold_candidates: int  # of ads that nobody has engaged yet
    candidates_per_user: dict[str, float]  # mean and percentiles, over all users
    histogram: dict[str, list[float]]
    reasons: dict[str, float]
    graphs: dict[str, float]
    engagements: int  # events that counted
    eligible: dict[str, int] | None  # of the inventory: rows, unknown_items, items; None where all may be shown
    edges_dropped: int  # to users the log does not know, or of similarity <= 0
    seconds: float


@dataclass
class Tally:
    """Counts over chunks of users."""

    graphs: list[str]
    cap: int
    engaged: np.ndarray  # bool [num_items]
    cold: int = 0
    counts: list[np.ndarray] = field(default_factory=list)
    without_neighbors: int = 0
    bytes_seen: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # by a candidate's reason byte

    def add(self, found: Candidates, num_neighbors: np.ndarray) -> None:
        self.counts.append(np.diff(found.offsets.numpy()))
        self.cold += int((~self.engaged[found.items.numpy()]).sum())
        self.without_neighbors += int((num_neighbors == 0).sum())
        self.bytes_seen += np.bincount(found.reasons.numpy(), minlength=256)

    def figures(self) -> dict[str, object]:
        """The fields of RetrievalReport that are counts."""
        counts = np.concatenate(self.counts) if self.counts else np.zeros(0, np.int64)
        total = max(int(counts.sum()), 1)
        edges = np.linspace(0, self.cap, min(HISTOGRAM_BINS, self.cap) + 1)
        per_user = {"mean": float(counts.mean()) if len(counts) else 0.0}
        for percent in (10, 50, 90, 99):
            per_user[f"p{percent}"] = float(np.percentile(counts, percent)) if len(counts) else 0.0
        codes = np.arange(256)
        reasons = {REASONS[r]: float(self.bytes_seen[codes & 3 == r].sum() / total) for r in range(1, len(REASONS))}
        graphs = {
            name: float(self.bytes_seen[codes >> (REASON_BITS + g) & 1 == 1].sum() / total)
            for g, name in enumerate(self.graphs)
        }
        return {
            "users": len(counts),
            "users_without_neighbors": self.without_neighbors,
            "users_without_candidates": int((counts == 0).sum()),
            "users_at_cap": int((counts == self.cap).sum()),
            "candidates": int(counts.sum()),
            "cold_candidates": self.cold,
            "candidates_per_user": per_user,
            "histogram": {"edges": edges.tolist(), "counts": np.histogram(counts, edges)[0].tolist()},
            "reasons": reasons,
            "graphs": graphs,
        }
