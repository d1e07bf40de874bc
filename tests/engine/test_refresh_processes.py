"""The refresh killed in a process of its own, and shared among several."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.refresh import jagged_log, rows_of, save_model

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.refresh import RefreshJob, RefreshReport
from alure.engine.store import EmbeddingStore

SMALL = RefreshConfig(unit_users=16, token_budget=150)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events"))
    return folder


def refresh(world: Path, store: Path, config: RefreshConfig = SMALL, workers: int = 1) -> RefreshReport:
    return RefreshJob(world / "model", world / "events", store, config=config, workers=workers).run()


CHILD = """
import sys, torch
from alure.engine.config import RefreshConfig
from alure.engine.refresh import RefreshJob
torch.set_num_threads(1)
model, events, store = sys.argv[1:]
RefreshJob(model, events, store, config=RefreshConfig(unit_users=2, token_budget=150)).run()
"""


def test_killed_at_any_moment_it_ends_with_the_same_rows(world: Path, tmp_path: Path) -> None:
    config, moments = SMALL.model_copy(update={"unit_users": 2}), random.Random(0)
    for _ in range(2):
        command = [sys.executable, "-c", CHILD, *(str(p) for p in (world / "model", world / "events", tmp_path / "s"))]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert child.stderr is not None
        child.stderr.readline()  # "refresh: generation …": the work begins
        time.sleep(moments.uniform(0, 0.6))
        child.kill()
        child.wait()
        child.stderr.close()
    refresh(world, tmp_path / "s", config)
    refresh(world, tmp_path / "undisturbed", config)
    assert rows_of(EmbeddingStore(tmp_path / "s")) == rows_of(EmbeddingStore(tmp_path / "undisturbed"))
    EmbeddingStore(tmp_path / "s").check_integrity()


def test_two_processes_write_the_same_rows(world: Path, tmp_path: Path) -> None:
    report = refresh(world, tmp_path / "shared", workers=2)
    assert (report.workers, report.embedded_now, report.users) == (2, 58, 58)
    refresh(world, tmp_path / "alone")
    assert rows_of(EmbeddingStore(tmp_path / "shared")) == rows_of(EmbeddingStore(tmp_path / "alone"))


def test_what_fails_in_a_process_fails_the_job(world: Path, tmp_path: Path) -> None:
    """The checkpoint is gone by the time the processes open it."""
    save_model(tmp_path / "model", jagged_log(tmp_path / "events"))
    job = RefreshJob(tmp_path / "model", tmp_path / "events", tmp_path / "store", config=SMALL, workers=2)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match="it is not a checkpoint"):
        job.run()
    with pytest.raises(AlureError):
        job.store.latest("embeddings")
