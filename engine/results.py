"""What a stage says it did, as plain JSON-able data."""

import dataclasses
import json
from typing import Any

from pydantic import BaseModel


def to_dict(report: Any) -> dict[str, Any]:
    """A stage's report (a dict, dataclass or pydantic model) as JSON would read it back."""
    if isinstance(report, BaseModel):
        return report.model_dump(mode="json")
    data = dataclasses.asdict(report) if dataclasses.is_dataclass(report) and not isinstance(report, type) else report
    return json.loads(json.dumps(data, default=str))
