"""The refresh shared among several processes."""

import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
from support.refresh import jagged_log, rename_log, rows_of, save_model

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.refresh import RefreshJob, RefreshReport, leases
from alure.engine.refresh.embedder import Work
from alure.engine.refresh.leases import EXPIRES_S, FileLeases
from alure.engine.refresh.watch import Watch
from alure.engine.store import EmbeddingStore
from alure.engine.store.upkeep import vacuum

SMALL = RefreshConfig(unit_users=16, token_budget=150, precision="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events"))
    return folder


def refresh(world: Path, store: Path, config: RefreshConfig = SMALL, workers: int = 1) -> RefreshReport:
    return RefreshJob(world / "model", world / "events", store, config=config, workers=workers).run()


def test_two_processes_write_the_same_rows(world: Path, tmp_path: Path) -> None:
    report = refresh(world, tmp_path / "shared", workers=2)
    assert (report.workers, report.embedded_now, report.users) == (2, 58, 58)
    refresh(world, tmp_path / "alone")
    assert rows_of(EmbeddingStore(tmp_path / "shared")) == rows_of(EmbeddingStore(tmp_path / "alone"))


def test_a_dead_workers_unit_is_taken_over(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first to report progress is killed: it holds a unit that is not written yet."""
    add, killed = Watch.add, []

    def kill_one(self: Watch, work: Work) -> None:
        add(self, work)
        leases = (tmp_path / "leases").glob("*/*-*")
        for holder in {int(lease.read_text().rpartition(":")[2]) for lease in leases if not killed}:
            os.kill(holder, signal.SIGKILL)
            killed.append(holder)
            break

    monkeypatch.setattr(Watch, "add", kill_one)
    config = SMALL.model_copy(update={"token_budget": 10})
    job = RefreshJob(world / "model", world / "events", tmp_path, config=config, workers=2)
    report = job.run()
    assert len(killed) == 1
    assert job.watch.done.pending == 0  # what the dead one had embedded is no longer waited for
    assert job.watch.done.embedded >= 58
    assert "a worker died with exit code -9; the others take its unit over" in capfd.readouterr().err
    assert report.users == 58
    EmbeddingStore(tmp_path).check_integrity()


def test_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_by(holder: str, seconds_ago: float) -> FileLeases:
        monkeypatch.setattr("alure.engine.refresh.leases.socket.gethostname", lambda: holder.rpartition(":")[0])
        monkeypatch.setattr("alure.engine.refresh.leases.os.getpid", lambda: int(holder.rpartition(":")[2]))
        leases = FileLeases(tmp_path)
        os.utime(leases.mine, (time.time() - seconds_ago,) * 2)
        return leases

    alive, dead = str(os.getppid()), "4194305"  # beyond Linux's largest process id
    elsewhere, stuck = held_by("far:7", 0), held_by("far:8", 2 * EXPIRES_S)
    here, gone = held_by(f"near:{alive}", 2 * EXPIRES_S), held_by(f"near:{dead}", 0)
    for unit, holder in {"a": elsewhere, "b": stuck, "c": here, "d": gone}.items():
        assert holder.claim(unit)
    mine = held_by(f"near:{os.getpid()}", 0)
    assert [unit for unit in "abcde" if mine.claim(unit)] == ["b", "d", "e"]
    stuck.keep()
    assert not mine.claim("a")
    mine.release("e")
    assert elsewhere.claim("e")
    assert not mine.claim("e")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="without /proc it is not known when a process began")
def test_a_straggler_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It claims on after another process has published, and took the leases; or while that one takes them."""
    folder = tmp_path / "leases" / "g"
    straggler, other = FileLeases(folder), FileLeases(folder)
    other.mine = folder / "holder of another"
    other._appear()
    shutil.rmtree(folder)
    assert straggler.claim("0-16")
    straggler.release("0-16")
    other._appear()
    straggler.close()
    assert [path.name for path in folder.iterdir()] == ["holder of another"]  # who is there keeps it
    other.close()
    assert not folder.exists()
    write, taken = Path.write_text, []

    def write_too_late(path: Path, text: str) -> int:
        if not taken:
            taken.append(shutil.rmtree(folder))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", write_too_late)
    assert FileLeases(folder).claim("0-16")


def test_a_process_that_has_the_id_of_a_dead_holder_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that is started anew; and a zombie, which nobody waits for, is dead."""
    monkeypatch.setattr("alure.engine.refresh.leases.os.getpid", os.getppid)
    monkeypatch.setattr("alure.engine.refresh.leases._beginning", lambda process: "1")
    before = FileLeases(tmp_path)
    monkeypatch.undo()
    zombie = os.fork()
    if not zombie:
        os._exit(0)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    began = leases._beginning(os.getpid())
    monkeypatch.setattr("alure.engine.refresh.leases.os.getpid", lambda: zombie)
    monkeypatch.setattr("alure.engine.refresh.leases._beginning", lambda process: began)
    undead = FileLeases(tmp_path)
    monkeypatch.undo()
    assert before.claim("a")
    assert undead.claim("b")
    mine = FileLeases(tmp_path)
    assert [unit for unit in "ab" if mine.claim(unit)] == ["a", "b"]
    os.waitpid(zombie, 0)


def test_what_a_vacuum_without_grace_takes_from_a_job_is_done_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what is written of the generation, and its leases; the job waited for ever for units nobody took."""
    write, written = EmbeddingStore.write_unit, []

    def and_vacuum(self: EmbeddingStore, generation: str, unit: str, rows: pa.Table) -> bool:
        written.append(write(self, generation, unit, rows))
        if len(written) == 2:
            vacuum(self, grace_hours=0)
        return written[-1]

    monkeypatch.setattr(EmbeddingStore, "write_unit", and_vacuum)
    assert refresh(world, tmp_path).users == 58
    assert len(written) == 6
    EmbeddingStore(tmp_path).check_integrity()


def test_processes_refuse_a_model_or_a_log_that_was_put_there_meanwhile(tmp_path: Path) -> None:
    """Embeddings of two models would stand side by side, under the name of the first."""
    events = jagged_log(tmp_path / "events")
    save_model(tmp_path / "model", events)
    paths = (tmp_path / "model", tmp_path / "events", tmp_path / "store")
    job = RefreshJob(*paths, config=SMALL, workers=2)
    alone = RefreshJob(*paths, as_of=job.as_of - 1, config=SMALL)
    save_model(tmp_path / "model", events, seed=1)
    with pytest.raises(InputError, match=r"model is another .* than when the job began"):
        job.run()
    assert not EmbeddingStore(tmp_path / "store").generations()
    alone.run()
    (published,) = EmbeddingStore(tmp_path / "store").generations("embeddings")
    assert published.model == published.properties["space"] == alone.model.digest
    assert published.model != RefreshJob(*paths, config=SMALL).digest

    job = RefreshJob(*paths, config=SMALL, workers=2)
    job.events.hold()
    job.events.hold = lambda: None  # type: ignore[method-assign]
    rename_log(tmp_path / "events", "another")
    with pytest.raises(InputError, match=r"events is another .* than when the job began"):
        job.run()


def test_what_fails_in_a_process_fails_the_job(world: Path, tmp_path: Path) -> None:
    """The checkpoint is gone by the time the processes open it."""
    save_model(tmp_path / "model", jagged_log(tmp_path / "events"))
    job = RefreshJob(tmp_path / "model", tmp_path / "events", tmp_path / "store", config=SMALL, workers=2)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(InputError, match="it is not a checkpoint"):
        job.run()
    with pytest.raises(AlureError):
        job.store.latest("embeddings")
