"""`alure doctor`: what this machine has, which backends run on it and why, and what to install."""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from alure.engine.graph.engines import faiss_gpus, has_faiss
from alure.kernels.attention.tuned import tuned
from alure.kernels.backend import has_native, has_triton, native_instruction_set, resolve_backend

OPERATORS: dict[str, str] = {  # operator: the module whose BACKENDS names its implementations
    "jagged_attention": "alure.kernels.attention.backends",
    "encode_events": "alure.kernels.encoding.ops",
    "compress": "alure.kernels.compression.ops",
    "grouped_topk": "alure.kernels.neighbors.ops",
    "assign_clusters": "alure.kernels.neighbors.ops",
    "residual_quantize": "alure.kernels.quantization.ops",
    "join_candidates": "alure.kernels.candidates.ops",
    "personalized_pagerank": "alure.kernels.pagerank.ops",
    "rms_norm": "alure.kernels.rowwise.ops",
    "swiglu": "alure.kernels.rowwise.ops",
}
ON_THE_HOST = ("join_candidates", "personalized_pagerank")  # their tensors are on the CPU, wherever the others are
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pyarrow",
    "duckdb",
    "deltalake",
    "faiss-cpu",
    "faiss-gpu",
    "cupy-cuda13x",
    "ray",
    "tensorboard",
)


def examine() -> dict[str, Any]:
    """Facts about this machine and installation, JSON-able."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "machine": machine(),
        "gpu": [gpu(index) for index in range(torch.cuda.device_count())] if device.type == "cuda" else [],
        "packages": {name: version(name) for name in PACKAGES},
        "device": str(device),
        "backends": backends(device),
        "graph_search": graph_search(),
        "advice": advice(device),
    }


def machine() -> dict[str, Any]:
    flags = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        flags = set(next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), []))
    names = {"amx_bf16": "AMX-bf16", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu_has": [label for flag, label in names.items() if flag in flags],
        "native_kernels_use": native_instruction_set(),
    }


def gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "attention_tiles": attention_tiles(torch.device("cuda", index)),
    }


def attention_tiles(device: torch.device) -> str:
    """tuned, untuned, or what is wrong with the file that `alure tune` wrote."""
    try:
        return "tuned" if has_triton() and tuned(device) else "untuned"
    except ValueError as error:
        return str(error)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def backends(device: torch.device) -> dict[str, dict[str, Any]]:
    host = torch.device("cpu")
    return {name: backend_of(module, host if name in ON_THE_HOST else device) for name, module in OPERATORS.items()}


def backend_of(module: str, device: torch.device) -> dict[str, Any]:
    offered = importlib.import_module(module).BACKENDS
    chosen = resolve_backend("auto", device, offered)
    reasons = {
        "triton": "tensors are on a CUDA device and Triton is installed",
        "native": "tensors are on the CPU and the compiled kernels are installed",
        "reference": f"the fastest this operator offers on {device.type}",
    }
    reason = reasons[chosen]
    if chosen == "reference" and device.type == "cuda" and "triton" in offered:
        reason = "Triton is not installed"
    elif chosen == "reference" and device.type == "cpu" and "native" in offered:
        reason = "the compiled kernels are missing"
    return {"auto": chosen, "offered": list(offered), "why": reason}


def graph_search() -> dict[str, Any]:
    gpus = faiss_gpus()
    if gpus:
        return {"auto": "faiss", "gpus": gpus, "why": f"FAISS is installed and sees {gpus} GPUs"}
    reason = "finds the neighbours that FAISS finds in the same clusters, sooner" if has_faiss() else "FAISS is missing"
    return {"auto": "grouped", "gpus": 0, "why": reason}


def advice(device: torch.device) -> list[str]:
    lines = []
    if not has_faiss():
        extra = "gpu" if device.type == "cuda" else "cpu"
        lines.append(f'pip install "alure[{extra}]": FAISS, the reference engine of the similarity graph')
    if device.type == "cuda" and not has_triton():
        lines.append("pip install triton: the GPU kernels")
    elif device.type == "cuda" and attention_tiles(torch.device("cuda", torch.cuda.current_device())) != "tuned":
        lines.append("alure tune: the fastest attention tiles for this GPU, in some minutes; the kernels are untuned")
    if not has_native():
        lines.append("pip install --force-reinstall alure: the compiled CPU kernels are missing")
    if device.type == "cpu" and Path("/proc/driver/nvidia").exists():
        lines.append("an NVIDIA driver is present but torch sees no GPU: install a CUDA build of torch")
    return lines


def render(findings: dict[str, Any]) -> str:
    """The findings for a person."""
    here = findings["machine"]
    rows = [
        f"Python {here['python']} on {here['platform']}",
        f"{here['cores']} cores ({', '.join(here['cpu_has']) or 'no vector extensions found'}), "
        f"{here['memory_bytes'] / 2**30:.0f} GiB memory; native kernels use {here['native_kernels_use']}",
    ]
    for card in findings["gpu"]:
        arch = card["compute_capability"].replace(".", "")
        rows.append(f"GPU {card['name']}, {card['memory_bytes'] / 2**30:.0f} GiB, sm_{arch}")
        rows.append(f"    attention's tiles: {card['attention_tiles']}")
    if not findings["gpu"]:
        rows.append("no CUDA device: everything runs on the CPU")
    rows.append("")
    rows += [f"{name:>14}  {found or '-'}" for name, found in findings["packages"].items()]
    rows += ["", 'Backends under backend="auto":']
    rows += [
        f"{name:>18}  {chosen['auto']:<10} {chosen['why']} (offers {', '.join(chosen['offered'])})"
        for name, chosen in findings["backends"].items()
    ]
    search = findings["graph_search"]
    rows.append(f"{'graph --search':>18}  {search['auto']:<10} {search['why']}")
    rows += ["", "To do:" if findings["advice"] else "Nothing to install."]
    rows += [f"  {line}" for line in findings["advice"]]
    return "\n".join(rows)
