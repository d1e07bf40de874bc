"""A checkpoint folder: model.safetensors (`user.*`, `ads.*`, `heads.*`), config.json, metrics.json. No pickle.

config.json holds the SHA-256 of the tensors' file and is written after it, so a half-written, truncated or altered
checkpoint is told from a whole one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from alure.engine.config import ModelConfig
from alure.engine.errors import InputError
from alure.engine.files import sha256, write_json, write_tensors
from alure.engine.model.schema import EventSchema

FORMAT_VERSION = 2
TENSORS, CONFIG, METRICS = "model.safetensors", "config.json", "metrics.json"


class CheckpointConfig(BaseModel):
    """config.json. space: digest of the model onto whose space this one is turned (`alure align`); None: its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    model: ModelConfig
    events: EventSchema
    tasks: tuple[str, ...] = ()
    step: int = 0
    space: str | None = None
    sha256: str

    def digest(self) -> str:
        """See `model_digest`."""
        identity = self.model_dump(mode="json", exclude={"step", "space"})  # the rotations are among the tensors
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> "CheckpointConfig":
        path = folder / CONFIG
        if not folder.is_dir():
            raise InputError(f"model: {folder} does not exist; make it with `alure train EVENTS --out {folder}`")
        if not path.is_file():
            raise InputError(f"model: {folder} has no {CONFIG}, so it is not a checkpoint of `alure train`")
        try:
            data = json.loads(path.read_text())
            version = data.get("format_version") if isinstance(data, dict) else None
            if version != FORMAT_VERSION:
                raise InputError(
                    f"model: {path} has format version {version}, expected {FORMAT_VERSION}; train it again"
                )
            return cls.model_validate(data)
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise InputError(f"model: {path} is damaged ({error}); restore it or train the model again") from None


def check_replaceable(folder: Path) -> None:
    """InputError where the files of a checkpoint would replace somebody else's of the same names."""
    if folder.is_file():
        raise InputError(f"model: {folder} is a file, expected a folder to write the checkpoint into")
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text()) if path.is_file() else {"format_version": FORMAT_VERSION}
    except (json.JSONDecodeError, UnicodeDecodeError):
        return  # a damaged checkpoint is trained again
    if not isinstance(data, dict) or "format_version" not in data:
        raise InputError(f"model: {path} is not of a model of alure, so it is not replaced; name another folder")


def save_checkpoint(folder: Path, module: nn.Module, config: CheckpointConfig, metrics: dict[str, Any]) -> None:
    """Write `module`'s state; `config.sha256` is filled in. Every file is replaced whole, config.json last."""
    write_checkpoint(folder, module.state_dict(), config, metrics)


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: CheckpointConfig, metrics: dict[str, Any]
) -> None:
    """`save_checkpoint` of tensors under their full names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = config.model_copy(update={"sha256": write_tensors(folder / TENSORS, tensors)})
    write_json(folder / METRICS, metrics)
    write_json(folder / CONFIG, written.model_dump(mode="json"))


def read_checkpoint(
    folder: Path, part: Literal["user", "ads", "heads", ""] = ""
) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    """The configuration and one part's tensors, without its prefix; where part is "", all tensors under full names."""
    config = CheckpointConfig.read(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise InputError(f"model: {path} is missing; restore it or train the model again")
    found = sha256(path)
    if found != config.sha256:
        raise InputError(
            f"model: {path} is damaged: expected SHA-256 {config.sha256[:16]}… as in {CONFIG}, got {found[:16]}…; "
            "the file was truncated or altered, restore it or train the model again"
        )
    prefix = f"{part}." if part else ""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            return config, {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise InputError(f"model: {path} is not a safetensors file ({error}); train the model again") from None


def fill(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Load `tensors` into `module`; InputError names every tensor that is missing, unknown or of another shape."""
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    problems = [f"{name}: expected {list(expected[name].shape)}, missing" for name in missing]
    problems += [f"{name}: not a tensor of this configuration" for name in unknown]
    for name in sorted(expected.keys() & tensors.keys()):
        want, got = expected[name], tensors[name]
        if want.shape != got.shape or want.dtype != got.dtype:
            problems.append(f"{name}: expected {want.dtype} {list(want.shape)}, got {got.dtype} {list(got.shape)}")
    if problems:
        listed = "\n  ".join(problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else []))
        raise InputError(f"{what}: its tensors do not fit the configuration:\n  {listed}")
    module.load_state_dict(tensors)


def model_digest(folder: Path | str) -> str:
    """What tells one trained model from another, 64 hex digits: of its tensors, configuration and schema."""
    return CheckpointConfig.read(Path(folder)).digest()


def model_space(folder: Path | str) -> str:
    """Digest of the model whose space a checkpoint's embeddings are in: its own unless it is aligned."""
    config = CheckpointConfig.read(Path(folder))
    return config.space or config.digest()


def describe_differences(mine: BaseModel, theirs: BaseModel, what: str) -> list[str]:
    """Lines naming the fields in which two configurations differ."""
    return [
        f"{what}.{name}: {getattr(theirs, name)!r} in the checkpoint, {getattr(mine, name)!r} here"
        for name in type(mine).model_fields
        if getattr(mine, name) != getattr(theirs, name)
    ]
