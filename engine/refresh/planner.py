"""What a refresh does in which order: units of users, and within a unit batches of about as many events each.

Everything here follows from the input's identity and the configuration alone, so a killed job plans the same again.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from alure.engine.config import RefreshConfig
from alure.engine.events import Events


@dataclass(frozen=True)
class Unit:
    """Users first to last − 1 of the event log: one idempotent write."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def users(self) -> range:
        return range(self.first, self.last)


def plan_units(num_users: int, unit_users: int) -> list[Unit]:
    return [Unit(first, min(first + unit_users, num_users)) for first in range(0, num_users, unit_users)]


def pack(tokens: np.ndarray, budget: int) -> list[np.ndarray]:
    """Batches of positions into `tokens` [n], longest first, each of at most `budget` tokens.

    Users of like length share a batch, and one longer than `budget` is a batch of its own. Longest first: a batch that
    does not fit in memory shows at once, not in the night's last hour.
    """
    order = np.argsort(-tokens, kind="stable")
    ends = np.cumsum(tokens[order])
    batches, at, spent = [], 0, 0
    while at < len(order):
        stop = max(int(np.searchsorted(ends, spent + budget, side="right")), at + 1)
        batches.append(order[at:stop])
        at, spent = stop, int(ends[stop - 1])
    return batches


def spread(users: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `users` [n], evenly spread over their order."""
    return users if len(users) <= most else users[np.arange(most) * len(users) // most]


def count_events(events: Events, unit: Unit, as_of: int, max_events: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(events, tokens) of each user of the unit, int64 [n]: events up to `as_of`, and how many of them the model reads,
    which is the newest `max_events` of each source.
    """
    total = np.zeros(unit.last - unit.first, np.int64)
    tokens = np.zeros_like(total)
    for name in events.manifest.sources:
        columns = events.source(name)
        offsets = columns.offsets[unit.first : unit.last + 1]
        if as_of >= events.manifest.last_timestamp:
            found = np.diff(offsets)
        else:
            early = np.concatenate([[0], np.cumsum(columns.timestamp[offsets[0] : offsets[-1]] <= as_of)])
            found = np.diff(early[offsets - offsets[0]])
        total += found
        tokens += found if max_events is None else np.minimum(found, max_events)
    return total, tokens


def generation_id(as_of: int, model: str, events: Events, config: RefreshConfig, base: str | None) -> str:
    """The same for the same work, such as "20171017T030000Z-1f3a9c2e".

    `token_budget` is left out: it decides how users share batches, not what comes out, so a job that ran out of memory
    goes on with a smaller one. base: the generation that an incremental refresh carries users forward from.
    """
    log = events.manifest.fingerprint
    identity = [as_of, model, log, config.unit_users, config.max_events, config.precision, config.output_dtype, base]
    if base is not None:
        identity += [config.max_age, config.max_minutes]
    if config.kv_cache:  # the same up to rounding
        identity += ["kv_cache"]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    return f"{datetime.fromtimestamp(as_of, UTC):%Y%m%dT%H%M%SZ}-{digest}"
