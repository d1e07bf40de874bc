"""Upkeep of the store: damage is found and named, generations are withdrawn and brought back, old ones go."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.command_line import CommandLine
from support.store import generation, graph, unit

from alure.engine.errors import AlureError, InputError
from alure.engine.store import EmbeddingStore
from alure.engine.store.delta import DataTable
from alure.engine.store.location import half_written
from alure.engine.store.upkeep import rollback, vacuum, verify


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Generations g1, g2 and g3 of three users, each with a graph; g4 never finished."""
    store = EmbeddingStore(tmp_path / "store", create=True)
    for number in (1, 2, 3):
        publish(store, f"g{number}", as_of=number)
    store.write_unit("g4", "0-2", unit([1, 2]))
    return store


def publish(store: EmbeddingStore, name: str, as_of: int = 7) -> None:
    countries = ["AR", "BR", "B'R"]
    store.write_unit(name, "0-3", unit([1, 2, 3], country=countries, as_of=as_of))
    store.publish(generation(3, name))
    store.write_graph(name, "alure", [graph([1, 2, 3])], {})


def names(store: EmbeddingStore, table: str = "embeddings") -> list[str]:
    return [p.generation for p in store.generations(table)]


def parquet(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.parquet") if "_delta_log" not in file.parts)


def test_a_sound_store_verifies(store: EmbeddingStore) -> None:
    report = verify(store)
    assert report.generations == ["g1", "g2", "g3"]
    assert (report.publications, report.files) == (6, 3 * (3 + 1))
    assert verify(store, "g2").files == 4
    with pytest.raises(InputError, match="published: g1, g2, g3"):
        verify(store, "g4")


def test_a_flipped_bit_anywhere_is_found(store: EmbeddingStore) -> None:
    random = np.random.default_rng(0)
    folders = [store.path / "embeddings" / "generation=g1", store.path / "graph" / "generation=g1"]
    for file in [file for folder in folders for file in parquet(folder)]:
        sound = file.read_bytes()
        for place in (0, len(sound) - 1, *random.integers(0, len(sound), 2)):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << int(random.integers(8))
            file.write_bytes(damaged)
            with pytest.raises(AlureError, match=r"1 of 4 files are damaged(.|\n)*" + file.name):
                verify(store, "g1")
        file.write_bytes(sound)
    verify(store)


def test_a_lost_and_a_truncated_file_are_found(store: EmbeddingStore) -> None:
    first, second = parquet(store.path / "embeddings" / "generation=g1")[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(AlureError, match=r"2 of 12 files(.|\n)*, got none"):
        verify(store)
    verify(store, "g2")


def test_a_rollback_takes_back_the_newest_and_what_derives_from_it(store: EmbeddingStore) -> None:
    report = rollback(store)
    assert (report.newest, report.withdrawn, report.restored) == ("g2", ["g3"], False)
    assert names(store) == names(store, "graph") == ["g1", "g2"]
    assert store.latest("graph", "alure").generation == "g2"
    with pytest.raises(InputError, match="generation 'g3' of embeddings"):
        store.read_embeddings("g3")
    assert rollback(store).newest == "g1"
    with pytest.raises(InputError, match="has 1 published generations; there is none before"):
        rollback(store)
    back = rollback(store, "g3")
    assert (back.newest, back.withdrawn, back.restored) == ("g3", [], True)
    assert names(store) == names(store, "graph") == ["g1", "g3"]
    assert store.read_graph("g3").num_rows == 3
    with pytest.raises(InputError, match="generation 'g9'"):
        rollback(store, "g9")


def test_a_rollback_is_seen_at_one_stroke(store: EmbeddingStore) -> None:
    version = store.log.log.open().version()
    rollback(store, "g1")
    assert store.log.log.open().version() == version + 1


def test_a_vacuum_keeps_what_can_be_asked_for(store: EmbeddingStore) -> None:
    assert vacuum(store).removed == []  # everything is younger than a week
    sizes = {file: file.stat().st_size for file in parquet(store.path)}
    plan = vacuum(store, keep=2, grace_hours=0, dry_run=True)
    assert sizes.keys() == set(parquet(store.path))
    report = vacuum(store, keep=2, grace_hours=0)
    assert plan.removed == report.removed
    assert [name.split("/")[:2] for name in report.removed] == [
        ["embeddings", "g4"],
        ["embeddings", "g1"],
        ["graph", "g1"],
    ]
    assert names(store) == ["g2", "g3"]
    gone = sizes.keys() - set(parquet(store.path))
    assert report.files == len(gone) == 3 + 1 + 1 + 2  # and two files of checksums
    assert report.size_bytes == sum(sizes[file] for file in gone)
    assert verify(store).files == 8
    assert store.read_embeddings().num_rows == 3


def age_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables say that their files were written long ago."""
    files = DataTable.files
    monkeypatch.setattr(DataTable, "files", lambda *a, **k: [f._replace(written_at=0.0) for f in files(*a, **k)])


def test_what_was_withdrawn_stays_for_the_grace(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.embeddings.remove("g4", generation="g4")
    age_files(monkeypatch)
    rollback(store)
    assert vacuum(store, grace_hours=1).removed == []
    assert rollback(store, "g3").restored
    rollback(store)
    vacuum(store, grace_hours=0)
    with pytest.raises(InputError, match="a vacuum has removed its rows; refresh again"):
        rollback(store, "g3")


def test_a_removed_generation_can_be_made_again(store: EmbeddingStore) -> None:
    rollback(store)
    for _ in range(2):
        vacuum(store, grace_hours=0)
        assert store.written_units("g3", ["0-3"]) == set()
        assert store.count_written("g3") == 0
        publish(store, "g3")
        assert not store.write_unit("g3", "0-3", unit([1, 2, 3]))
        assert verify(store, "g3").files == 4
        assert store.read_embeddings()["user_id"].to_pylist() == [1, 3, 2]  # by country: AR, B'R, BR
        rollback(store)


def test_a_reader_under_way_is_not_disturbed(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, pinned = store.iter_embeddings("g1"), store.published("g1", "embeddings")
    assert store.read_user(2, pinned)["user_id"] == 2
    age_files(monkeypatch)
    assert len(vacuum(store, keep=1, grace_hours=1).removed) == 5
    assert names(store) == ["g3"]
    assert sum(batch.num_rows for batch in reading) == 3
    assert store.read_user(2, pinned)["user_id"] == 2


def test_what_a_dead_writer_left_goes(store: EmbeddingStore) -> None:
    folder = store.path / "embeddings" / "generation=g1" / "country=AR"
    for name in ("part-9.zstd.parquet", "part-9.zstd.parquet#1"):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (0, 0))
    assert vacuum(store, dry_run=True).files == 2
    assert vacuum(store).size_bytes == 8
    assert not list(folder.glob("part-9*"))
    verify(store)


def test_a_generation_published_during_a_vacuum_stays(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    append = store.log.append
    store.write_unit("g5", "0-2", unit([1, 2]))

    def a_moment_later(decide: Any) -> Any:
        EmbeddingStore(store.path).publish(generation(2, "g5"))
        return append(decide)

    monkeypatch.setattr(store.log, "append", a_moment_later)
    vacuum(store, keep=1, grace_hours=0)
    assert names(store) == ["g3", "g5"]
    assert store.read_embeddings("g5").num_rows == 2


def test_history_is_a_sequence_a_user(store: EmbeddingStore) -> None:
    carried = unit([1, 5], country="AR", as_of=3)
    store.write_unit("g5", "0-3", pa.concat_tables([carried.slice(0, 1), unit([5], as_of=9)]))
    store.publish(generation(2, "g5", as_of=9))
    found = store.read_history([1, 5, 99])
    assert found["user_id"].to_pylist() == [1, 5]
    assert found["as_ofs"].to_pylist() == [[1, 2, 3], [9]]  # carried forward from g3: once
    assert found["models"].to_pylist() == [["m"] * 3, ["m"]]
    assert np.array(found["embeddings"][0].as_py()).shape == (3, 4)
    assert store.read_history([1], generations=2)["as_ofs"].to_pylist() == [[3]]


def test_upkeep_from_the_command_line(
    store: EmbeddingStore, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alure = CommandLine(capfd, monkeypatch)
    assert alure("verify", store.path, "--json").json["files"] == 12
    assert alure("rollback", store.path, "--json").json["withdrawn"] == ["g3"]
    assert alure("vacuum", store.path, "--grace-hours", 0, "--dry-run", "--json").json["dry_run"]
    assert alure("vacuum", store.path, "--keep", 1, "--grace-hours", 0, "--json").json["kept"] == ["g2"]
    assert alure("vacuum", store.path, "--grace-hours", -1).code == 2
    assert alure("rollback", store.path).code == 2
    file = parquet(store.path / "embeddings")[0]
    file.write_bytes(file.read_bytes()[::-1])
    damaged = alure("verify", store.path, "--json")
    assert damaged.code == 1
    assert file.name in json.loads(damaged.out)["error"]


def test_a_file_whose_writer_lives_is_not_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left#1").touch()
    found = Path.rglob

    def a_moment_later(self: Path, pattern: str) -> list[Path]:
        (tmp_path / "written#2").touch()
        listed = sorted(found(self, pattern))
        (tmp_path / "written#2").rename(tmp_path / "written")
        return listed

    monkeypatch.setattr(Path, "rglob", a_moment_later)
    assert half_written(tmp_path, time.time() + 60) == ["left#1"]
