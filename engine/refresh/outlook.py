"""What a job has before it: how many users and events, how long that takes, and how far a time limit reaches."""

import time
from dataclasses import dataclass, field

import numpy as np

from alure.engine.events import Events
from alure.engine.refresh.earlier import earlier_rows
from alure.engine.refresh.embedder import Embedder, Snapshot, Work, needs_refresh
from alure.engine.refresh.planner import Unit, count_events
from alure.engine.store import EmbeddingStore
from alure.engine.store.rows import FINGERPRINT

BINS = 1_000  # of the unseen share: how finely a time limit cuts
SPARE = 0.9  # of a time limit is planned for


@dataclass
class Outlook:
    """present: users of the whole log with an event up to as_of. users, tokens: to embed, in units not written yet."""

    present: int = 0
    users: int = 0
    tokens: int = 0
    tokens_by_unseen: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    sample: tuple[np.ndarray, np.ndarray] = (np.empty(0, int), np.empty(0, int))  # users, tokens of the largest unit

    def add(self, unit: Unit, chosen: np.ndarray, tokens: np.ndarray, unseen: np.ndarray) -> None:
        """chosen: bool [n], who of the unit is to be embedded."""
        places = np.flatnonzero(chosen)
        self.users += len(places)
        self.tokens += int(tokens[places].sum())
        bins = np.minimum((unseen[places] * BINS).astype(int), BINS - 1)
        self.tokens_by_unseen += np.bincount(bins, weights=tokens[places], minlength=BINS)
        if tokens[places].sum() > self.sample[1].sum():
            self.sample = (places + unit.first, tokens[places])

    def reach(self, affordable: float) -> float:
        """The least unseen share whose users, with all above, come to at most `affordable` tokens."""
        from_above = np.cumsum(self.tokens_by_unseen[::-1])[::-1]
        fits = np.flatnonzero(from_above <= affordable)
        return float(fits[0] / BINS) if len(fits) else (BINS - 1) / BINS


def look_ahead(
    snapshot: Snapshot, units: list[Unit], written: set[str], events: Events, store: EmbeddingStore
) -> Outlook:
    """One pass over the log's offsets, and over the counts of the generation that is carried forward."""
    outlook = Outlook()
    base = None if snapshot.base is None else store.published(snapshot.base, "embeddings")
    for unit in units:
        num_events, tokens = count_events(events, unit, snapshot.as_of, snapshot.config.max_events)
        outlook.present += int((num_events > 0).sum())
        if unit.name not in written:
            earlier = earlier_rows(
                store, base, events, unit, num_events, ["user_id", "num_events", "as_of", FINGERPRINT]
            )
            chosen = (num_events > 0) & needs_refresh(snapshot, earlier, num_events)
            outlook.add(unit, chosen, tokens, earlier.unseen_share(num_events))
    return outlook


def seconds_a_token(embedder: Embedder, outlook: Outlook) -> float:
    """From two batches of users spread evenly over a unit, of which the first warms up."""
    users, tokens = outlook.sample
    step = max(1, round(2 * tokens.sum() / embedder.token_budget))
    for start in (0, step // 2):
        chosen = slice(start, None, step)
        started = time.monotonic()
        embedder.embed(users[chosen], tokens[chosen], Work().add)
    return (time.monotonic() - started) / max(int(tokens[chosen].sum()), 1)
