"""How often each item is drawn, learned from the stream of draws alone."""

import numpy as np
import torch
from torch import Tensor

from alure.engine.model.catalog import hash_keys

HASHES = 3
BUCKETS_AN_ITEM, MOST_BUCKETS = 4, 1 << 20
RATE = 0.02  # of the moving mean: about the newest 1 / RATE gaps of an item count


class StreamingFrequency:
    """Q(item) = 1 / the mean gap between its draws (Yi et al., RecSys 2019, algorithm 3).

    A: the draw that last hit a bucket. B: the moving mean of the gaps between its hits, in draws; a bucket's first
    gaps count alike, with the uniform Q as one more of them. An item has a bucket in each of HASHES tables; items that
    share one make its gap shorter, so that the longest of the item's gaps counts. A step is one draw, where the paper's
    is a batch: an item that is in a batch twice is drawn twice, as log-Q counts it.
    """

    def __init__(self, num_items: int, buckets: int | None = None, rate: float = RATE) -> None:
        """num_items: of which the draws are. buckets: a table's; default: four an item, 2^20 at most."""
        self.rate = rate
        self.size = buckets or min(BUCKETS_AN_ITEM * num_items, MOST_BUCKETS)
        self.draws = 0
        # the tables end to end
        self.last = np.zeros(HASHES * self.size, np.int64)  # A
        self.gap = np.full(HASHES * self.size, float(num_items))  # B
        self.hits = np.zeros(HASHES * self.size, np.int64)

    def add(self, items: np.ndarray) -> None:
        """The next draws, in their order: int64 [n]."""
        buckets = self.buckets(items).ravel()
        times = np.tile(self.draws + 1 + np.arange(len(items)), HASHES)
        self.draws += len(items)
        order = np.argsort(buckets, kind="stable")
        rank = np.arange(len(order)) - np.searchsorted(buckets[order], buckets[order])  # among a bucket's hits
        for number in range(rank.max(initial=-1) + 1):
            chosen = order[rank == number]
            self._hit(buckets[chosen], times[chosen])

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """float64 [n]."""
        return 1.0 / self.gap[self.buckets(items)].max(axis=0)

    def buckets(self, items: np.ndarray) -> np.ndarray:
        """int64 [HASHES, n]."""
        return np.stack([t * self.size + hash_keys(items, f"frequency {t}", self.size) for t in range(HASHES)])

    def state(self) -> dict[str, Tensor]:
        arrays = {"draws": np.array(self.draws), "last": self.last, "gap": self.gap, "hits": self.hits}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.draws = int(state["draws"])
        self.last, self.gap, self.hits = (state[name].numpy() for name in ("last", "gap", "hits"))

    def _hit(self, buckets: np.ndarray, times: np.ndarray) -> None:
        """One hit of each of distinct buckets."""
        self.hits[buckets] += 1
        rate = np.maximum(self.rate, 1.0 / (self.hits[buckets] + 1))
        self.gap[buckets] += rate * (times - self.last[buckets] - self.gap[buckets])
        self.last[buckets] = times
