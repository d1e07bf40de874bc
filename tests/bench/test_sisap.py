"""The all-kNN runner: what it writes is what the task asks for, and its recall is that of a brute-force search."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

from alure.bench.sisap import K, all_knn, main, make_vectors  # noqa: E402


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    make_vectors(tmp_path / "in.h5", 1500, 16)
    return tmp_path / "in.h5"


def brute_force(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(neighbours from 1, cosines [n, n]) without self."""
    with h5py.File(path) as file:
        x = file["train"][:].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :K] + 1, cosines


def test_all_clusters_searched_is_exact(vectors: Path, tmp_path: Path) -> None:
    report = all_knn(vectors, tmp_path / "out.h5", 10, 10, None)
    truth, cosines = brute_force(vectors)
    with h5py.File(tmp_path / "out.h5") as file:
        knns, dists = file["knns"][:], file["dists"][:]
        assert dict(file.attrs)["algo"] == "alure"
        assert {"task", "buildtime", "querytime", "params"} <= set(file.attrs)
    best = np.take_along_axis(cosines, truth - 1, 1)
    np.testing.assert_allclose(np.take_along_axis(cosines, knns - 1, 1), best, atol=1e-6)
    np.testing.assert_allclose(dists, 1 - best, atol=1e-5)
    assert (knns != np.arange(1, 1501)[:, None]).all()
    assert report["recall"] > 0.999
    assert report["params"] == "nlist=10, nprobe=10"


def test_recall_is_of_the_files_truth_without_self(vectors: Path, tmp_path: Path) -> None:
    truth, _ = brute_force(vectors)
    with h5py.File(vectors, "a") as file:
        file["allknn/knns"] = np.concatenate([np.arange(1, 1501)[:, None], truth], axis=1)
    few = all_knn(vectors, tmp_path / "few.h5", 20, 1, None)["recall"]
    with h5py.File(tmp_path / "few.h5") as file:
        found = file["knns"][:]
    sample = np.sort(np.random.default_rng(0).choice(1500, 1000, replace=False))
    expected = np.mean([len(set(truth[row]) & set(found[row])) / K for row in sample])
    assert few == pytest.approx(expected, abs=1e-4)
    assert 0.2 < few < 0.99


def test_the_memory_cap_is_one(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("train", (3_000_000, 384), np.float16)  # nothing is written: 4.6 GB only in memory
    run = [sys.executable, "-m", "alure.bench.sisap", "run", str(tmp_path / "in.h5"), "--memory-gib", "3"]
    failed = subprocess.run([*run, "--out", str(tmp_path / "out.h5")], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "memory" in failed.stderr
    assert not (tmp_path / "out.h5").exists()


def test_the_command(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sisap", "run", str(vectors), "--out", str(tmp_path / "out.h5")])
    assert main() == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["dims"], report["params"]) == (1500, 16, "nlist=134, nprobe=12")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert main() == 2
