"""To watch a refresh and to profile it: progress, Prometheus, ranges, FLOPs, the roofline."""

import json
import math
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import CommandLine
from support.exposition import Metric, parse_exposition
from support.model import DAY, START
from support.refresh import jagged_log, save_model
from torch.profiler import record_function

from alure.engine import progress, ranges
from alure.engine.config import RefreshConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.limits import matrix_rate
from alure.engine.metrics import exposition, serve_metrics
from alure.engine.model import UserModel
from alure.engine.model.flops import ForwardFlops, within
from alure.engine.profiling import profile_refresh
from alure.engine.progress import short
from alure.engine.refresh import RefreshJob
from alure.engine.refresh.embedder import Embedder, Snapshot, Work
from alure.engine.refresh.outlook import Outlook
from alure.engine.refresh.watch import Watch
from alure.engine.roofline import LeastWork, visible_pairs
from alure.kernels.attention.arguments import UNLIMITED

SMALL = RefreshConfig(unit_users=16, token_budget=150, precision="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events"))
    return folder


def scrape(address: str) -> dict[str, Metric]:
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse_exposition(answer.read().decode())


# ---- Prometheus


@pytest.mark.parametrize("workers", [1, 2])
def test_a_scraper_watches_a_refresh(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Scraped after every batch and every unit: counters never fall, and end at what the report says; and its cost."""
    monkeypatch.setattr("alure.engine.refresh.workers.os.cpu_count", lambda: 6)  # here, not in the processes
    job = RefreshJob(world / "model", world / "events", tmp_path, config=SMALL, workers=workers)
    scrapes: list[dict[str, Metric]] = []
    add = Watch.add
    with serve_metrics("127.0.0.1", 0, job.metrics) as address:
        scrapes.append(scrape(address))
        monkeypatch.setattr(Watch, "add", lambda watch, work: (add(watch, work), scrapes.append(scrape(address))))
        report = job.run()
        scrapes.append(scrape(address))
    with pytest.raises(urllib.error.URLError):
        scrape(address)  # nobody listens any more
    assert len(scrapes) > report.batches + report.units
    counters = [name for name, metric in scrapes[-1].items() if metric.kind == "counter"]
    assert len(counters) >= 6
    for before, after in pairwise(scrapes):
        assert all(before[name].value <= after[name].value for name in counters)
    assert {s["alure_refresh_users_pending"].value for s in scrapes} > {0.0}
    first, last = scrapes[0], scrapes[-1]
    assert all(first[name].value == 0 for name in counters)
    assert last["alure_refresh_users_embedded_total"].value == report.embedded_now == 58
    assert last["alure_refresh_users_to_embed"].value == 58
    assert last["alure_refresh_events_embedded_total"].value == report.tokens
    assert last["alure_refresh_events_to_embed"].value == report.tokens
    assert last["alure_refresh_units_written_total"].value == last["alure_refresh_units"].value == report.units == 4
    assert last["alure_refresh_flops_total"].value == pytest.approx(report.flops)
    for name in ("users_pending", "units_waiting", "quarantined_total", "seconds_left"):
        assert last[f"alure_refresh_{name}"].value == 0
    assert report.devices == (torch.get_num_threads() if workers == 1 else 6)
    assert report.device_hours == pytest.approx(report.devices * report.seconds / 3600)
    assert report.device_hours_per_billion_users == pytest.approx(report.device_hours / 58 * 1e9)


def test_the_file_has_the_live_figures_and_the_reports(world: Path, tmp_path: Path) -> None:
    job = RefreshJob(world / "model", world / "events", tmp_path, config=SMALL)
    report = job.run()
    live, final = parse_exposition(job.metrics()), parse_exposition(job.metrics(report))
    assert live.keys() < final.keys()
    assert final["alure_refresh_users_per_second"].value == report.users_per_second
    assert final["alure_refresh_freshness"].samples == {(("of", "now"),): 58.0}
    assert "alure_refresh_share_of_matrix_rate" not in final  # a short job does not measure it
    assert all(metric.help for metric in final.values())


@given(st.dictionaries(st.text(), st.floats() | st.integers(0, 2**62)))
def test_any_label_and_number_is_read_back(group: dict[str, float]) -> None:
    text = exposition("test", {"group": group, "name": "no number", "one": 1}, {"group": "some", "one": "1"})
    found = parse_exposition(text)
    samples = found["alure_test_group"].samples if group else {}
    assert samples.keys() == {(("of", part),) for part in group}
    for part, value in group.items():
        read = samples[(("of", part),)]
        assert read == float(value) or (math.isnan(read) and math.isnan(value))
    assert found["alure_test_one"].value == 1


def test_rude_scrapers_leave_the_job_alone(capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def text() -> str:
        asked.append(1)
        return "# HELP one 1\n# TYPE one gauge\none 1.0\n" * 100_000  # more than a socket takes at once

    with serve_metrics("127.0.0.1", 0, text) as address:
        port = int(address.split(":")[2].split("/")[0])
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(address.replace("/metrics", "/etc/passwd"))
        idle = socket.create_connection(("127.0.0.1", port))  # says nothing until all is over
        for said in (b"", b"\x00\xff not http\r\n\r\n", b"GET /metrics?collect=all HTTP/1.0\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as rude:
                rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
                rude.sendall(said)
                if said.startswith(b"GET"):
                    rude.recv(1)
        with pytest.raises(ValueError, match="a second group"):
            scrape(address)  # whole, after all of them
    idle.close()
    assert len(asked) == 2
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_stops_before_the_work(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alure = CommandLine(capfd, monkeypatch)
    words = ["refresh", world / "model", world / "events", "--store", tmp_path / "store", "--json"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = alure(*words, "--metrics-port", port)
        assert (refused.code, refused.json["exit_code"]) == (2, 2)
        assert f"--metrics-port: cannot listen on 127.0.0.1:{port}: " in refused.err
        assert "give another port" in refused.err
        assert not list((tmp_path / "store").glob("embeddings*"))
    done = alure(*words, "--metrics-port", 0, "--metrics-host", "localhost")
    assert done.code == 0, done.err
    assert "refresh: figures at http://localhost:" in done.err
    assert alure(*words, "--metrics-port", 0, "--engine", "ray").code == 2


# ---- progress


def test_numbers_are_short() -> None:
    numbers = [0, 1, 0.25, 999, 999.6, 1000, 1234, 45_678, 999_499, 1e6, 1.2e9, 3.3e13, 7e18, 2e21]
    expected = ["0", "1", "0.25", "999", "1k", "1k", "1.23k", "45.7k", "999k", "1M", "1.2G", "33T", "7E", "2e+03E"]
    assert [short(number) for number in numbers] == expected


@pytest.mark.parametrize("width", [40, 80, 160])
def test_progress_is_one_line_with_nothing_to_do(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = progress.Console(force_terminal=True, width=width, record=True)
    monkeypatch.setattr(progress, "console", console)
    watch = Watch()
    watch.matrix_rate = 1e9
    assert watch.figures()["seconds_left"] is None
    with progress.track("Embedding", 0, "events") as bar:
        watch.start(bar)
        watch.plan(Outlook(), 1, 0)
        watch.add(Work(units=1))
    assert watch.note() == "0 users/s · MFU 0.0% · 1/1 units · 0 to write"
    first, *frames = console.export_text().rstrip().split("Embedding")
    assert (first, len(frames) > 1) == ("", True)
    assert all(len(f"Embedding{frame}".rstrip()) <= width and "\n" not in frame for frame in frames)


def test_plain_lines_tell_rates_and_queues(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    config = SMALL.model_copy(update={"token_budget": 20})  # long enough for the matrix rate to be measured
    job = RefreshJob(world / "model", world / "events", tmp_path, config=config)
    report = job.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Embedding: ")]
    assert len(lines) == report.batches + report.units
    assert lines[-1].startswith(f"Embedding: {report.tokens:,}/{report.tokens:,} events · ")
    assert " · 0 s left · " in lines[-1]
    assert lines[-1].endswith("% · 4/4 units · 0 to write")
    assert "MFU " in lines[-1]
    assert any("3/4 units" in line and "· 0 to write" not in line for line in lines)
    assert report.share_of_matrix_rate is not None
    assert 0 < report.share_of_matrix_rate < 1


def test_an_incremental_job_without_news_is_watched_too(world: Path, tmp_path: Path) -> None:
    RefreshJob(world / "model", world / "events", tmp_path, config=SMALL, as_of=START + 20 * DAY).run()
    job = RefreshJob(
        world / "model", world / "events", tmp_path, config=SMALL, as_of=START + 21 * DAY, incremental=True
    )
    report = job.run()
    assert (report.carried, report.embedded_now, report.flops) == (58, 0, 0.0)
    figures = parse_exposition(job.metrics(report))
    assert figures["alure_refresh_units_written_total"].value == 4
    assert figures["alure_refresh_users_per_second"].value == 0
    assert "alure_refresh_device_hours_per_billion_users" not in figures


# ---- ranges


class Recorder:
    """Ranges as NVTX sees them: pushed and popped."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def push(self, name: str) -> None:
        self.open.append(name)
        self.seen.append(tuple(self.open))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.push(name)
        try:
            yield
        finally:
            assert self.open.pop() == name


def test_ranges_nest_and_close_on_an_exception() -> None:
    recorder = Recorder()
    with pytest.raises(KeyError), ranges.stage("refresh", recorder), ranges.op("embed"), ranges.op("attention"):
        raise KeyError
    assert recorder.open == []
    assert recorder.seen[-1] == ("alure.refresh", "alure.refresh/embed", "alure.refresh/attention")
    with ranges.op("embed"):
        pass
    with ranges.stage("refresh", None), ranges.op("embed"):
        pass
    assert len(recorder.seen) == 3


def test_a_stage_is_its_threads_own() -> None:
    """A retriever's thread beside a refresh does not mark its batches as the refresh's."""
    recorder = Recorder()

    def elsewhere() -> None:
        with ranges.op("embed"):
            pass

    with ranges.stage("refresh", recorder):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert recorder.seen == [("alure.refresh",)]


def test_a_cuda_device_is_marked_by_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("torch.cuda.nvtx.range_push", recorder.push)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: recorder.open.pop())
    assert ranges.marker_of(torch.device("cpu")) is None
    with (
        pytest.raises(KeyError),
        ranges.stage("refresh", ranges.marker_of(torch.device("cuda", 0))),
        ranges.op("read"),
    ):
        raise KeyError
    assert recorder.open == []
    assert recorder.seen[-1] == ("alure.refresh", "alure.refresh/read")


def test_a_refresh_that_fails_closes_its_ranges(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr("alure.engine.refresh.shard.marker_of", lambda device: recorder)
    RefreshJob(world / "model", world / "events", tmp_path / "a", config=SMALL).run()
    names = {path[-1] for path in recorder.seen}
    ops = ("read", "to_device", "embed", "encode", "plan", "project", "attention", "feed_forward", "pool", "compress")
    assert names == {"alure.refresh", *(f"alure.refresh/{name}" for name in (*ops, "to_host", "write"))}
    assert ("alure.refresh", "alure.refresh/embed", "alure.refresh/attention") in recorder.seen

    def fail(*arguments: Any, **options: Any) -> None:
        raise InputError("in the middle")

    monkeypatch.setattr("alure.engine.model.layers.jagged_attention", fail)
    with pytest.raises(InputError, match="in the middle"):
        RefreshJob(world / "model", world / "events", tmp_path / "b", config=SMALL).run()
    assert recorder.open == []


# ---- FLOPs


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(0, 14))
def test_pairs_within_a_window(lengths: list[int], window: int) -> None:
    expected = sum(max(0, min(i, window)) for length in lengths for i in range(length))
    assert within(np.array(lengths, np.int64), window) == expected
    assert within(np.array(lengths, np.int64), UNLIMITED) == sum(n * (n - 1) // 2 for n in lengths)


@st.composite
def ruled(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]]]:
    q, k, rules = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        keys = draw(st.integers(0, 7))
        targets = draw(st.integers(0, keys))
        contexts = draw(st.integers(0, keys - targets))
        left, right = (draw(st.sampled_from([0, 1, 3, UNLIMITED])) for _ in range(2))
        k.append(keys)
        q.append(draw(st.integers(0, 8)))
        rules.append([left, right, contexts, targets])
    return q, k, rules


@given(ruled())
def test_visible_pairs_are_those_of_the_rules(case: tuple[list[int], list[int], list[list[int]]]) -> None:
    """Against the rules as `kernels/attention/arguments.py` states them, pair by pair."""
    q, k, rules = case
    expected = 0
    for queries, keys, (left, right, contexts, targets) in zip(q, k, rules):
        history = keys - targets
        for row in range(queries):
            i = row + keys - queries
            p = min(i, history)
            expected += sum(
                j < contexts
                or (j < history and 0 <= i < contexts)
                or (j < history and p - left <= j <= p + right)
                or (j == i >= history)
                for j in range(keys)
            )
    offsets = [torch.tensor([0, *np.cumsum(lengths)]) for lengths in (q, k)]
    assert visible_pairs(*offsets, torch.tensor(rules)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": True, "window": 3},
        {"window": 5, "taps": [(1, "click"), (2, "view"), (1, "view")], "seeds": 3},
        {"compression": "interaction", "num_embeddings": 3},
        {"compression": "interaction", "width": 272, "heads": 2},  # wider than a head: keys and values are projected
        {"sources": {"click": {"heads": 4, "window": 2}}, "bias_periods": [], "encoders": ["gap"]},
        {"exchange": True, "layers": 3, "sources": {"click": {"layers": 2}}},
    ],
)
def test_flops_from_lengths_are_those_of_the_operators(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    events = Events.open(world / "events")
    model = UserModel.load(save_model(tmp_path / "model", events, **changes))
    batch = events.batch(np.array([3, 5, 0, 17, 41, 22, 8]), START + 6 * DAY, max_events=50)
    if "bias_periods" in changes:  # as `alure align` leaves it
        model.align(torch.eye(16).expand(2, 16, 16))
    with torch.inference_mode(), LeastWork() as least:
        model(batch, model.catalog(events))
    lengths = {name: s.lengths.numpy() for name, s in batch.sequences.items()}
    assert sum(work.flops for work in least.found.values()) == ForwardFlops(model)(lengths) > 0


def test_halves_of_a_batch_count_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, model = Events.open(world / "events"), UserModel.load(world / "model")
    embedder = Embedder(model, events, Snapshot("g", START + 20 * DAY, "m", None, SMALL), torch.device("cpu"))
    users = np.arange(30)
    whole = embedder.embed(users, events.num_events(users=users), Work().add)[1]
    pool = model.pool

    def small_memory(batch: Any, catalog: Any) -> Any:
        if len(batch) > 4:
            raise MemoryError
        return pool(batch, catalog)

    monkeypatch.setattr(embedder.model, "pool", small_memory)
    halved = embedder.embed(users, events.num_events(users=users), Work().add)[1]
    assert halved == whole
    assert whole.flops > 0


# ---- the roofline


def test_least_work_of_operators() -> None:
    a, b, table = torch.randn(8, 4), torch.randn(4, 16), torch.randn(1000, 4)
    rows = torch.tensor([5, 7, 5])
    with torch.inference_mode(), LeastWork() as least:
        torch.nn.functional.linear(a, b.t())
        a.expand(50, 8, 4).sum(0)
        table[rows]
        a.t().view(4, 8)
    assert least.found["aten::mm"].flops == 2 * 8 * 4 * 16
    assert least.found["aten::mm"].moved == 4 * (8 * 4 + 4 * 16 + 8 * 16)
    assert least.found["aten::sum"].moved == 4 * (8 * 4) * 2  # read once, though expanded
    assert least.found["aten::index"].moved == 3 * 8 + 2 * 3 * 16  # indices; three rows read and written
    assert least.found.keys() == {"aten::mm", "aten::sum", "aten::index"}  # views move nothing
    assert least.found["aten::mm"].seconds(1e3, 1e12) == pytest.approx(1.024)
    assert least.found["aten::mm"].seconds(1e12, 1e3) == pytest.approx(0.896)


def test_a_profile_has_ranges_in_the_trace_and_a_roofline(world: Path, tmp_path: Path) -> None:
    found = profile_refresh(world / "model", world / "events", tmp_path / "deep" / "trace.json")
    events = json.loads((tmp_path / "deep" / "trace.json").read_text())["traceEvents"]
    spans = {e["name"]: e for e in events if e.get("ph") == "X" and e["name"].startswith("alure.refresh")}
    assert {"alure.refresh/read", "alure.refresh/embed", "alure.refresh/attention"} < spans.keys()
    outer, inner = spans["alure.refresh/embed"], spans["alure.refresh/attention"]
    assert outer["tid"] == inner["tid"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    attention = [e for e in events if e.get("ph") == "X" and e["name"] == "alure::jagged_attention"]
    assert any(inner["ts"] <= e["ts"] and e["ts"] + e["dur"] <= inner["ts"] + inner["dur"] for e in attention)
    assert {"ph", "name"} <= set.union(*map(set, events))
    assert {row["name"] for row in found["ranges"]} == spans.keys()
    shares = {row["name"]: row["share"] for row in found["ranges"]}
    assert 0 < shares["alure.refresh/attention"] < shares["alure.refresh/embed"] < shares["alure.refresh"] <= 1.1
    operators = {row["name"]: row for row in found["operators"]}
    assert sum(row["share"] for row in operators.values()) <= 1 + 1e-9
    assert operators["aten::mm"]["gflop"] > 0
    assert operators["alure::rms_norm"]["limit"] == "copy rate"
    assert all(row["share_of_limit"] > 0 for row in operators.values() if row["gbyte"])
    limits = found["measured_matrix_tflops"] * 1e12, found["measured_copy_gbytes_per_second"] * 1e9
    assert min(limits) > 0
    assert found["share_of_matrix_rate"] == pytest.approx(found["gflop"] * 1e9 / found["seconds"] / limits[0])


def test_the_profilers_ranges_are_closed_on_an_exception() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        with pytest.raises(KeyError), ranges.stage("refresh", record_function), ranges.op("embed"):
            raise KeyError
        with ranges.stage("refresh", record_function):
            torch.ones(3).sum()
    rows = {row.key: row.count for row in trace.key_averages()}
    assert rows["alure.refresh"] == 2
    assert rows["alure.refresh/embed"] == 1


def test_the_matrix_rate_keeps_to_its_time() -> None:
    """A machine of 1 GFLOP/s with a slow first lap: sizes are tried while the time lasts, the fastest lap counts."""
    spent: list[float] = []

    def lap(run: Any) -> float:
        size = run.__defaults__[0].shape[0]
        spent.append(2 * size**3 / 1e9 * (3.0 if not spent else 1.0))
        return spent[-1]

    for seconds in (0.0, 0.2, 1.0, 30.0):
        spent.clear()
        assert matrix_rate(torch.device("cpu"), lap=lap, seconds=seconds) == pytest.approx(1e9)
        assert sum(spent) <= max(seconds, 4 * 2 * 256**3 / 1e9)
