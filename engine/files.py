"""Files that appear whole or not at all, and their checksums."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alure.engine.errors import AlureError


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename into place once the bytes, and then the name, are on disk."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file of `tensors`; its SHA-256. AlureError where it cannot be written.

    safetensors writes to .tmp…, which it renames; what a killed writer left of that is deleted.
    """
    temporary = path.with_suffix(".tmp")
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    except SafetensorError as error:
        raise AlureError(
            f"{path}: cannot be written ({error}); free space or mend permissions, and run again"
        ) from None
    digest = sha256(temporary)
    publish(temporary, path)
    for left in path.parent.glob(".tmp*"):
        left.unlink()
    return digest
