"""Checkpoints: what is written is what is read, half of it is enough to refresh, and damage is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model import planted_log, tiny_model

from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import AlureModel, EventSchema, UserModel, model_digest
from alure.engine.model.checkpoint import CONFIG, TENSORS, CheckpointConfig, read_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("checkpoint") / "events", num_users=12)


def write(folder: Path, events: Events, seed: int = 0, **changes: object) -> AlureModel:
    torch.manual_seed(seed)
    model = AlureModel(tiny_model(**changes), EventSchema.of(events.manifest), ("ctr",))
    config = CheckpointConfig(model=model.config, events=model.schema, tasks=model.tasks, step=3, sha256="")
    save_checkpoint(folder, model, config, {"loss": 1.0})
    return model


@pytest.mark.parametrize("compression", ["dot_linear", "interaction"])
def test_the_pruned_half_embeds_as_the_whole_model(events: Events, tmp_path: Path, compression: str) -> None:
    model = write(tmp_path, events, compression=compression)
    pruned = UserModel.load(tmp_path)
    batch = events.batch(range(12), events.manifest.last_timestamp)
    model.requires_grad_(False)  # torch.matmul folds broadcast matrices otherwise where one requires a gradient
    whole = model.user(batch, model.user.catalog(events))
    assert torch.equal(whole, pruned(batch, pruned.catalog(events)))
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    names = load_file(tmp_path / TENSORS)
    assert {name.split(".")[0] for name in names} == {"user", "ads", "heads"}
    assert len(pruned.state_dict()) == sum(name.startswith("user.") for name in names)


def test_loading_leaves_the_random_state_alone(events: Events, tmp_path: Path) -> None:
    write(tmp_path, events)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    UserModel.load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_every_tensor_comes_back_as_it_was(events: Events, tmp_path: Path) -> None:
    model = write(tmp_path, events)
    config, tensors = read_checkpoint(tmp_path)
    assert config.step == 3
    assert config.model == model.config
    assert config.events == model.schema
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    _, ads = read_checkpoint(tmp_path, "ads")
    assert set(ads) == {name for name, _ in model.ads.named_parameters()}


def test_the_digest_tells_models_apart(events: Events, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("again", 0), ("b", 1)):
        write(tmp_path / folder, events, seed)
    write(tmp_path / "causal", events, 0, causal=True)
    digests = [model_digest(tmp_path / folder) for folder in ("a", "again", "b", "causal")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_saving_replaces_a_checkpoint_whole(events: Events, tmp_path: Path) -> None:
    write(tmp_path, events, 0)
    opened = UserModel.load(tmp_path)
    table = opened.table.clone()
    write(tmp_path, events, 1)
    assert torch.equal(opened.table, table)  # not a map of the replaced file
    assert not torch.equal(UserModel.load(tmp_path).table, table)
    assert not list(tmp_path.glob("*.tmp"))


def test_half_written_files_do_not_hurt(events: Events, tmp_path: Path) -> None:
    write(tmp_path, events)
    digest = model_digest(tmp_path)
    (tmp_path / f"{TENSORS}.tmp").write_bytes(b"half")
    UserModel.load(tmp_path)
    assert model_digest(tmp_path) == digest


def truncate(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / TENSORS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"")


def remove_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def remove_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def edit_config(folder: Path, **changes: object) -> None:
    data = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**data, **changes}))


def break_json(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-20])


def not_safetensors(folder: Path) -> None:
    import hashlib

    (folder / TENSORS).write_bytes(b"\x80\x04pickle?" * 9)
    edit_config(folder, sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())


def another_shape(folder: Path) -> None:
    model = json.loads((folder / CONFIG).read_text())["model"]
    edit_config(folder, model={**model, "hash_rows": 2_048})


def a_tensor_less(folder: Path) -> None:
    import hashlib

    tensors = load_file(folder / TENSORS)
    save_file({name: t.clone() for name, t in tensors.items() if name != "user.table"}, folder / TENSORS)
    edit_config(folder, sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or altered"),
        (flip_a_bit, "truncated or altered"),
        (empty, "truncated or altered"),
        (remove_tensors, "is missing"),
        (remove_config, "not a checkpoint"),
        (break_json, "is damaged"),
        (lambda folder: edit_config(folder, format_version=9), "format version 9, expected 2"),
        (lambda folder: edit_config(folder, surprise=1), "surprise"),
        (not_safetensors, "not a safetensors file"),
        (another_shape, r"table: expected torch.float32 \[2048, 8\], got torch.float32 \[1024, 8\]"),
        (a_tensor_less, "table: .*missing"),
    ],
)
def test_damage_is_named(events: Events, tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path, events)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        UserModel.load(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; make it with `alure train"):
        UserModel.load(tmp_path / "nowhere")


def test_a_model_refuses_another_log(events: Events, tmp_path: Path) -> None:
    write(tmp_path / "model", events)
    other = planted_log(tmp_path / "events", num_users=12)
    changed = other.manifest.model_copy(update={"sources": ["view"]})
    with pytest.raises(InputError, match="the model knows view, click; the log has view"):
        UserModel.load(tmp_path / "model").catalog(Events(other.path, changed))
