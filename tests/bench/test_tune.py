"""alure tune: candidates that break are left out, the fastest is kept, and the kernels read what was written."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from alure.bench import tune
from alure.bench.tune import Job, Trial
from alure.engine.doctor import attention_tiles
from alure.kernels.attention.kernel_configs import HOPPER_CONFIGS, configs
from alure.kernels.attention.tuned import Config, Configs, read_tuned, tuned, tuned_path, write_tuned

CPU = torch.device("cpu")
UNTUNED = Configs(*HOPPER_CONFIGS[16])
FOUND = {
    (torch.bfloat16, 64): Configs(Config(64, 64, 4, 3), Config(64, 32, 4, 1), Config(16, 64, 4, 1, 128)),
    (torch.float32, 16): UNTUNED,
}
FAST, SLOW, WRONG = Config(32, 16, 4, 1), Config(16, 16, 4, 1), Config(64, 16, 4, 1)


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    tuned.cache_clear()
    yield
    tuned.cache_clear()


def job(config: Config, kernel: str = "forward") -> Job:
    return Job("float32", 16, kernel, UNTUNED._replace(**{kernel: config}), tokens=24)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "attention.json"
    assert read_tuned(path, "A GPU") == {}
    write_tuned(path, "A GPU", FOUND)
    assert read_tuned(path, "A GPU") == FOUND
    assert [file.name for file in path.parent.iterdir()] == ["attention.json"]
    assert read_tuned(path, "Another GPU") == {}
    content = json.loads(path.read_text()) | {"triton": "1.0"}
    path.write_text(json.dumps(content))
    assert read_tuned(path, "A GPU") == {}  # its kernels differ


@pytest.mark.parametrize(
    "broken",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps({**content, "configs": 3}),
        lambda content: json.dumps({**content, "configs": [{"dtype": "bfloat16"}]}),
        *(
            lambda content, name=name, value=value: json.dumps(
                {**content, "configs": [{**content["configs"][0], name: value}]}
            )
            for name, value in (
                ("dtype", "int8"),
                ("head_dim", 48),
                ("forward", [48, 64, 4, 2, None]),
                ("forward", [64, 1 << 20, 4, 2, None]),
                ("dq", [64, 64, 3, 2, None]),
                ("dq", [64, 64, 4, 0, None]),
                ("dkdv", [64, 64, 4, 2, 7]),
                ("dkdv", [64, 64, 4, 2]),
                ("dkdv", "fast"),
            )
        ),
    ],
)
def test_a_file_that_is_not_one_is_an_error_that_names_it(broken: Callable[[Any], str], tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    write_tuned(path, "A GPU", FOUND)
    path.write_text(broken(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"attention.json: expected what `alure tune` writes, got .*; delete it"):
        read_tuned(path, "A GPU")


def test_a_gpu_reads_the_file_of_its_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}/SXM")
    write_tuned(tuned_path("GPU 1/SXM"), "GPU 1/SXM", FOUND)
    assert tuned(torch.device("cuda", 1)) == FOUND
    assert tuned(torch.device("cuda", 0)) == {}


def test_tuning_again_replaces_a_broken_file(tmp_path: Path) -> None:
    path, lines = tmp_path / "attention.json", list[str]()
    write_tuned(path, "A GPU", FOUND)
    tune.delete_broken(path, "A GPU", lines.append)
    assert path.exists()
    assert not lines
    path.write_text("{")
    tune.delete_broken(path, "A GPU", lines.append)
    assert not path.exists()
    assert len(lines) == 1
    assert str(path) in lines[0]


def test_doctor_says_what_is_wrong_with_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    device = torch.device("cuda", 0)
    assert attention_tiles(device) == "untuned"
    for content, said in (("{", "delete it or run that again"), (None, "tuned")):
        tuned.cache_clear()
        write_tuned(tuned_path("A GPU"), "A GPU", FOUND)
        if content is not None:
            tuned_path("A GPU").write_text(content)
        assert said in attention_tiles(device)


def test_the_kernels_take_what_was_found() -> None:
    assert configs(torch.float32, 12, CPU) == UNTUNED
    tuned(CPU)[torch.float32, 16] = FOUND[torch.bfloat16, 64]
    assert configs(torch.float32, 12, CPU) == FOUND[torch.bfloat16, 64]
    assert configs(torch.float32, 32, CPU) == Configs(*HOPPER_CONFIGS[32])


def test_the_fastest_that_is_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {UNTUNED.forward: 1.0, FAST: 0.5, SLOW: 0.99, WRONG: 0.1}
    trial = Trial(torch.float32, 16, CPU, tokens=24)
    monkeypatch.setattr(tune, "seconds_of", lambda call, clock: seconds.get(tuned(CPU)[trial.key].forward, 2.0))
    results = Trial.results

    def corrupted(self: Trial, chosen: Configs, kernel: str) -> Callable[[], Sequence[Tensor]]:
        call = results(self, chosen, kernel)
        return (lambda: [x * 1.1 for x in call()]) if chosen.forward == WRONG else call

    monkeypatch.setattr(Trial, "results", corrupted)
    lines: list[str] = []
    jobs = [job(SLOW), job(WRONG), job(FAST), job(Config(16, 32, 4, 1), "dq")]
    found = list(tune.choose(trial, UNTUNED, jobs, lines.append))
    assert [row["kernel"] for row in found] == ["forward", "dq", "dkdv"]
    assert found[0]["config"] == list(FAST)
    assert (found[0]["untuned_seconds"], found[0]["seconds"]) == (1.0, 0.5)
    assert tuned(CPU)[trial.key] == UNTUNED._replace(forward=FAST)  # no candidate for dq was faster
    assert any("64 × 16" in line and "gives other results" in line for line in lines)


def test_a_candidate_that_breaks_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    good, bad = job(FAST), job(Config(24, 16, 4, 1))
    assert tune.that_run([good, bad], 120, lines.append) == [good]
    assert len(lines) == 1
    assert lines[0].startswith("forward of float32 16, 24 × 16, 4 warps, 1 stages does not run: ")


def test_time_that_is_over_leaves_the_rest_out() -> None:
    lines: list[str] = []
    assert tune.that_run([job(FAST)], 0.01, lines.append) == []
    assert lines == ["1 of 1 did not compile in 0 s; give more --minutes"]


def test_every_candidate_could_be_written(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    for kernel, candidates in tune.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            written = {(torch.bfloat16, 64): UNTUNED._replace(**{kernel: config})}
            write_tuned(path, "A GPU", written)
            assert read_tuned(path, "A GPU") == written


def test_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_command_from_its_words_to_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the interpreter, with a GPU in name alone; the seconds are made up."""
    trials = tune.Trial
    monkeypatch.setattr("sys.argv", ["tune", "--head-dim", "16", "--dtype", "float32", "--minutes", "1", "--json"])
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(tune, "current_device", lambda: CPU)
    monkeypatch.setattr(tune, "CANDIDATES", {"forward": [FAST, SLOW], "dq": [], "dkdv": []})
    monkeypatch.setattr(tune, "that_run", lambda jobs, seconds, say: list(jobs))
    monkeypatch.setattr(tune, "Trial", lambda dtype, head_dim, device: trials(dtype, head_dim, device, tokens=24))
    monkeypatch.setattr(
        tune, "seconds_of", lambda call, clock: {FAST: 0.5}.get(tuned(CPU)[torch.float32, 16].forward, 1.0)
    )
    assert tune.main() == 0
    assert read_tuned(tuned_path("A GPU"), "A GPU") == {(torch.float32, 16): UNTUNED._replace(forward=FAST)}
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["path"] == str(tuned_path("A GPU"))
    assert [row["kernel"] for row in done["results"]] == ["forward", "dq", "dkdv"]
