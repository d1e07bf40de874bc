"""What a refresh did."""

from collections.abc import Mapping
from dataclasses import dataclass

from alure.engine.refresh.drift import Drift

DAY = 86_400
AGES = {"now": 0, "up to 1 day": DAY, "up to 7 days": 7 * DAY, "up to 28 days": 28 * DAY}  # bound: seconds


@dataclass(frozen=True)
class RefreshReport:
    """users = embedded + carried. Of this run alone: embedded_now, tokens, batches, seconds, users_per_second."""

    generation: str
    as_of: int  # unix seconds
    model: str  # digest
    base: str | None  # the generation that users were carried forward from
    already_published: bool  # nothing was left to do
    users: int  # rows of the generation
    embedded: int  # users whose embedding was made for this as_of
    carried: int  # users carried forward: no event since their embedding was made
    quarantined: int  # users left out because their embedding is not finite
    skipped: int  # users of the log without a row: no event up to as_of, quarantined, or not reached in max_minutes
    freshness: dict[str, int]  # users by the age of their embedding
    drift: Drift | None  # None where nothing was compared
    k: int
    d: int
    units: int
    units_reused: int  # written by an earlier, interrupted run
    embedded_now: int
    tokens: int  # events read
    batches: int
    seconds: float
    users_per_second: float
    tokens_per_second: float
    device_hours: float
    device_hours_per_billion_users: float | None  # extrapolated
    device: str
    precision: str
    output_dtype: str
    workers: int


def freshness(as_ofs: Mapping[int, int], as_of: int) -> dict[str, int]:
    """Users by age, of {the time their embedding was made for: users}."""
    counts = dict.fromkeys([*AGES, "older"], 0)
    for made_for, users in as_ofs.items():
        counts[next((name for name, bound in AGES.items() if as_of - made_for <= bound), "older")] += users
    return {name: users for name, users in counts.items() if users}
