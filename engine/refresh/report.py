"""What a refresh did."""

from collections.abc import Mapping
from dataclasses import dataclass

from alure.engine.refresh.drift import Drift

DAY = 86_400
AGES = {"now": 0, "up to 1 day": DAY, "up to 7 days": 7 * DAY, "up to 28 days": 28 * DAY}  # bound: seconds


FIGURES = {
    "as_of": "snapshot time in unix seconds",
    "already_published": "1 where nothing was left to do",
    "users": "rows of the generation",
    "embedded": "users whose embedding was made for this as_of",
    "carried": "users carried forward: no event since their embedding was made, or not reached in max_minutes",
    "quarantined": "users left out because their embedding is not finite",
    "skipped": "users of the log without a row: no event up to as_of, quarantined, or not reached in max_minutes",
    "freshness": "users by the age of their embedding",
    "drift": "the generation beside the one before it, on users of both",
    "k": "embeddings a user",
    "d": "values an embedding",
    "units": "units of the generation, each one write",
    "units_reused": "units that an earlier, interrupted run wrote",
    "embedded_now": "users embedded by this run",
    "tokens": "events of the users that this run embedded",
    "tokens_reused": "those of them whose keys and values an earlier generation had kept",
    "batches": "batches of this run",
    "flops": "floating-point operations of the model's products in this run",
    "seconds": "since this run began",
    "users_per_second": "users embedded a second",
    "tokens_per_second": "events that the model read a second",
    "share_of_matrix_rate": "FLOP/s of the model's products as a part of the measured matrix rate of all devices",
    "workers": "processes, Ray actors or Spark tasks",
    "devices": "GPUs, or cores where there are none",
    "device_hours": "GPU-hours of this run, or core-hours",
    "device_hours_per_billion_users": "device_hours extrapolated from the users that this run embedded",
    "finished_timestamp_seconds": "when the run ended, in unix seconds",
    "users_to_embed": "users that this run is to embed",
    "users_embedded_total": "users embedded by this run",
    "users_pending": "users embedded in units that are not written yet",
    "events_to_embed": "events of the users to embed",
    "events_embedded_total": "events that the model read in this run",
    "events_reused_total": "those of them whose keys and values an earlier generation had kept",
    "batches_total": "batches of this run",
    "batches_ready": "batches that are read ahead and wait for the device",
    "flops_total": "floating-point operations of the model's products in this run",
    "units_written_total": "units written by this run",
    "units_waiting": "units that this run has not written: they wait, or another command has them",
    "quarantined_total": "users without a finite embedding found by this run",
    "seconds_left": "estimated time until all events are read",
}  # of the report, then of a run that goes on; *_total: counters, in which the work of a process that died counts too


@dataclass(frozen=True)
class RefreshReport:
    """Figures as in FIGURES; users = embedded + carried. Of this run alone: embedded_now to device_hours…"""

    generation: str
    as_of: int
    model: str  # digest
    base: str | None  # the generation that users were carried forward from
    already_published: bool
    users: int
    embedded: int
    carried: int
    quarantined: int
    skipped: int
    freshness: dict[str, int]
    drift: Drift | None  # None where nothing was compared
    k: int
    d: int
    units: int
    units_reused: int
    embedded_now: int
    tokens: int
    tokens_reused: int
    batches: int
    flops: float
    seconds: float
    users_per_second: float
    tokens_per_second: float
    share_of_matrix_rate: float | None  # None: not measured, as in short jobs
    devices: int
    device_hours: float
    device_hours_per_billion_users: float | None
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
