"""What a refresh did."""

from dataclasses import dataclass


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
    skipped: int  # users of the log without an event up to as_of
    k: int
    d: int
    units: int
    units_reused: int  # written by an earlier, interrupted run
    embedded_now: int
    tokens: int  # events read
    batches: int
    seconds: float
    users_per_second: float
    device: str
    precision: str
    workers: int
