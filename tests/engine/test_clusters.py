"""The refresh on real Ray and real Spark, on this machine. Workers are killed under way."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.refresh import jagged_log, rows_of, save_model

from alure.engine.config import RefreshConfig
from alure.engine.refresh import RefreshJob, RefreshReport
from alure.engine.store import EmbeddingStore

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = RefreshConfig(unit_users=4, token_budget=60, precision="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events", num_users=400))
    refresh(folder, folder / "alone", "local", workers=1)
    RefreshJob(folder / "model", folder / "events", folder / "defaults").run()
    return folder


def refresh(world: Path, store: Path, engine: str, workers: int = 2) -> RefreshReport:
    return RefreshJob(world / "model", world / "events", store, config=SMALL, workers=workers, engine=engine).run()


@contextmanager
def killing(store: Path) -> Iterator[Callable[[], list[int]]]:
    """Kills the first process that holds a lease, once some units are done."""
    killed: list[int] = []

    def watch() -> None:
        while not stop.wait(0.01):
            commits = list((store / "embeddings" / "_delta_log").glob("*.json"))
            leases = list((store / "leases").glob("*/*-*"))
            if len(commits) > 3 and leases:
                try:
                    holder = int(leases[0].read_text().rpartition(":")[2])
                    os.kill(holder, signal.SIGKILL)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                killed.append(holder)
                return

    stop, watcher = threading.Event(), threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: killed
    finally:
        stop.set()
        watcher.join()


def check(world: Path, store: Path, report: RefreshReport) -> None:
    opened = EmbeddingStore(store)
    assert rows_of(opened) == rows_of(EmbeddingStore(world / "alone"))
    assert opened.count_written(report.generation) == report.users
    opened.check_integrity()


def run_example(world: Path, store: Path, name: str) -> None:
    """examples/NAME as a user runs it: its store has the embeddings of one process with the same defaults."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, (world / "model", world / "events", store))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = rows_of(EmbeddingStore(store))
    assert f": {len(found)} users, by country {{'" in done.stdout
    assert found == rows_of(EmbeddingStore(world / "defaults"))


def test_the_example_on_ray(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    run_example(world, tmp_path, "refresh_on_ray.py")


def test_the_example_on_spark(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyspark.sql", reason="needs Spark: pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17 (Debian: openjdk-17-jre-headless)")
    run_example(world, tmp_path, "refresh_on_spark.py")


def test_two_ray_actors_of_which_one_is_killed(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with killing(tmp_path) as killed:
            report = refresh(world, tmp_path, "ray")
        assert len(killed()) == 1
        assert "a Ray actor died" in capfd.readouterr().err
        check(world, tmp_path, report)
    finally:
        ray.shutdown()


def test_two_spark_tasks_of_which_one_is_killed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    sql = pytest.importorskip("pyspark.sql", reason="needs Spark: pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17 (Debian: openjdk-17-jre-headless)")
    # a local session does not run a failed task again unless it is told to: local[threads, failures]
    spark = sql.SparkSession.builder.master("local[2,3]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        with killing(tmp_path) as killed:
            report = refresh(world, tmp_path, "spark")
        assert len(killed()) == 1
        check(world, tmp_path, report)
    finally:
        spark.stop()
