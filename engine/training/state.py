"""MODEL/training: all that the next step of an unfinished training depends on, so that it goes on after a kill.

state.json names the tensors' file of its step with its SHA-256, and is replaced whole once that file is on disk: at
every moment the folder holds one whole state, or none. No pickle.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from alure.engine.errors import InputError
from alure.engine.files import sha256, write_json, write_tensors
from alure.engine.progress import say

FORMAT_VERSION = 1
FOLDER, STATE = "training", "state.json"


@dataclass(frozen=True)
class Saved:
    step: int  # steps that were done
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class TrainingState:
    """The state of the training into the folder `model`, made from `made_from` (plain JSON)."""

    def __init__(self, model: Path, made_from: dict[str, Any]) -> None:
        self.folder = model / FOLDER
        self.made_from = json.loads(json.dumps({"format_version": FORMAT_VERSION, **made_from}))

    def save(self, saved: Saved) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{saved.step}.safetensors"
        digest = write_tensors(path, saved.tensors)
        state = {"made_from": self.made_from, "step": saved.step, "file": path.name, "file_sha256": digest}
        state["facts"] = saved.facts
        write_json(self.folder / STATE, {**state, "sha256": _digest(state)})
        for old in self.folder.glob("step-*"):
            if old != path:
                old.unlink()

    def load(self) -> Saved | None:
        """What was saved; None where nothing was, or where it is of another training, which is then said.

        Another training starts from the beginning: a changed configuration or log must not block the job of the next
        night. InputError where the state is damaged.
        """
        path = self.folder / STATE
        if not path.is_file():
            return None
        remedy = f"restore it, or remove {self.folder} to train from the first step"
        try:
            data = json.loads(path.read_text())
            intact = isinstance(data, dict) and data.pop("sha256", None) == _digest(data)
        except (json.JSONDecodeError, UnicodeDecodeError):
            intact = False
        if not intact:
            raise InputError(f"training: {path} is damaged: it was cut or altered; {remedy}")
        if data["made_from"] != self.made_from:
            differences = "; ".join(differing(self.made_from, data["made_from"]))
            say(f"training: {path} is of another training and is not used, this one starts anew ({differences})")
            return None
        tensors = self.folder / data["file"]
        found, expected = sha256(tensors) if tensors.is_file() else "no file", data["file_sha256"]
        if found != expected:
            raise InputError(
                f"training: {tensors} is damaged: expected SHA-256 {expected[:16]}… as in {STATE}, got {found[:16]}; "
                + remedy
            )
        return Saved(data["step"], data["facts"], load_file(tensors))

    def remove(self) -> None:
        """Once the training has ended. Only its own files go."""
        if not self.folder.is_dir():
            return
        (self.folder / STATE).unlink(missing_ok=True)
        for pattern in ("step-*", "*.tmp", ".tmp*"):
            for path in self.folder.glob(pattern):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differing(here: Any, there: Any, name: str = "") -> list[str]:
    """Lines naming the places in which two JSON values differ."""
    if not isinstance(here, dict) or not isinstance(there, dict):
        return [] if here == there else [f"{name}: {there!r} then, {here!r} now"]
    keys = [key for key in {**there, **here} if here.get(key) != there.get(key)]
    return [line for key in keys for line in differing(here.get(key), there.get(key), f"{name}.{key}".lstrip("."))]


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `prefixed` was given."""
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }
