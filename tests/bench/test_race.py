"""The race itself: who takes part, whose turn it is, what is reported, drawn and appended."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alure.bench import __main__ as bench_main
from alure.bench import neighbors
from alure.bench.clock import Clock
from alure.bench.conftest import Schedule
from alure.bench.plot import draw
from alure.bench.plot_neighbors import draw as draw_neighbors
from alure.bench.race import Contest, Entry, LeftOut, Race, difference, forward_entry
from alure.bench.report import append_lines, render, results_path, rows_of

CPU = Clock(torch.device("cpu"))


class StoppedClock(Clock):
    """A clock on which every call takes the seconds it returns."""

    def lap(self, run: Callable[[], Any]) -> float:
        return float(run())

    def peak(self, run: Callable[[], Any]) -> tuple[int | None, float]:
        return None, self.lap(run)


def entry(name: str, seconds: float, turns: list[str] | None = None, problem: str = "") -> Entry:
    def run() -> float:
        if turns is not None:
            turns.append(name)
        return seconds

    return Entry(name, lambda: (run, lambda _: problem))


def test_implementations_take_turns_and_slow_ones_sit_out_evenly() -> None:
    turns: list[str] = []
    entries = [entry("alure", 0.1, turns), entry("same", 0.1, turns), entry("slow", 0.2, turns)]
    race = Race(Contest("s", "c", entries), StoppedClock(torch.device("cpu")), seconds=3.0)
    turns.clear()
    for _ in range(race.rounds):
        race.round()
    laps = {result["implementation"]: len(result["laps_s"]) for result in race.results()}
    assert race.rounds == 10
    assert laps == {"alure": 10, "same": 10, "slow": 5}
    assert turns == ["alure", "same", "alure", "same", "slow"] * 5


def test_who_refuses_is_left_out_and_who_is_wrong_is_not_timed() -> None:
    def refuse() -> Any:
        raise LeftOut("needs a GPU")

    def fail() -> Any:
        raise RuntimeError("out of memory\nsecond line")

    entries = [entry("alure", 0.1), Entry("a", refuse), Entry("b", fail), entry("wrong", 0.1, problem="off by 3")]
    race = Race(Contest("s", "c", entries), StoppedClock(torch.device("cpu")), seconds=1.0)
    assert race.left_out == {"a": "needs a GPU", "b": "out of memory", "wrong": "off by 3"}
    assert race.wrong == ["wrong: off by 3"]
    assert [result["implementation"] for result in race.results()] == ["alure"]
    with pytest.raises(RuntimeError, match="out of memory"):  # ours may refuse an argument, but not break
        Race(Contest("s", "c", [Entry("alure", fail)]), CPU, seconds=1.0)


def test_difference_tells_errors_and_nan() -> None:
    expected = torch.tensor([1.0, -10.0])
    assert difference(expected + 1e-4, expected, torch.float32) == ""
    assert "off the reference" in difference(expected + 1e-2, expected, torch.float32)
    assert difference(expected + 1e-2, expected, torch.bfloat16) == ""
    assert "off the reference" in difference(expected * torch.nan, expected, torch.bfloat16)


def test_peak_is_the_memory_held_at_once() -> None:
    def run() -> Tensor:
        for _ in range(3):
            torch.ones(50 << 20, dtype=torch.uint8)
        return torch.ones(1)

    peak, seconds = CPU.peak(run)
    assert seconds > 0
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert 45 << 20 <= peak < 60 << 20


def contest_of(entries: list[dict[str, Any]], left_out: dict[str, str], case: str) -> dict[str, Any]:
    info = {"suite": "attention", "case": case, "dtype": "float32", "flops": 2e9, "moved": 1e9}
    info |= {"matrix_rate": 1e11, "copy_rate": 1e10, "results": entries, "left_out": left_out}
    info["facts"] = {
        "shape": case,
        "longest": 64,
        "users": 2,
        "tokens": 128,
        "heads": 4,
        "clock": "wall clock",
        "head_dim": 64,
        "backward": False,
    }
    return info


def lap_times(name: str, *laps: float, **facts: Any) -> dict[str, Any]:
    ours = name.startswith("alure")
    return {"implementation": name, "ours": ours, "laps_s": list(laps), "peak_bytes": 5_000_000, "facts": facts}


def test_rows_hold_medians_ratios_and_shares(tmp_path: Path) -> None:
    quantiles = {"quantiles_ms": {"search": {"p50": 2.0, "p99": 31.25}}}
    entries = [lap_times("alure, time bias", 0.1, 0.3, 0.1, **quantiles), lap_times("SDPA", 0.4)]
    busy = contest_of([], {}, "before") | {"matrix_rate": 1e10, "copy_rate": 1e9}
    rows = rows_of(contest_of(entries, {"HSTU": "needs a GPU"}, "lognormal"), [busy])
    ours, sdpa, hstu = rows
    assert ours["median_s"] == pytest.approx(0.1)
    assert ours["gflops"] == pytest.approx(20)
    assert ours["share_of_matrix_rate"] == pytest.approx(0.2)
    assert ours["share_of_copy_rate"] == pytest.approx(1.0)
    assert (sdpa["ours_is_faster_by"], sdpa["rounds"]) == (pytest.approx(4.0), 1)
    assert hstu["left_out"] == "needs a GPU"
    table = render(rows)
    assert table.index("alure, time bias") < table.index("SDPA") < table.index("HSTU")
    assert "4.00×" in table
    assert re.search(r"\n +search +p50 +2\.000 ms +p99 +31\.250 ms\n", table)
    assert "needs a GPU" in table
    assert "5.0 MB" in table
    append_lines(rows, tmp_path / "a" / "results.jsonl")
    append_lines(rows, tmp_path / "a" / "results.jsonl")
    lines = (tmp_path / "a" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert {"device", "commit", "torch", "versions"} <= json.loads(lines[0]).keys()


SUITE = """
import os
import pytest
from alure.bench.race import Contest, Entry

@pytest.fixture
def made(request):
    with open(request.config.rootpath / "made", "a") as file:
        file.write(request.node.name)

@pytest.mark.parametrize("name", ["first", "second", "third"])
def bench_it(race, made, name):
    def breaks():
        {breaks}
    run = breaks if name == "second" else lambda: 1
    race(Contest("attention", name, [Entry("alure", lambda: (run, lambda found: ""))]))
"""


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """(exit code, cases that were kept) of SUITE, in a folder of its own."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    home = Path(bench_main.__file__).parent
    for file in ("conftest.py", "pytest.ini"):
        shutil.copy(home / file, tmp_path / file)
    words = [str(tmp_path / "suite.py"), f"--rootdir={tmp_path}", "-c", str(tmp_path / "pytest.ini"), "--quick", "-q"]

    def run(breaks: str, *more: str) -> tuple[int, list[str]]:
        (tmp_path / "suite.py").write_text(SUITE.replace("{breaks}", breaks))
        taken: list[str] = []
        return bench_main.run([*words, *more], None, lambda rows: taken.append(rows[0]["case"])), taken

    return run


@pytest.mark.parametrize(
    ("breaks", "kept"),
    [("os.abort()", ["first"]), ("raise RuntimeError('CUDA error')", ["first", "third"])],
    ids=["crash", "error"],
)
def test_what_is_over_is_kept(
    breaks: str, kept: list[str], run_suite: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """Rows come contest by contest, whatever the one after it does to its process."""
    code, taken = run_suite(breaks)
    assert code != 0
    assert taken == kept
    assert "second" in (tmp_path / "made").read_text()


def test_of_a_contest_that_is_too_late_nothing_is_made(
    run_suite: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    assert run_suite("pass", "--minutes", "1e-9") == (0, [])
    assert not (tmp_path / "made").exists()


def test_a_contest_that_hangs_is_ended(tmp_path: Path) -> None:
    (tmp_path / "suite.py").write_text("import time\ntime.sleep(600)")
    started = time.monotonic()
    assert bench_main.run([str(tmp_path / "suite.py")], 0.5, lambda rows: None) != 0
    assert time.monotonic() - started < 60


def test_a_folder_names_the_results_after_the_device(tmp_path: Path) -> None:
    assert results_path(tmp_path / "x.jsonl") == tmp_path / "x.jsonl"
    name = results_path(tmp_path).name
    assert name.endswith(".jsonl")
    assert name == name.lower()
    assert " " not in name


def test_the_plot_names_every_implementation(tmp_path: Path) -> None:
    entries = [lap_times("alure, time bias", 0.1), lap_times("SDPA of the batch, no bias", 0.2)]
    rows = rows_of(contest_of(entries, {"HSTU": "needs a GPU"}, "equal 64"))
    rows += rows_of(contest_of(entries, {}, "lognormal"))
    draw(rows, tmp_path / "figures" / "attention.svg")
    svg = (tmp_path / "figures" / "attention.svg").read_text()
    for label in ("alure, time bias", "SDPA of the batch, no bias", "2.00×", "GFLOP/s", "Lognormal lengths"):
        assert label in svg
    with pytest.raises(ValueError, match="expected timed rows"):
        draw([], tmp_path / "empty.svg")


def test_the_plot_of_neighbors_has_a_curve_of_each_implementation(tmp_path: Path) -> None:
    def rows_at(case: str, facts: dict[str, Any], *entries: dict[str, Any]) -> list[dict[str, Any]]:
        rows = rows_of(contest_of(list(entries), {}, case))
        return [row | {"suite": "neighbors", "channels": 64, "nlist": 400} | facts for row in rows]

    rows = []
    for nprobe, recall in ((10, 0.5), (40, 0.8)):
        laps = [lap_times("alure grouped", 0.01 * nprobe), lap_times("FAISS IVFFlat", 0.1 * nprobe)]
        rows += rows_at(f"{nprobe}", {"users": 5000, "nprobe": nprobe, "recall": recall}, *laps)
    rows += rows_at("larger", {"users": 90_000, "nprobe": 50, "recall": 0.9}, lap_times("alure grouped", 3.0))
    laps = [lap_times("alure train_kmeans", 0.1, objective=0.49), lap_times("faiss.Kmeans", 0.4, objective=0.48)]
    rows += rows_at("k-means", {"users": 5000, "niter": 17}, *laps)
    draw_neighbors(rows, tmp_path / "neighbors.svg")
    svg = (tmp_path / "neighbors.svg").read_text()
    for label in ("alure grouped", "FAISS IVFFlat", "All pairs, 5,000 × 64, 400 lists", "10", "40", "faiss.Kmeans"):
        assert f">{label}" in svg
    assert "90,000" not in svg
    draw_neighbors(rows, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg
    with pytest.raises(ValueError, match="expected timed rows of the neighbors suite"):
        draw_neighbors([row | {"suite": "attention"} for row in rows], tmp_path / "empty.svg")


def test_neighbors_are_raced_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    case = neighbors.Case(5_000, 64, 64, torch.device("cpu"))
    monkeypatch.setattr(neighbors, "find_spec", lambda name: None)
    for contest in (neighbors.all_pairs(case, 8), neighbors.clustering(case, 10)):
        race = Race(contest, CPU, seconds=0.01)
        race.round()
        assert all(result["ours"] and result["laps_s"] for result in race.results())
        assert set(race.left_out) <= {"FAISS IVFFlat", "FAISS big_batch_search"}
        assert not race.wrong


def test_a_forward_entry_checks_what_it_times() -> None:
    one = forward_entry("alure", lambda: torch.ones(3), torch.zeros(3), torch.float32)
    run, check = one.prepare()
    assert "off the reference" in check(run())


def test_minutes_are_shared_and_late_contests_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("alure.bench.conftest.time.monotonic", lambda: now)
    options: Any = SimpleNamespace(getoption=lambda name: {"--minutes": 1.0, "--quick": False}[name])
    items: list[Any] = [SimpleNamespace(path=name[0], name=name) for name in ("a1", "a2", "a3", "b1")]
    schedule = Schedule(options, items)
    assert schedule.seconds(items[0]) == pytest.approx(45 / 3 / 2)
    now = 44.0  # suite a ends at 45 s of 60
    assert schedule.seconds(items[2]) == pytest.approx(0.5)
    now = 46.0
    with pytest.raises(pytest.skip.Exception, match="no time left"):
        schedule.seconds(items[2])
    assert schedule.seconds(items[3]) == pytest.approx(7.0)
