"""What an ingest did, as JSON."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

REPORT_FILE = "ingest.json"


class SourceReport(BaseModel):
    """Sequence lengths of one source over all users of the log, those without an event included."""

    model_config = ConfigDict(frozen=True)

    events: int
    users: int  # with at least one event
    mean: float
    p50: int
    p90: int
    p99: int
    longest: int
    histogram: list[int]  # [users of length 0, 1, 2 to 3, 4 to 7, …]: bin b > 0 holds [2^(b − 1), 2^b)

    @classmethod
    def of_lengths(cls, lengths: np.ndarray) -> "SourceReport":
        bins = np.frexp(lengths.astype(np.float64))[1]  # 0 → 0, else floor(log2) + 1, exact below 2⁵³
        p50, p90, p99 = (int(q) for q in np.quantile(lengths, [0.5, 0.9, 0.99], method="lower"))
        return cls(
            events=int(lengths.sum()),
            users=int(np.count_nonzero(lengths)),
            mean=float(lengths.mean()),
            p50=p50,
            p90=p90,
            p99=p99,
            longest=int(lengths.max()),
            histogram=np.bincount(bins).tolist(),
        )


class IngestReport(BaseModel):
    model_config = ConfigDict(frozen=True)

    out: Path
    unchanged: bool = False  # the log was already there, made of the same inputs with the same options
    rows: int  # event rows read
    num_events: int
    num_users: int
    num_items: int
    num_accounts: int
    num_categories: int
    users_by_country: dict[str, int]
    users_of_several_countries: int  # each got its latest one
    first_timestamp: int
    last_timestamp: int
    sources: dict[str, SourceReport]
    quarantine: dict[str, int]  # reason: rows of events and items
    quarantine_table: Path
    ignored_columns: list[str]
    notes: list[str]
    seconds: dict[str, float]  # by step
    total_seconds: float
    num_bytes: int  # of the log on disk

    def write(self, folder: Path) -> None:
        (folder / REPORT_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "IngestReport":
        return cls.model_validate_json((folder / REPORT_FILE).read_text())
