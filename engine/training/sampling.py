"""Training samples: a user, a snapshot time T, what the user engaged with after T, and items it did not."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alure.engine.config import TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import EventSequence
from alure.engine.training.frequency import StreamingFrequency
from alure.engine.training.state import prefixed, under
from alure.engine.training.targets import Exposures, Timeline

NOTHING = np.empty(0, np.int64)
POSITIVES = 4  # at most, a sample
EARLIER_SHARE = 0.5  # of the samples have T up to the label horizon before the target, as a scheduled refresh would
RANDOM_SHARE = 0.5  # of the visits of a long history read a window of it that need not be the newest


@dataclass(frozen=True)
class Positives:
    """What the users of a batch engaged with after T, without repeats. R rows, by user."""

    rows: np.ndarray  # int64 [R], row of the batch
    items: np.ndarray  # int64 [R]


@dataclass(frozen=True)
class Shown:
    """One task's exposures of a batch's users after T. E rows, by user and time."""

    rows: np.ndarray  # int64 [E], row of the batch
    items: np.ndarray  # int64 [E]
    timestamps: np.ndarray  # int64 [E]
    labels: np.ndarray  # float32 [E]


@dataclass(frozen=True)
class Sample:
    users: np.ndarray  # int64 [B], user index
    as_of: np.ndarray  # int64 [B], T
    positives: Positives
    shown: list[Shown]  # one a task
    negatives: np.ndarray  # int64 [N], item index, drawn uniformly from the universe
    without_newest: int = 0  # events of a user that are held out, and must not be read
    # int64, positives of the batch's users that are with other processes
    other_positives: np.ndarray = field(default_factory=lambda: NOTHING)

    def share(self, rank: int, size: int) -> "Sample":
        """The rows of one of `size` processes. Its candidates are those of the whole batch."""
        if size == 1:
            return self
        mine = np.arange(rank, len(self.users), size)
        row = np.full(len(self.users), -1)
        row[mine] = np.arange(len(mine))
        own = row[self.positives.rows] >= 0
        parts = [(shown, row[shown.rows] >= 0) for shown in self.shown]
        return replace(
            self,
            users=self.users[mine],
            as_of=self.as_of[mine],
            positives=Positives(row[self.positives.rows[own]], self.positives.items[own]),
            shown=[Shown(row[s.rows[m]], s.items[m], s.timestamps[m], s.labels[m]) for s, m in parts],
            other_positives=self.positives.items[~own],
        )


class Sampler:
    """Draws samples whose targets lie up to `until`. The same seed draws the same samples.

    Users are visited in shuffled rounds, each user once a round; its target is drawn uniformly from its own. Nothing
    after `until` is used, neither as a target nor to decide a label.
    """

    def __init__(
        self,
        targets: Timeline,
        tasks: list[Exposures],
        first_times: np.ndarray,
        config: TrainingConfig,
        until: int,
        seed: int,
    ) -> None:
        self.targets, self.tasks, self.first_times = targets, tasks, first_times
        self.config, self.until = config, until
        self.generator = np.random.default_rng(seed)
        all_users = np.arange(len(first_times))
        # a target needs an event before it: equal times do not count, as the order within a second is not known
        self.begin = targets.up_to(all_users, np.minimum(first_times, until))
        self.count = targets.up_to(all_users, np.full(len(all_users), until)) - self.begin
        self.users = np.flatnonzero(self.count > 0)
        if not len(self.users):
            raise InputError(
                f"training: no user has a target event with another event before it, up to time {until}; "
                "check training.target_types and events.ad_sources, or train on a longer log"
            )
        self.round = np.empty(0, np.int64)
        self.probability = self._probabilities()
        self.streaming = None
        if config.item_probability == "streaming":
            self.streaming = StreamingFrequency(len(self.probability))
        known = targets.items[targets.timestamps <= until]
        self.universe = np.unique(known)
        self.event_share = np.bincount(known, minlength=targets.items.max() + 1) / max(len(known), 1)

    def _probabilities(self) -> np.ndarray:
        """Q(item) that a drawn target is this item, float64 [largest item + 1]: exact, since draws are uniform."""
        rows = ranges(self.begin[self.users], self.count[self.users])
        share = np.repeat(1.0 / (len(self.users) * self.count[self.users]), self.count[self.users])
        return np.bincount(self.targets.items[rows], weights=share, minlength=self.targets.items.max() + 1)

    def expected_draws(self, items: np.ndarray, num_positives: int, num_negatives: int) -> np.ndarray:
        """Expected times each item is among a batch's candidates: in-batch positives and uniform negatives together."""
        probability = self.probability[items] if self.streaming is None else self.streaming(items)
        return num_positives * probability + num_negatives / len(self.universe)

    def is_target(self, sequence: EventSequence) -> Tensor:
        """Which events of an ad source are of the targets' types, bool [n]."""
        if self.targets.types is None:
            return torch.ones_like(sequence.event_types, dtype=torch.bool)
        return torch.isin(sequence.event_types, torch.from_numpy(self.targets.types).to(sequence.event_types.device))

    def draw(self) -> Sample:
        users = self._next_users(min(self.config.batch_users, len(self.users)))
        if self.config.labels != "all_action":
            return self._histories(users)
        picked = self.begin[users] + (self.generator.random(len(users)) * self.count[users]).astype(np.int64)
        as_of = self.targets.timestamps[picked] - 1
        earlier = self.generator.random(len(users)) * self.config.label_horizon
        moved = np.maximum(as_of - earlier.astype(np.int64), self.first_times[users])
        as_of = np.where(self.generator.random(len(users)) < EARLIER_SHARE, np.minimum(moved, as_of), as_of)
        positives = self._positives(users, as_of)
        if self.streaming is not None:
            self.streaming.add(positives.items)
        return Sample(
            users=users,
            as_of=as_of,
            positives=positives,
            shown=[self._exposures(task, users, as_of) for task in self.tasks],
            negatives=self.universe[self.generator.integers(0, len(self.universe), self.config.negatives)],
        )

    def _histories(self, users: np.ndarray) -> Sample:
        """The users' events up to the end of training, in which later ones are labels of earlier ones."""
        exact = self.config.negatives >= len(self.universe)
        drawn = self.generator.integers(0, len(self.universe), 0 if exact else self.config.negatives)
        return Sample(
            users=users,
            as_of=self._window_ends(users),
            positives=Positives(NOTHING, NOTHING),
            shown=[],
            negatives=self.universe if exact else self.universe[drawn],
            without_newest=int(self.config.held_out == "last_event"),
        )

    def _window_ends(self, users: np.ndarray) -> np.ndarray:
        """Time up to which each history is read, int64 [B]."""
        ends = np.full(len(users), self.until)
        if self.config.windows == "random":
            spare = self.count[users] - self.config.max_events
            moved = (spare > 0) & (self.generator.random(len(users)) < RANDOM_SHARE)
            last = self.begin[users] + self.config.max_events + (self.generator.random(len(users)) * spare).astype(int)
            ends[moved] = self.targets.timestamps[last[moved]]
        return ends

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the next draw depends on beside the log and the configuration; load_state takes it back."""
        tensors = {"round": torch.from_numpy(self.round)}
        if self.streaming is not None:
            tensors |= prefixed("streaming", self.streaming.state())
        return {"generator": self.generator.bit_generator.state}, tensors

    def load_state(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.generator.bit_generator.state = facts["generator"]
        self.round = tensors["round"].numpy()
        if self.streaming is not None:
            self.streaming.load_state(under("streaming", tensors))

    def _next_users(self, count: int) -> np.ndarray:
        while len(self.round) < count:
            self.round = np.concatenate([self.round, self.generator.permutation(self.users)])
        users, self.round = self.round[:count], self.round[count:]
        return users

    def _positives(self, users: np.ndarray, as_of: np.ndarray) -> Positives:
        end = np.minimum(as_of + self.config.label_horizon, self.until)
        rows, places = self._some(self.targets, users, as_of, end, POSITIVES)
        items = self.targets.items[places]
        _, first = np.unique(rows * (self.targets.items.max() + 1) + items, return_index=True)
        return Positives(rows[first], items[first])

    def _exposures(self, task: Exposures, users: np.ndarray, as_of: np.ndarray) -> Shown:
        # the label of an exposure is known once its window is over
        end = np.minimum(as_of + self.config.label_horizon, self.until - task.window)
        rows, places = self._some(task.timeline, users, as_of, end, self.config.exposures)
        line = task.timeline
        return Shown(rows, line.items[places], line.timestamps[places], task.labels(places, task.window))

    def _some(
        self, line: Timeline, users: np.ndarray, after: np.ndarray, end: np.ndarray, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most `limit` events of each user with after < timestamp <= end, spread over them: (rows, places)."""
        start = line.up_to(users, after)
        count = np.maximum(line.up_to(users, end) - start, 0)
        steps = np.arange(limit)
        # one from each of `limit` equal parts, each as likely (one at a bound may come twice), or all of fewer
        jitter = self.generator.random((len(users), limit))
        spread = ((steps + jitter) * (count[:, None] / limit)).astype(np.int64)
        chosen = np.where(count[:, None] > limit, np.minimum(spread, count[:, None] - 1), steps)
        rows, columns = np.nonzero(steps < np.minimum(count, limit)[:, None])
        return rows, start[rows] + chosen[rows, columns]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[i], …, starts[i] + counts[i] − 1 of every i, end to end."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(starts - (ends - counts), counts)
