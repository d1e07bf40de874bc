"""An export is a folder of its own: whole or not there, never mixed with another, never somebody else's."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.graph import add_generation, vectors

from alure.engine.errors import InputError
from alure.engine.export import export_store
from alure.engine.store import EmbeddingStore


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    store = EmbeddingStore(tmp_path / "store", create=True)
    add_generation(store, "g1", vectors(30, 8))
    return store


def test_a_foreign_folder_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    for name in ("notes.txt", "export.json"):
        (out / name).write_text("[]")
        with pytest.raises(InputError, match=r"mine is not empty and no export \(export.json\), so it is not replaced"):
            export_store(store.path, "npy", out)
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "notes.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; expected a folder"):
        export_store(store.path, "npy", tmp_path / "file")
    export_store(store.path, "npy", tmp_path / "out")
    with pytest.raises(InputError, match="out is an export to npy, so it is not replaced"):
        export_store(store.path, "parquet", tmp_path / "out")


def test_an_export_replaces_the_one_before_as_a_whole(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors of one generation beside the ids of another would be wrong for everybody."""
    out, link = tmp_path / "disk" / "out", tmp_path / "link"
    link.symlink_to(out)  # to where nothing is yet
    export_store(store.path, "npy", link)
    (out / "stale.npy").write_text("of a country that is no more")
    values = vectors(20, 8, seed=1)
    add_generation(store, "g2", values, as_of=8)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as failing:
        failing.setattr("alure.engine.export.np.save", full)
        with pytest.raises(OSError, match="disk full"):
            export_store(store.path, "npy", link)
    assert len(pq.read_table(out / "user_ids.parquet")) == len(np.load(out / "embeddings.npy")) == 30
    export_store(store.path, "npy", link)
    assert sorted(path.name for path in out.iterdir()) == ["embeddings.npy", "export.json", "user_ids.parquet"]
    assert np.array_equal(np.load(out / "embeddings.npy"), values)
    assert link.is_symlink()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
