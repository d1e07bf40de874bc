"""A stage's figures as Prometheus reads them: the node exporter's textfile collector picks the file up."""

import time
from numbers import Real
from pathlib import Path
from typing import Any

from alure.engine.results import to_dict


def write_metrics(path: Path, stage: str, report: Any) -> None:
    """Replace `path` with one gauge a figure, alure_<stage>_<figure>; a group of figures becomes labels.

    alure_<stage>_finished_timestamp_seconds tells when: an alert on its age finds a job that does not come to its end.
    """
    figures = {**to_dict(report), "finished_timestamp_seconds": time.time()}
    lines = []
    for name, value in figures.items():
        samples = (
            {f'{{of="{part}"}}': found for part, found in value.items()} if isinstance(value, dict) else {"": value}
        )
        numbers = {labels: float(found) for labels, found in samples.items() if isinstance(found, Real)}
        if numbers:
            lines.append(f"# TYPE alure_{stage}_{name} gauge")
            lines += [f"alure_{stage}_{name}{labels} {number!r}" for labels, number in numbers.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)
