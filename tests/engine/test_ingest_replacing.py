"""Ingest is all or nothing: killed, run twice, run again on other inputs, run by two at once."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.events import DAY, START, make_events, random_table, write_rows

from alure.engine.config import EventsConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events, ingest
from alure.engine.events.manifest import FORMAT_VERSION, Manifest

KILLED = """
import os, sys
from pathlib import Path
import alure.engine.events.ingestion as module
from alure.engine.config import EventsConfig

module.write_items = lambda *_: os._exit(137)  # sequences are written, items are not
module.ingest(EventsConfig(inputs=[Path(sys.argv[1])]), Path(sys.argv[2]))
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_a_killed_ingest_leaves_what_was_there(tmp_path: Path) -> None:
    make_events(tmp_path, random_table(num_events=50), name="log")
    before = snapshot(tmp_path / "log")
    other = write_rows(tmp_path / "other.parquet", random_table(num_events=70, seed=1))
    killed = subprocess.run([sys.executable, "-c", KILLED, other, tmp_path / "log"], cwd=tmp_path, check=False)
    assert killed.returncode == 137
    assert snapshot(tmp_path / "log") == before
    assert len(list(tmp_path.glob(".log.building-*"))) == 1
    assert Events.open(tmp_path / "log").manifest.num_events == 50
    report = ingest(EventsConfig(inputs=[other]), tmp_path / "log")
    assert not report.unchanged
    assert Events.open(tmp_path / "log").manifest.num_events == report.num_events
    assert names(tmp_path) == ["log", "log-input", "other.parquet"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_a_failed_ingest_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    file = write_rows(tmp_path / "a.parquet", random_table(num_events=50))
    monkeypatch.setattr("alure.engine.events.ingestion.write_items", fail)
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        ingest(EventsConfig(inputs=[file]), tmp_path / "log")
    assert names(tmp_path) == ["a.parquet"]


def test_the_same_again_is_a_no_op_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "a.parquet", random_table(num_events=50))
    first = ingest(EventsConfig(inputs=[file]), tmp_path / "log")
    before = snapshot(tmp_path / "log")
    capsys.readouterr()
    again = ingest(EventsConfig(inputs=[file], memory_limit="2GiB"), tmp_path / "log")
    assert again.unchanged
    assert not first.unchanged
    assert again.model_copy(update={"unchanged": False}) == first
    assert snapshot(tmp_path / "log") == before
    assert "is up to date" in capsys.readouterr().err


def test_another_input_or_option_is_read_anew(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", random_table(num_events=50))
    ingest(EventsConfig(inputs=[file]), tmp_path / "log")
    old = Events.open(tmp_path / "log")
    times = old.source("comment").timestamp
    kept = times.copy()
    assert not ingest(EventsConfig(inputs=[file], ad_sources=["ad_click"]), tmp_path / "log").unchanged
    assert Events.open(tmp_path / "log").manifest.ad_sources == ["ad_click"]
    assert (times == kept).all()  # whoever has the old log open goes on reading it
    os.utime(file, ns=(START, START))
    assert not ingest(EventsConfig(inputs=[file], ad_sources=["ad_click"]), tmp_path / "log").unchanged
    items = write_rows(tmp_path / "items.parquet", [{"item_id": 1}])
    assert not ingest(EventsConfig(inputs=[file], items=items), tmp_path / "log").unchanged
    (tmp_path / "log" / "events.json").write_text("{")
    assert not ingest(EventsConfig(inputs=[file], items=items), tmp_path / "log").unchanged
    assert names(tmp_path) == ["a.parquet", "items.parquet", "log"]


def test_rows_of_the_future_come_in_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the same inputs make the same log, also at another place, and from then on one of another name."""
    now = [START + 60 * DAY]
    monkeypatch.setattr("time.time", lambda: now[0])
    rows = [{"user_id": i, "timestamp": START + 59 * DAY + i * DAY, "item_id": i} for i in range(4)]
    rows.append({"user_id": 9, "timestamp": 10**10 + START, "item_id": 1})  # of the year 2340, say by mistake
    config = EventsConfig(inputs=[write_rows(tmp_path / "a.parquet", rows)], max_quarantine_share=1.0)

    def log_of(name: str) -> tuple[bool, Manifest]:
        unchanged = ingest(config, tmp_path / name).unchanged
        return unchanged, Events.open(tmp_path / name).manifest

    first = log_of("log")[1]
    assert (first.num_events, first.quarantine, first.next_timestamp) == (
        2,
        {"future_timestamp": 3},
        rows[2]["timestamp"],
    )
    now[0] += DAY - 1
    assert log_of("log") == (True, first)
    assert log_of("other")[1].fingerprint == first.fingerprint
    now[0] += 1
    unchanged, second = log_of("log")
    assert (unchanged, second.num_events) == (False, 3)
    assert second.fingerprint != first.fingerprint
    now[0] += 9 * DAY
    assert log_of("log")[1].num_events == 4
    assert log_of("log")[0]


def test_only_an_event_log_is_replaced(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", random_table(num_events=50))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="mine is not empty and not an event log"):
        ingest(EventsConfig(inputs=[file]), tmp_path / "mine")
    with pytest.raises(InputError, match=r"a.parquet is a file"):
        ingest(EventsConfig(inputs=[file]), file)
    (tmp_path / "empty *? é").mkdir()
    ingest(EventsConfig(inputs=[file]), tmp_path / "empty *? é")
    ingest(EventsConfig(inputs=[file], ad_sources=["comment"]), tmp_path / "empty *? é")
    assert names(tmp_path) == ["a.parquet", "empty *? é", "mine"]


def test_two_at_once(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", random_table(num_events=50))
    busy = tmp_path / ".log.building-1-1"
    busy.mkdir()
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(AlureError, match="another process is writing"):
            ingest(EventsConfig(inputs=[file]), tmp_path / "log")
        assert busy.exists()
    finally:
        os.close(handle)
    ingest(EventsConfig(inputs=[file]), tmp_path / "log")
    assert names(tmp_path) == ["a.parquet", "log"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet", random_table(num_events=50))
    ingest(EventsConfig(inputs=[file]), tmp_path / "log")
    (tmp_path / "log").rename(tmp_path / ".log.replaced-7")
    with pytest.raises(InputError):
        ingest(EventsConfig(inputs=[tmp_path / "nowhere"]), tmp_path / "log")
    assert Events.open(tmp_path / "log").manifest.num_events == 50
    (tmp_path / ".log.replaced-8").mkdir()  # killed after both renames, before the old one was removed
    assert ingest(EventsConfig(inputs=[file]), tmp_path / "log").unchanged
    assert names(tmp_path) == ["a.parquet", "log"]


def test_a_log_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    """The link itself was moved, and the second ingest failed after all its work."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "disk" / "log")
    for events in (50, 70):
        file = write_rows(tmp_path / "a.parquet", random_table(num_events=events))
        ingest(EventsConfig(inputs=[file]), tmp_path / "log")
        assert Events.open(tmp_path / "log").manifest.num_events == events
    assert names(tmp_path) == ["a.parquet", "disk", "log"]
    assert names(tmp_path / "disk") == ["log"]
    assert (tmp_path / "log").is_symlink()


def test_opening_what_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; make it with `alure ingest"):
        Events.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no events.json"):
        Events.open(tmp_path)
    make_events(tmp_path, random_table(num_events=50), name="log")
    manifest = tmp_path / "log" / "events.json"
    text = manifest.read_text()
    manifest.write_text(text.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))
    with pytest.raises(InputError, match="format version 99, expected 1"):
        Events.open(tmp_path / "log")
    for damaged in (text[:100], "[]", text.replace("num_users", "users_num"), ""):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match=r"events.json (is damaged|has format version None)"):
            Events.open(str(tmp_path / "log"))
