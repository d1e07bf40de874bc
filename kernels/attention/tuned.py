"""Tiles and launch options that `alure tune` found fastest on a GPU, one JSON file a kind of GPU."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)  # as the kernels pad them


class Config(NamedTuple):
    """Queries and keys of a tile, and launch options.

    maxnreg: registers a thread may have. Left to itself the assembler can settle on fewer and spill.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def launch_options(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


class Configs(NamedTuple):
    """Of the three kernels."""

    forward: Config
    dq: Config
    dkdv: Config


Tuned = dict[tuple[torch.dtype, int], Configs]  # by dtype and padded head_dim


@lru_cache
def tuned(device: torch.device) -> Tuned:
    """What has been found for `device` with the Triton that is installed; read once a process."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    return read_tuned(tuned_path(name), name)


def tuned_path(device_name: str) -> Path:
    """Where the file for GPUs of this name lies, whether or not it exists."""
    return Path.home() / ".cache" / "alure" / f"attention {device_name.replace('/', ' ')}.json"


def read_tuned(path: Path, device_name: str) -> Tuned:
    """Raises ValueError for a file that is not one of these. Empty where there is none, and where it is of another kind
    of GPU or of another Triton, whose kernels differ.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if (content["device"], content["triton"]) != (device_name, _triton_version()):
            return {}
        return dict(map(_entry, content["configs"]))
    except (KeyError, TypeError, ValueError) as error:
        remedy = "delete it or run that again"
        raise ValueError(f"{path}: expected what `alure tune` writes, got {error}; {remedy}") from None


def write_tuned(path: Path, device_name: str, tuned: Tuned) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    configs = [
        {"dtype": names[dtype], "head_dim": head_dim}
        | {kernel: list(config) for kernel, config in of._asdict().items()}
        for (dtype, head_dim), of in tuned.items()
    ]
    content = {"device": device_name, "triton": _triton_version(), "configs": configs}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def _triton_version() -> str:
    import triton

    return triton.__version__


def _entry(entry: dict[str, Any]) -> tuple[tuple[torch.dtype, int], Configs]:
    if entry["head_dim"] not in HEAD_DIMS:
        raise ValueError(f"head_dim {entry['head_dim']!r}")
    return (DTYPES[entry["dtype"]], entry["head_dim"]), Configs(*(_config(entry[name]) for name in Configs._fields))


def _config(values: list[Any]) -> Config:
    block_m, block_n, num_warps, num_stages, maxnreg = values
    sound = (
        {block_m, block_n} <= {16, 32, 64, 128, 256}
        and num_warps in (1, 2, 4, 8, 16)
        and num_stages in range(1, 9)
        and (maxnreg is None or maxnreg in range(32, 256))
    )
    if not sound:
        raise ValueError(f"the configuration {values!r}")
    return Config(*values)
