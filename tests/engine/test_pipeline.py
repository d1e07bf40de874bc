"""`alure run` again: what is reused is what the configuration asks for, and is there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.events import START, write_rows

from alure.engine.config import Config, EventsConfig, RefreshConfig, TrainingConfig
from alure.engine.pipeline import run_pipeline
from alure.engine.store import EmbeddingStore


@pytest.fixture
def log(tmp_path: Path) -> Path:
    users = np.repeat(np.arange(50), 6)
    times = np.tile(np.arange(6) * 86_400, 50) + START
    return write_rows(tmp_path / "log.parquet", pa.table({"user_id": users, "timestamp": times, "item_id": users % 13}))


def run(log: Path, max_events: int) -> dict[str, Any]:
    config = Config(
        output=log.parent / "out",
        events=EventsConfig(inputs=[log]),
        training=TrainingConfig(steps=1),
        refresh=RefreshConfig(max_events=max_events, precision="float32"),
    )
    return run_pipeline(config)


def generation_of(log: Path, stage: str) -> str:
    report = json.loads((log.parent / "out" / "stages" / f"{stage}.json").read_text())["report"]
    return str(report["generation"] if "generation" in report else report["alure"]["generation"])


def test_a_configuration_that_comes_back_gets_its_own_generation(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(log, max_events=4)
    first = generation_of(log, "refresh")
    run(log, max_events=2)
    second = generation_of(log, "refresh")
    run(log, max_events=4)
    assert [generation_of(log, stage) for stage in ("refresh", "graph", "retrieve", "evaluate")] == [first] * 4
    assert f"readers see generation {second}" in capsys.readouterr().err
    assert first in (log.parent / "out" / "report.html").read_text()


@pytest.mark.parametrize("gone", ["store", "events", "model", "store/graph", "store/candidates"])
def test_what_is_gone_is_made_again(log: Path, gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(log, max_events=4)
    if gone.startswith("store/"):
        store = EmbeddingStore(log.parent / "out" / "store")
        table = gone.removeprefix("store/")
        published = next(g for g in store.generations(table))
        store.log.append(lambda _: [replace(published, withdrawn=True)])
    else:
        shutil.rmtree(log.parent / "out" / gone)
    capsys.readouterr()
    run(log, max_events=4)
    assert 0 < capsys.readouterr().err.count("reused") < 6
    store = EmbeddingStore(log.parent / "out" / "store")
    store.check_integrity()
    assert {g.table for g in store.generations()} == {"embeddings", "graph", "clusters", "candidates", "popularity"}
