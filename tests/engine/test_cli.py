"""The command line, as typed: every command of a chain on a small world, the exit codes, the last line of --json."""

import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.command_line import CommandLine
from support.graph import add_generation

from alure.engine.config import Config, GraphConfig, ModelConfig, read_yaml
from alure.engine.doctor import backends
from alure.engine.options import override
from alure.engine.signals import stop_flag
from alure.engine.store import EmbeddingStore
from alure.engine.world import build_world

COMMANDS = (
    "demo", "run", "ingest", "train", "align", "refresh", "graph", "retrieve", "evaluate", "rank", "inspect", "verify",
    "rollback", "vacuum", "export", "bench", "tune", "profile", "doctor",
)  # fmt: skip


@pytest.fixture
def alure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capfd, monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    build_world(path, 150, 3)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(alure: CommandLine, command: str) -> None:
    outcome = alure(command, "--help")
    assert outcome.code == 0
    assert f"alure {command}" in outcome.out.replace("\n", " ")
    assert "Example" in outcome.out
    assert "--json" in outcome.out


def test_the_chain_command_by_command(alure: CommandLine, world: Path, tmp_path: Path) -> None:
    facts = json.loads((world / "world.json").read_text())
    events, model, store = tmp_path / "events", tmp_path / "model", tmp_path / "store"
    ads = [word for source in facts["ad_sources"] for word in ("--ad-source", source)]

    ingested = alure(
        "ingest", world / "events.parquet", "--items", world / "items.parquet", *ads, "--out", events, "--json"
    )
    assert ingested.code == 0, ingested.err
    assert ingested.json["num_events"] == pq.read_metadata(world / "events.parquet").num_rows - sum(
        ingested.json["quarantine"].values()
    )

    trained = alure("train", events, "--out", model, "--steps", 5, "--as-of", facts["as_of"], "--json")
    assert trained.code == 0, trained.err
    based = alure("train", events, "--out", tmp_path / "base", "--steps", 0, "--preset", "base", "--json")
    assert based.json["parameters"] > 10 * trained.json["parameters"]
    refreshed = alure("refresh", model, events, "--store", store, "--as-of", facts["as_of"], "--json")
    assert refreshed.code == 0, refreshed.err
    figures = tmp_path / "refresh.prom"
    again = alure("refresh", model, events, "--store", store, "--as-of", facts["as_of"], "--metrics", figures, "--json")
    assert again.code == 0
    assert f"\nalure_refresh_users {float(again.json['users'])}\n" in figures.read_text()
    assert 'alure_refresh_freshness{of="now"} ' in figures.read_text()
    assert again.json["generation"] == refreshed.json["generation"]

    follows = world / "social.parquet"
    graphed = alure("graph", store, "--nlist", 8, "--nprobe", 4, "-k", 5, "--social", follows, "--ppr", "--json")
    assert graphed.code == 0, graphed.err
    for words in (["--graphs", "alure"], ["--graphs", "alure,social,ppr", "--exclude-seen"]):
        retrieved = alure("retrieve", store, events, "--cap", 50, *words, "--json")
        assert retrieved.code == 0, retrieved.err

    truth = world / "truth.parquet"
    judged = alure(
        "evaluate", store, "--truth", truth, "-k", 5, "-k", 20, "--events", events, "--out", tmp_path, "--json"
    )
    assert judged.code == 0, judged.err
    assert (tmp_path / "report.html").exists()

    for path in (events, model, store):
        assert alure("inspect", path, "--json").code == 0
    user = pq.read_table(events / "users.parquet")["user_id"][0].as_py()
    story = alure("inspect", store, "--user", user)
    assert story.code == 0, story.err
    assert set(story.json["graph"]) == {"alure", "social", "ppr"}
    assert alure("inspect", events, "--user", user).code == 0
    for unknown in (10**12, 10**30):  # the second is no int64
        assert alure("inspect", store, "--user", unknown).code == 2
        assert alure("inspect", events, "--user", unknown).code == 2
    assert alure("inspect", model, "--user", user).code == 2

    for words in (["parquet"], ["parquet", "--flat"], ["npy"], ["faiss"]):
        out = tmp_path / "-".join(words)
        exported = alure("export", store, "--to", *words, "--out", out, "--json")
        assert exported.code == 0, exported.err
    edges = pq.read_table(tmp_path / "parquet---flat" / "graph-alure.parquet")
    lists = pq.read_table(tmp_path / "parquet" / "graph-alure.parquet")
    assert edges.num_rows == sum(len(ids) for ids in lists["neighbor_ids"].to_pylist())
    assert edges["neighbor_ids"].to_pylist()[: len(lists["neighbor_ids"][0])] == lists["neighbor_ids"][0].as_py()
    vectors = np.load(tmp_path / "npy" / "embeddings.npy", allow_pickle=False)
    assert np.isfinite(vectors).all()
    assert alure("export", store, "--to", "hdf5", "--out", tmp_path / "x").code == 2
    assert alure("export", store, "--to", "npy", "--flat", "--out", tmp_path / "x").code == 2

    profiled = alure("profile", "refresh", model, events, "--users", 32, "--out", tmp_path / "trace.json", "--json")
    assert profiled.code == 0, profiled.err
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_demo_twice_reuses_every_stage(alure: CommandLine, tmp_path: Path) -> None:
    words = ["demo", "--out", tmp_path, "--users", 120, "--steps", 5, "--seed", 1, "--json"]
    first = alure(*words)
    assert first.code == 0, first.err
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"].keys() >= {"ingest", "train", "evaluate"}
    again = alure(*words)
    assert again.code == 0
    assert again.err.count("reused") == 6


def test_doctor_on_a_gpu_knows_what_stays_on_the_host() -> None:
    found = backends(torch.device("cuda"))
    assert {found[name]["auto"] for name in ("join_candidates", "personalized_pagerank")} == {"native"}
    assert found["encode_events"]["auto"] == "triton"


def test_doctor_names_a_backend_for_every_operator(alure: CommandLine) -> None:
    findings = alure("doctor", "--json").json
    assert {chosen["auto"] for chosen in findings["backends"].values()} <= {"triton", "native", "reference"}
    assert "jagged_attention" in alure("doctor").out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["ingest", "nowhere.parquet", "--out", "events"], "nowhere.parquet"),
        (["ingest", "nowhere.parquet", "--out", "events", "--map", "user_id"], "--map"),
        (["train", "nowhere", "--out", "model"], "nowhere"),
        (["refresh", "nowhere", "nowhere", "--store", "store"], "nowhere"),
        (["graph", "nowhere"], "nowhere"),
        (["graph", "nowhere", "--ppr"], "--social"),
        (["graph", "nowhere", "--search", "magic"], "search"),
        (["graph", "nowhere", "--nlist", "some"], "nlist"),
        (["graph", "nowhere", "--nlist", "auto", "--nprobe", "50"], "with auto, nprobe is measured"),
        (["graph", "nowhere", "--recall-target", "0.9"], "only nprobe auto aims at it"),
        (["retrieve", "nowhere", "nowhere"], "nowhere"),
        (["retrieve", "nowhere", "nowhere", "--quota", "alure"], "--quota: expected GRAPH=NUMBER such as alure=1200"),
        (["evaluate", "nowhere", "--truth", "nowhere.parquet"], "nowhere"),
        (["inspect", "nowhere"], "nowhere"),
        (["run"], "configuration"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["refresh", "m", "e", "--store", "s", "--as-of", "yesterday"], "--as-of"),
        (["profile", "cooking", "m", "e"], "refresh"),
        (["cook"], "No such command"),
        (["train"], "Missing argument"),
        (["train", "events", "--out", "model", "--steps", "-1"], "--steps"),
        (["run", "folder"], "expected a YAML file, got the folder folder"),
        (["demo", "--out", "file"], "there is a file where a folder is expected"),
        (["bench", "cooking"], "invalid choice: 'cooking'"),
        (["tune", "--head-dim", "17"], "invalid choice: 17"),
    ],
)
def test_bad_input_is_explained_and_exits_with_2(
    alure: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    outcome = alure(*words, "--json")
    assert outcome.code == 2, outcome.err
    assert complaint in outcome.err
    assert outcome.json["exit_code"] == 2


def test_evaluate_says_why_there_is_no_recall(alure: CommandLine, tmp_path: Path) -> None:
    add_generation(EmbeddingStore(tmp_path / "store", create=True), "g", np.eye(6, dtype=np.float32))
    pq.write_table(pa.table({"user_id": [1], "item_id": [7]}), tmp_path / "truth.parquet")
    outcome = alure("evaluate", tmp_path / "store", "--truth", tmp_path / "truth.parquet", "--json")
    assert "has no candidates yet; run `alure retrieve`" in outcome.json["not_measured"]["recall"]
    assert "evaluate: no recall: generation" in outcome.err


def test_configuration_errors_name_the_key(alure: CommandLine, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("output: out\nmodel: {widht: 64}\ntraining: {steps: -1}\n")
    outcome = alure("run", config)
    assert outcome.code == 2
    assert "model.widht: unknown key" in outcome.err
    assert "training.steps" in outcome.err
    config.write_text("output: [")
    assert alure("run", config).code == 2
    config.write_text("training: {steps: 5}\nmodel: {width: 64}\ntraining: {batch_users: 8}\n")  # lost the steps
    assert "the key training is given twice" in alure("run", config).err
    defaults = "x: &x {a: 1}\ny: {k: &y {<<: *x, a: 2}}\nz: {<<: *y, a: 3}\n"
    config.write_text(defaults)  # what a key of << is overridden by is no second one
    assert read_yaml(config)["z"] == {"a": 3}
    config.write_text("output: out\n")
    assert "events.inputs" in alure("run", config).err


def test_run_reads_paths_beside_the_file_or_from_data(
    alure: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = pa.table(
        {
            "user_id": np.repeat(np.arange(50), 6),
            "timestamp": np.tile(np.arange(6) * 86_400, 50) + 1_700_000_000,
            "item_id": np.arange(300) % 13,
        }
    )
    (tmp_path / "data").mkdir()
    pq.write_table(log, tmp_path / "data" / "log.parquet")
    config = tmp_path / "run.yaml"
    config.write_text("output: out\nevents: {inputs: [log.parquet]}\ntraining: {steps: 3}\n")
    assert alure("run", config).code == 2
    outcome = alure("run", config, "--data", tmp_path / "data", "--json")
    assert outcome.code == 0, outcome.err
    assert f"inside: {tmp_path / 'out' / 'store'}" in alure("inspect", tmp_path / "out").err
    config.write_text("events: {temp_directory: spill}")
    assert Config.load(config, tmp_path / "data").events.temp_directory == tmp_path / "spill"
    assert (tmp_path / "out" / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    results: dict[str, Any] = {}
    for block in readme_blocks():
        exec(compile(block, "README.md", "exec"), results)
    assert results["out"].shape == (8, 4, 64)
    assert results["lse"].shape == (4, 8)
    assert results["store"].generations("embeddings")
    assert len(results["online"].recent) == 1


def test_run_looks_for_every_file_before_the_first_stage(alure: CommandLine, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1], "timestamp": [1], "item_id": [1]}), tmp_path / "log.parquet")
    config = tmp_path / "run.yaml"
    for key, section in (
        ("events.items", "events: {inputs: [log.parquet], items: no.parquet}"),
        ("events.social", "events: {inputs: [log.parquet], social: no.parquet}"),
        ("evaluation.truth", "events: {inputs: [log.parquet]}\nevaluation: {truth: no.parquet}"),
        ("retrieval.eligible", "events: {inputs: [log.parquet]}\nretrieval: {eligible: no.parquet}"),
        ("events.social", "events: {inputs: [log.parquet]}\ngraph: {ppr: true}"),
    ):
        config.write_text(f"output: out\n{section}\n")
        outcome = alure("run", config)
        assert outcome.code == 2, outcome.err
        assert key in outcome.err
        assert not (tmp_path / "out").exists()


def test_run_names_columns_and_graphs_that_it_does_not_know(alure: CommandLine, tmp_path: Path) -> None:
    log = {
        "user_id": np.repeat(np.arange(50), 6),
        "timestamp": np.tile(np.arange(6) * 86_400, 50) + 1_700_000_000,
        "ad": np.arange(300) % 13,
        "surface": ["feed"] * 300,
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    config, events = tmp_path / "run.yaml", "events: {inputs: [log.parquet]"
    config.write_text(f"output: out\n{events}}}\n")
    assert "(in a configuration, events.columns: {item_id: COLUMN})" in alure("run", config).err
    settings = f"{events}, columns: {{item_id: ad}}}}\ntraining: {{steps: 1}}\n"
    config.write_text(f"output: out\n{settings}retrieval: {{graphs: {{alur: 1}}}}\n")
    outcome = alure("run", config)
    assert outcome.code == 2, outcome.err
    assert "columns that are not read: surface;" in outcome.err
    assert re.search(r"retrieval.graphs: expected graphs that \S+ has, alure, got alur", outcome.err)
    config.write_text(f"output: out\n{settings}retrieval: {{graphs: {{social: 1}}}}\n")
    assert "has, alure, got social" in alure("run", config).err


def readme_blocks() -> list[str]:
    """The Python examples of the README, as a reader would paste them one after another."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    return blocks


def test_a_signal_while_training_exits_with_75(world: Path, tmp_path: Path) -> None:
    script = "import sys; from alure.engine.cli import main; sys.argv[0] = 'alure'; main()"
    command = [sys.executable, "-P", "-c", script]
    subprocess.run([*command, "ingest", world / "events.parquet", "--out", tmp_path / "events"], check=True)
    words = ["train", tmp_path / "events", "--out", tmp_path / "model", "--steps", "100000", "--json"]
    training = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert training.stderr is not None
    training.stderr.readline()  # the first progress line: it is at work
    training.send_signal(signal.SIGTERM)
    out, err = training.communicate(timeout=60)
    assert training.returncode == 75, err
    assert json.loads(out.splitlines()[-1])["exit_code"] == 75
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "model" / "training" / "state.json").read_text())["step"] > 0


def test_a_second_ctrl_c_exits_with_75_too(alure: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        with stop_flag("stage"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("alure.engine.pipeline.run_demo", interrupted)
    outcome = alure("demo", "--out", tmp_path / "demo", "--json")
    assert outcome.code == outcome.json["exit_code"] == 75
    assert "run the same command again" in outcome.err


def test_an_option_implies_what_the_file_does_not_say() -> None:
    """What another preset, or another kind of nlist, filled in is not taken for given."""
    assert override(ModelConfig(), preset="base") == ModelConfig(preset="base")
    assert override(Config(model={"preset": "large", "hash_rows": 4096}).model, preset="base") == ModelConfig(
        preset="base", hash_rows=4096
    )
    assert override(GraphConfig(nlist="auto"), nlist="400") == GraphConfig()
    assert override(GraphConfig(nprobe=20), nlist="64") == GraphConfig(nlist=64, nprobe=20)


@pytest.mark.parametrize(("named", "name"), [(["x/part"], "x/part"), ([], "an output")])
def test_a_full_disk(alure: CommandLine, monkeypatch: pytest.MonkeyPatch, named: list[str], name: str) -> None:
    def examine() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *named)

    monkeypatch.setattr("alure.engine.doctor.examine", examine)
    done = alure("doctor")
    assert done.code == 1
    assert f"{name}: cannot be written (No space left on device); make room, then run the same command" in done.err


def test_schema_is_json(alure: CommandLine) -> None:
    assert "properties" in json.loads(alure("run", "--schema").out)
    assert "properties" in alure("run", "--schema", "--json").json  # its last line


@pytest.mark.parametrize(("words", "code"), [("run --schema", 0), ("run none.yaml", 2)])
def test_a_signal_after_the_result_does_not_change_the_exit_code(words: str, code: int) -> None:
    """The interpreter takes tenths of a second to end, and died of a SIGTERM or a Ctrl-C then."""
    late = "import atexit, os, signal, sys; atexit.register(lambda: [os.kill(os.getpid(), s) for s in (2, 15)])"
    script = f"{late}; from alure.engine.cli import main; sys.argv = ['alure', *{words.split()}]; main()"
    assert subprocess.run([sys.executable, "-P", "-c", script], check=False, capture_output=True).returncode == code


def test_help_does_not_import_torch() -> None:
    script = "import sys; import alure.engine.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", script], check=False).returncode == 0
