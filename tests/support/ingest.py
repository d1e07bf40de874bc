"""What tests of ingest share: rows in, the log, its report and its quarantine out."""

from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from alure.engine.config import EventsConfig
from alure.engine.events import Events, IngestReport, ingest
from support.events import START, write_rows

LATEST = 2 * START


def run(tmp_path: Path, rows: Any, **options: Any) -> tuple[Events, IngestReport]:
    inputs = write_rows(tmp_path / "input" / "events.parquet", rows)
    config = EventsConfig(inputs=[inputs], **{"latest": LATEST, "max_quarantine_share": 1.0, **options})
    report = ingest(config, tmp_path / "log")
    return Events.open(tmp_path / "log"), report


def row(**changes: Any) -> dict[str, Any]:
    return {"user_id": 1, "timestamp": START, "source": "ad_click", "item_id": 7, **changes}


def quarantined(folder: Path) -> list[dict[str, Any]]:
    return DeltaTable(folder).to_pyarrow_table().to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the log itself, without what names its inputs or holds times."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".npy", ".parquet")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if "quarantine" not in p.parts}
