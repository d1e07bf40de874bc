"""What training aims at, read once from the log: engagements to retrieve, and exposures with their labels.

Everything is point-in-time: an embedding of snapshot T reads events with timestamp <= T and is asked about later ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alure.engine.config import DAY, TaskConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events

NEVER = np.iinfo(np.int64).max
DEFAULT_TASKS = {
    "ctr": TaskConfig(exposure=["view"], positive=["click"], window=DAY),
    "cvr": TaskConfig(exposure=["click"], positive=["conversion"], window=7 * DAY),
}


@dataclass(frozen=True)
class Timeline:
    """Events of many users, ordered by user and time."""

    offsets: np.ndarray  # int64 [num_users + 1]
    users: np.ndarray  # int64 [n]
    items: np.ndarray  # int64 [n]
    timestamps: np.ndarray  # int64 [n]
    keys: np.ndarray  # int64 [n], increasing with (user, time)
    start: int  # earliest time a search may ask for
    span: int  # seconds from `start` to the latest, + 1
    types: np.ndarray | None = None  # int64, event types (index) that its events have; None: any

    @classmethod
    def of(
        cls,
        num_users: int,
        users: np.ndarray,
        items: np.ndarray,
        timestamps: np.ndarray,
        types: np.ndarray | None = None,
    ) -> "Timeline":
        """users must be sorted, and timestamps within a user."""
        offsets = np.zeros(num_users + 1, np.int64)
        np.cumsum(np.bincount(users, minlength=num_users), out=offsets[1:])
        start = int(timestamps.min()) - 1 if len(timestamps) else 0
        span = (int(timestamps.max()) if len(timestamps) else 0) - start + 2
        return cls(offsets, users, items, timestamps, users * span + (timestamps - start), start, span, types)

    def __len__(self) -> int:
        return len(self.items)

    def up_to(self, users: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Row after the last event of each user with timestamp <= its time, int64 [B]."""
        inside = np.clip(times - self.start, 0, self.span - 1)
        return np.searchsorted(self.keys, users * self.span + inside, side="right")


@dataclass(frozen=True)
class Exposures:
    """One task's exposures: was each followed by a positive of the same user and item within `window` seconds?"""

    name: str
    weight: float
    window: int
    timeline: Timeline
    delay: np.ndarray  # int64 [n], seconds to the first positive at or after the exposure; NEVER where there is none

    def labels(self, rows: np.ndarray, window: int) -> np.ndarray:
        """float32 [rows]."""
        return (self.delay[rows] <= window).astype(np.float32)


@dataclass(frozen=True)
class AdEvents:
    """All events of the ad sources up to the snapshot, by user and time; int64 [n] each."""

    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    event_types: np.ndarray  # index into `names`, −1
    names: list[str]
    num_users: int
    num_items: int

    @classmethod
    def read(cls, events: Events, as_of: int) -> "AdEvents":
        history = events.engagements(as_of)
        return cls(
            users=np.repeat(np.arange(events.num_users, dtype=np.int64), np.diff(history.offsets)),
            items=history.items.astype(np.int64),
            timestamps=history.timestamps.astype(np.int64),
            event_types=history.event_types.astype(np.int64),
            names=events.manifest.event_types,
            num_users=events.num_users,
            num_items=events.manifest.num_items,
        )

    def of_types(self, wanted: list[str], what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(users, items, timestamps) of the events of these types; InputError where the log has no such type."""
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            known = ", ".join(self.names) or "none"
            raise InputError(f"{what}: the log has no event type {', '.join(unknown)}; it has {known}")
        return self.where(np.isin(self.event_types, [self.names.index(name) for name in wanted]))

    def of_accounts(self, item_accounts: np.ndarray) -> "AdEvents":
        """The same with the first item of its account in place of each item; those of no account are left out.

        For an ad tower that reads the account alone: what is counted, drawn and masked by item then is by account.
        item_accounts: int [num_items] account index, −1 for none. InputError where all are −1.
        """
        if (item_accounts < 0).all():
            raise InputError(
                "model.ad_level: account needs items with accounts, this log has none; ingest it with account_id in "
                "the events or in events.items, or set ad_level to item"
            )
        _, first, account = np.unique(item_accounts, return_index=True, return_inverse=True)
        known = item_accounts[self.items] >= 0
        users, items, timestamps = self.where(known)
        return replace(
            self,
            users=users,
            items=first[account[items]],
            timestamps=timestamps,
            event_types=self.event_types[known],
        )

    def where(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.users[mask], self.items[mask], self.timestamps[mask]


def find_targets(ads: AdEvents, config: TrainingConfig) -> Timeline:
    """Engagements with ads that the two-tower head learns to retrieve.

    Types: config.target_types, or all but "view" where the ads' events have other types. InputError for unknown ones.
    """
    if config.target_types is not None:
        found = ads.of_types(config.target_types, "training.target_types")
        types = np.array([ads.names.index(name) for name in config.target_types])
        return Timeline.of(ads.num_users, *found, types)
    view = ads.names.index("view") if "view" in ads.names else -2
    others = ads.event_types != view
    if view < 0 or not others.any():
        return Timeline.of(ads.num_users, *ads.where(np.ones(len(others), bool)))
    return Timeline.of(ads.num_users, *ads.where(others), np.setdiff1d(np.arange(-1, len(ads.names)), [view]))


def find_exposures(ads: AdEvents, config: TrainingConfig) -> list[Exposures]:
    """The exposures of every binary task: config.tasks, or ctr and cvr where the event types allow."""
    tasks = config.tasks
    if tasks is None:
        tasks = {name: t for name, t in DEFAULT_TASKS.items() if {*t.exposure, *t.positive} <= set(ads.names)}
    if not config.exposures or config.labels != "all_action":
        return []
    found = []
    for name, task in tasks.items():
        shown = ads.of_types(task.exposure, f"training.tasks.{name}.exposure")
        positive = ads.of_types(task.positive, f"training.tasks.{name}.positive")
        delay = delays(shown, positive, ads.num_items)
        found.append(Exposures(name, task.weight, task.window, Timeline.of(ads.num_users, *shown), delay))
    return found


def delays(shown: Sequence[np.ndarray], positive: Sequence[np.ndarray], num_items: int) -> np.ndarray:
    """Seconds from each exposure to the first positive of its user and item at or after it; NEVER where none follows.

    shown, positive: (users, items, timestamps), int64, in any order. Returns int64 [exposures].
    """
    if not len(shown[0]) or not len(positive[0]):
        return np.full(len(shown[0]), NEVER)
    # (user, item) pairs are numbered densely, so that pair · span + time fits 64 bits
    pairs, numbers = np.unique(positive[0] * num_items + positive[1], return_inverse=True)
    start = min(int(shown[2].min()), int(positive[2].min()))
    span = max(int(shown[2].max()), int(positive[2].max())) - start + 1
    keys = np.sort(numbers * span + (positive[2] - start))
    wanted = shown[0] * num_items + shown[1]
    number = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    asked = number * span + (shown[2] - start)
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    follows = (pairs[number] == wanted) & (keys[place] >= asked) & (keys[place] // span == number)
    return np.where(follows, keys[place] - asked, NEVER)


def first_times(events: Events) -> np.ndarray:
    """Time of each user's first event in any source, int64 [num_users]; the largest int64 where it has none."""
    first = np.full(events.num_users, NEVER)
    for name in events.manifest.sources:
        source = events.source(name)
        present = np.flatnonzero(np.diff(source.offsets))
        first[present] = np.minimum(first[present], source.timestamp[source.offsets[present]])
    return first
