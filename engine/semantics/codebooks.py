"""A folder of codebooks: codebooks.json, and the tensors' safetensors file that it names with its SHA-256. No pickle.

codebooks.json is replaced whole once the tensors are on disk: the folder holds the old codebooks, or the new ones.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from alure.engine.errors import InputError
from alure.engine.files import publish, sha256, write_json
from alure.engine.model.checkpoint import fill
from alure.engine.semantics.quantizer import Quantizer, QuantizerShape

FORMAT_VERSION = 1
DESCRIPTION = "codebooks.json"
REMEDY = "restore it, or make the codebooks again with `alure quantize train`"


class Description(BaseModel):
    """codebooks.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    shape: QuantizerShape
    file: str
    sha256: str
    report: dict[str, Any] = {}  # what the training said


def check_out(folder: Path) -> None:
    """InputError where codebooks cannot be written to `folder`, before any work is done."""
    if folder.is_file():
        raise InputError(f"codebooks: {folder} is a file, expected a folder to write the codebooks into")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise InputError(f"codebooks: {folder} is not empty and holds no {DESCRIPTION}; name another folder")


def save_quantizer(folder: Path, quantizer: Quantizer, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "tensors.tmp"
    save_file({name: t.detach().contiguous().cpu() for name, t in quantizer.state_dict().items()}, temporary)
    digest = sha256(temporary)
    path = folder / f"codebooks-{digest[:16]}.safetensors"
    publish(temporary, path)
    description = Description(shape=quantizer.shape, file=path.name, sha256=digest, report=report)
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))
    for old in folder.glob("codebooks-*.safetensors"):
        if old != path:
            old.unlink()


def read_description(folder: Path) -> Description:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"codebooks: {folder} holds no {DESCRIPTION}; make it with `alure quantize train ITEMS --out {folder}`"
        )
    try:
        data = json.loads(path.read_text())
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(f"codebooks: {path} has format version {version}, expected {FORMAT_VERSION}; {REMEDY}")
        return Description.model_validate(data)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(f"codebooks: {path} is damaged ({error}); {REMEDY}") from None


def load_quantizer(folder: Path) -> tuple[Quantizer, str]:
    """(the quantizer, the SHA-256 of its tensors). InputError for what is missing, truncated or altered."""
    description = read_description(folder)
    path = folder / description.file
    found = sha256(path) if path.is_file() else "no file"
    if found != description.sha256:
        raise InputError(
            f"codebooks: {path} is damaged: expected SHA-256 {description.sha256[:16]}… as in {DESCRIPTION}, got "
            f"{found[:16]}; it was truncated, altered or removed: {REMEDY}"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"codebooks: {path} is not a safetensors file ({error}); {REMEDY}") from None
    with torch.random.fork_rng(devices=[]):  # making the modules draws their first weights
        quantizer = Quantizer(description.shape)
    fill(quantizer, tensors, f"codebooks: {folder}")
    return quantizer.requires_grad_(False).eval(), description.sha256
