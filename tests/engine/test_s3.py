"""A store in an S3-compatible bucket: what a local one holds, to the bit, whoever is killed or races meanwhile."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest
from support.command_line import CommandLine
from support.crash_lab import CrashLab, Fault, crash_lab
from support.model import DAY
from support.refresh import jagged_log, rows_of, save_model
from support.s3_server import BUCKET, KEYS, environment, s3_server
from support.store import generation, graph, unit

from alure.engine import OnlineRetriever
from alure.engine.config import EvaluationConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.evaluation import evaluate
from alure.engine.events import Events
from alure.engine.model import UserModel
from alure.engine.refresh.leases import S3Leases
from alure.engine.retrieval import CandidateRetriever
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.location import filesystem, locate, make
from alure.engine.store.s3 import Request, S3Location, S3Settings, send, sign
from alure.engine.store.upkeep import rollback, vacuum, verify


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server with a bucket, whose client the environment of these tests is."""
    with s3_server(tmp_path_factory.mktemp("s3")) as variables, environment(variables):
        assert send(S3Settings.from_environment(), Request("PUT", f"/{BUCKET}")).status == 200
        yield


class World:
    """A log, a model, and the command that fills a store from them; `local` is one on a disk."""

    def __init__(self, folder: Path, lab: CrashLab) -> None:
        self.folder, self.lab, self.local = folder, lab, folder / "store"
        save_model(folder / "model", jagged_log(folder / "events", num_users=24), layers=1)
        (folder / "config.yaml").write_text("refresh: {unit_users: 12, token_budget: 60, precision: float32}\n")
        undisturbed = lab.run(folder, self.refresh(self.local))
        assert undisturbed.code == 0, undisturbed.error
        self.expected = rows_of(EmbeddingStore(self.local))
        self.generation = EmbeddingStore(self.local).latest("embeddings").generation

    def refresh(self, store: str | Path) -> list[Any]:
        options = ["--config", self.folder / "config.yaml", "--json"]
        return ["refresh", self.folder / "model", self.folder / "events", "--store", store, *options]

    def check(self, url: str) -> None:
        """None lost, none twice, and one publication."""
        store = EmbeddingStore(url)
        assert rows_of(store) == self.expected
        published = store.generations("embeddings")
        assert (store.count_written(self.generation), len(published)) == (len(self.expected), 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with crash_lab(folder) as lab:
        yield World(folder, lab)


@pytest.fixture(scope="module")
def killed(world: World) -> str:
    """A store whose refresh was killed while it had written one unit of two and worked on the other."""
    url = f"s3://{BUCKET}/stores/killed"
    lease = S3Location.parse(f"{url}/leases/{world.generation}/12-24")
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(world.lab.run, world.folder, world.refresh(url))
        while (found := lease.read()) is None:
            assert not run.done()
            time.sleep(0.01)
        os.kill(int(found[0].rpartition(b":")[2]), signal.SIGKILL)
        assert run.result().code == -signal.SIGKILL
    return url


@pytest.fixture(scope="module")
def resumed(world: World, killed: str) -> str:
    """The same store, once the same command has been given again."""
    store = EmbeddingStore(killed)
    assert store.generations() == []
    assert store.written_units(world.generation, ["0-12", "12-24"]) == {"0-12"}
    run = world.lab.run(world.folder, world.refresh(killed))
    assert run.code == 0, run.error
    assert json.loads(run.error.splitlines()[-1])["units_reused"] == 1
    return killed


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/stores/{request.node.name}"


@pytest.fixture
def store(url: str) -> EmbeddingStore:
    return EmbeddingStore(url, create=True)


@pytest.fixture
def alure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capfd, monkeypatch)


def files(store: str) -> list[str]:
    found = filesystem(locate(store)).get_file_info(fs.FileSelector("", recursive=True, allow_not_found=True))
    return [file.path for file in found if file.type == fs.FileType.File]


def test_a_killed_refresh_goes_on(world: World, resumed: str) -> None:
    world.check(resumed)
    assert not [file for file in files(resumed) if file.startswith(("leases/", "exclusive-"))]


def test_two_processes_share_a_refresh(world: World, url: str) -> None:
    both = world.lab.run_together(world.folder, [(world.refresh(url), Fault())] * 2)
    assert [run.code for run in both] == [0, 0], "\n".join(run.error for run in both)
    world.check(url)


def test_every_stage_does_what_it_does_on_a_disk(
    world: World, resumed: str, alure: CommandLine, tmp_path: Path
) -> None:
    events, truth = world.folder / "events", tmp_path / "truth.parquet"
    pq.write_table(pa.table({"user_id": np.arange(24), "item_id": np.arange(24)}), truth)
    stories, stores = [], [EmbeddingStore(resumed), EmbeddingStore(world.local)]
    for store in stores:
        for words in (["graph", store.path, "-k", 4], ["retrieve", store.path, events]):
            done = alure(*words)
            assert done.code == 0, done.err
        stories.append(alure("inspect", store.path, "--user", 4, "--json").json["user"])
    assert stories[0] == stories[1]
    remote, local = stores
    expected = local.read_matrix().values
    assert remote.read_matrix().values.tobytes() == expected.tobytes()
    for table, name in {"graph": "alure", "candidates": "alure", "popularity": ""}.items():
        pages = [store.whole[table].read(store.latest(table, name)) for store in stores]
        assert len(pages[0]) > 0
        assert pages[0].equals(pages[1]), table
    reports = [evaluate(store, truth, EvaluationConfig(k=[5])) for store in stores]
    assert reports[0] == reports[1]
    assert "give --out, a folder for the report" in alure("evaluate", resumed, "--truth", truth).err
    log = Events.open(events)
    as_of = log.manifest.last_timestamp + DAY
    answers = [OnlineRetriever(CandidateRetriever(store, log)).retrieve(4, as_of) for store in stores]
    assert answers[0].equals(answers[1])
    assert alure("export", resumed, "--to", "npy", "--out", tmp_path / "npy").code == 0
    assert np.load(tmp_path / "npy" / "embeddings.npy").tobytes() == expected.tobytes()


def test_of_publishers_that_race_one_wins_and_none_is_torn(store: EmbeddingStore, url: str) -> None:
    start = threading.Barrier(2)

    def publish(worker: int) -> str:
        own = EmbeddingStore(url)
        start.wait()
        wrote = own.write_unit("g", "0-3", unit([1, 2, 3]))
        own.publish(generation(3))
        rows = [graph([1, 2, 3], similarity=worker)] * 2
        try:
            return f"{wrote} {own.write_graph('g', 'alure', rows, {'worker': worker}).write_id}"
        except AlureError as error:
            return f"{wrote} {error}"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(publish, range(2)))
    assert sorted(outcome.split()[0] for outcome in outcomes) == ["False", "True"]
    visible = store.latest("graph", "alure")
    assert visible.write_id in [outcome.split()[1] for outcome in outcomes]
    table = store.read_graph()
    assert set(table["similarities"].combine_chunks().flatten().to_pylist()) == {visible.properties["worker"]}
    assert (len(table), store.count_written("g"), len(store.generations("embeddings"))) == (6, 3, 1)
    log = store.log.log.dataset().to_table()["sequence"].to_pylist()
    assert sorted(log) == list(range(len(log)))


def test_a_publisher_that_is_overtaken_looks_again(store: EmbeddingStore, url: str) -> None:
    """The other one commits between the first one's look at the log and its append."""
    other, calls = EmbeddingStore(url).log, list[Generation | None]()

    def may_replace(present: Generation | None) -> bool:
        if not calls:
            other.publish(Generation("g", "graph", "alure", 3, write_id="theirs"), lambda present: True)
        calls.append(present)
        return present is None

    mine = Generation("g", "graph", "alure", 3, model="another", write_id="mine")
    with pytest.raises(AlureError, match="published meanwhile by another process"):
        store.log.publish(mine, may_replace)
    assert [found and found.write_id for found in calls] == [None, "theirs"]


def test_upkeep(store: EmbeddingStore, url: str) -> None:
    countries = ["AR", "São#%41", "B'R"]
    for number in (1, 2):
        store.write_unit(f"g{number}", "0-3", unit([1, 2, 3], country=countries, as_of=number))
        store.publish(generation(3, f"g{number}"))
    assert store.countries() == sorted(countries)
    assert rollback(store).newest == "g1"
    assert rollback(store, "g2").restored
    lease = S3Location.parse(f"{url}/leases/g1/0-3")
    lease.write(b"a machine that died:1")
    before = files(url)
    done = vacuum(store, keep=1, grace_hours=0)
    gone = set(before) - set(files(url))
    assert done.removed == ["embeddings/g1"]
    assert {file.split("/")[0] for file in gone} == {"embeddings", "checksums", "leases"}
    assert (done.files, lease.read()) == (3 + 1, None)
    assert done.size_bytes > 0
    assert verify(store).files == 3
    where, flipped = filesystem(store.path), next(file for file in files(url) if "generation=g2/country=S" in file)
    with where.open_input_stream(flipped) as file:
        damaged = bytearray(file.read())
    damaged[len(damaged) // 2] ^= 4
    with where.open_output_stream(flipped) as file:
        file.write(bytes(damaged))
    with pytest.raises(AlureError, match=r"1 of 3 files are damaged(.|\n)*" + re.escape(Path(flipped).name)):
        verify(store)


def test_leases(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def held_by(host: str, process: int) -> S3Leases:
        monkeypatch.setattr("alure.engine.refresh.leases.socket.gethostname", lambda: host)
        monkeypatch.setattr("alure.engine.refresh.leases.os.getpid", lambda: process)
        return S3Leases(S3Location.parse(url))

    process = os.getpid()
    elsewhere, here, gone = held_by("far", 7), held_by("near", os.getppid()), held_by("near", 4194305)
    for name, holder in {"a": elsewhere, "b": here, "c": gone}.items():
        assert holder.claim(name)
    mine = held_by("near", process)
    assert [name for name in "abcd" if mine.claim(name)] == ["c", "d"]
    mine.release("d")
    assert here.claim("d")
    assert not elsewhere.claim("d")
    monkeypatch.setattr("alure.engine.refresh.leases.EXPIRES_S", 3.0)
    time.sleep(4.1)  # ages are in whole seconds
    elsewhere.keep()
    assert not mine.claim("a")
    elsewhere.release("d")
    time.sleep(4.1)
    assert mine.claim("a")
    assert not mine.claim("b")  # of a process that lives here


@pytest.mark.parametrize(
    ("changes", "store", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": ""}, f"{BUCKET}/x", "AWS_SECRET_ACCESS_KEY .*no credentials.*export-credentials"),
        ({}, "no-such-bucket/x", "answered 404 to GET: NoSuchBucket: The specified bucket does not exist"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"{BUCKET}/x", "127.0.0.1:9 cannot be reached .*refused"),
        ({"AWS_ALLOW_HTTP": ""}, f"{BUCKET}/x", "is not encrypted; set AWS_ALLOW_HTTP=true"),
        ({"AWS_ENDPOINT_URL": "minio:9000"}, f"{BUCKET}/x", r"expected http\(s\)://HOST\[:PORT\], got 'minio:9000'"),
        ({}, BUCKET, "expected s3://BUCKET/PREFIX"),
        ({}, f"{BUCKET}/a/../b", "expected s3://BUCKET/PREFIX"),
        ({}, f"{BUCKET}/x", "is not an embedding store"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    alure: CommandLine, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], store: str, said: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    done = alure("verify", f"s3://{store}", "--json")
    assert time.monotonic() - started < 10
    assert done.code == (1 if "reached" in said else 2)
    assert re.search(said, done.json["error"])
    assert "\n" not in done.json["error"]
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in done.out + done.err


def test_only_a_store_may_be_there(alure: CommandLine, world: World, tmp_path: Path) -> None:
    monkey = f"s3://{BUCKET}/x"
    commands = {
        "model": ["refresh", monkey, world.folder / "events", "--store", tmp_path / "store"],
        "events": ["retrieve", tmp_path / "store", monkey],
        "out": ["train", world.folder / "events", "--out", monkey],
        "inputs": ["ingest", monkey, "--out", tmp_path / "events"],
    }
    for name, words in commands.items():
        done = alure(*words, "--json")
        assert done.code == 2
        assert done.json["error"] == f"{name}: expected a local path, got {monkey}; only a store may be on S3"
    (tmp_path / "run.yaml").write_text(f"output: {monkey}\nevents: {{inputs: [log.parquet]}}\n")
    assert "output: expected a local path" in alure("run", tmp_path / "run.yaml").err
    for open_it in (UserModel.load, Events.open, lambda text: EmbeddingStore(Path(text))):
        with pytest.raises(InputError, match=f"got {monkey}; only a store may be on S3"):
            open_it(monkey)


@contextmanager
def answering(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[list[str]]:
    """A server that gives `answer` to each method; what it was asked."""
    asked = list[str]()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.command)
            status, body = answer(self.command)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_DELETE = do_HEAD = reply

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setattr("alure.engine.store.s3.time.sleep", lambda seconds: None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield asked
        server.shutdown()


def test_a_server_that_ignores_conditions_is_refused(url: str) -> None:
    with answering(lambda method: (200, b"")) as asked:
        with pytest.raises(InputError, match="ignores If-None-Match, so commits of two writers"):
            make(locate(url))
        assert asked == ["PUT", "PUT", "DELETE"]


def test_what_passes_is_asked_again() -> None:
    place, answers = S3Location(BUCKET, "x"), [503, 429, 200, 503, 500, 502, 501, 412]
    with answering(lambda method: (answers.pop(0), b"<Error><Code>A</Code><Message>b</Message></Error>")) as asked:
        assert place.write_once(b"x")
        with pytest.raises(AlureError, match="answered 502 to DELETE"):
            place.delete()
        with pytest.raises(AlureError, match="answered 501 to PUT"):
            place.write(b"x")
        assert not place.write_once(b"x")
    assert asked == ["PUT"] * 3 + ["DELETE"] * 3 + ["PUT"] * 2


def test_requests_are_signed_as_the_guide_of_aws_says() -> None:
    """Its examples of a bucket's listing and of a stored object."""
    key, secret = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    settings = S3Settings(key, secret, None, "us-east-1", "https://examplebucket.s3.amazonaws.com")
    moment = datetime(2013, 5, 24, tzinfo=UTC)
    listed = sign(settings, Request("GET", "/", {"prefix": "J", "max-keys": "2"}), moment)
    assert listed["authorization"].endswith("=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")
    headers = {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"}
    stored = sign(settings, Request("PUT", "/test$file.text", {}, headers, b"Welcome to Amazon S3."), moment)
    assert stored["authorization"].endswith("=98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd")


def test_requests_are_signed_as_botocore_signs_them() -> None:
    auth, awsrequest = (pytest.importorskip(f"botocore.{name}") for name in ("auth", "awsrequest"))
    credentials = pytest.importorskip("botocore.credentials").Credentials("key", "secret", "a/session+token=")
    settings = S3Settings("key", "secret", "a/session+token=", "eu-west-1", "http://127.0.0.1:9000")
    for request in (
        Request("GET", "/bucket", {"list-type": "2", "prefix": "a b/~c=d/"}),
        Request("PUT", "/bucket/a+b@c/!d=e_f.g~", headers={"If-None-Match": "*"}, body=b"\x00\xff"),
        Request("DELETE", "/bucket/é"),
    ):
        now = datetime.now(UTC)
        mine = sign(settings, request, now)
        query = {"params": dict(request.query)} if request.query else {}
        theirs = awsrequest.AWSRequest(
            request.method, f"{settings.endpoint}{request.path}".replace("é", "%C3%A9").replace("+", "%2B")
            .replace("@", "%40").replace("!", "%21").replace("d=e", "d%3De"), data=request.body, **query
        )  # fmt: skip
        for name in request.headers:
            theirs.headers[name] = request.headers[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auth, "get_current_datetime", lambda now=now: now, raising=False)
            auth.S3SigV4Auth(credentials, "s3", "eu-west-1").add_auth(theirs)
        assert theirs.headers["Authorization"].replace(", ", ",") == mine["authorization"].replace(", ", ",")
