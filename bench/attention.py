"""Jagged attention with a relative-time bias, beside every open way to compute it, or to compute it without the bias.

Not counted: compilation, our plan, the block mask, the padding, the dense bias.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from alure.bench.histories import HEADS, Histories
from alure.bench.peers import Peer
from alure.bench.peers.alure import alure
from alure.bench.peers.flash import package, pytorch
from alure.bench.peers.flex import flex
from alure.bench.peers.hstu import hstu
from alure.bench.peers.runs import Reference, backward, forward
from alure.bench.peers.sdpa import batched, each, padded
from alure.bench.race import Contest, Entry

SUITE = "attention"
WITH_BIAS: dict[str, Callable[[Histories], Peer]] = {
    "alure, time bias": partial(alure, with_bias=True),
    "alure, time bias, no plan": partial(alure, with_bias=True, planned=False),
    "FlexAttention compiled, time bias": partial(flex, with_bias=True),
    "padded SDPA, dense bias built before": padded,
    "HSTU's bias of before 2024-12": hstu,
}
WITHOUT_BIAS: dict[str, Callable[[Histories], Peer]] = {
    "alure, no bias": partial(alure, with_bias=False),
    "FlexAttention compiled, no bias": partial(flex, with_bias=False),
    "SDPA of the batch, no bias": batched,
    "SDPA a sequence, no bias": each,
    "FlashAttention varlen, no bias": package,
    "PyTorch varlen_attn, no bias": pytorch,
}
FORWARD = WITH_BIAS | WITHOUT_BIAS
# HSTU's is a forward kernel here; a dense bias gets no gradient for its table.
BACKWARD = {name: build for name, build in FORWARD.items() if build not in (hstu, padded)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        quick, cuda = bool(metafunc.config.getoption("--quick")), torch.cuda.is_available()
        metafunc.parametrize("name", cases(metafunc.function.__name__ == "bench_backward", quick, cuda))


def cases(of_backward: bool, quick: bool, cuda: bool) -> list[str]:
    """Names "shape, D=head_dim, dtype": the shapes in the dtype that the engine would use, then the other dtype."""
    main, other = ("bfloat16", "float32") if engine_dtype(cuda) == torch.bfloat16 else ("float32", "bfloat16")
    if of_backward:
        return [f"{shape}, D=64, {main}" for shape in (["equal 256"] if quick else ["equal 1024", "lognormal"])]
    if quick:
        return [f"{shape}, D=64, {main}" for shape in ("equal 256", "equal 1024", "lognormal")]
    lengths = ["equal 64", "equal 256", "equal 1024", "equal 4096", "equal 16384"]
    return [
        *(f"{shape}, D=64, {main}" for shape in [*lengths, "lognormal", "heavy-tailed"]),
        *(f"equal 1024, D={head_dim}, {main}" for head_dim in (32, 128)),
        *([f"{shape}, D=128, {main}" for shape in ("equal 4096", "lognormal")] if cuda else []),
        *(f"{shape}, D=64, {other}" for shape in ("equal 1024", "lognormal")),
    ]


def engine_dtype(cuda: bool) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return torch.bfloat16 if cuda or "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def histories_of(name: str, quick: bool, device: torch.device) -> Histories:
    shape, head_dim, dtype = name.split(", ")
    tokens = 65_536 if device.type == "cuda" else 2_048 if quick else 8_192
    if shape.startswith("equal"):
        tokens = max(tokens, int(shape.split()[1]))
    return Histories(shape, tokens, int(head_dim.removeprefix("D=")), getattr(torch, dtype), device)


def bench_forward(race: Callable[[Contest], None], quick: bool, device: torch.device, name: str) -> None:
    histories = histories_of(name, quick, device)
    reference = Reference(histories)
    entries = [Entry(peer, partial(forward, build, reference)) for peer, build in FORWARD.items()]
    race(_contest(histories, name, entries, backward=False))


def bench_backward(race: Callable[[Contest], None], quick: bool, device: torch.device, name: str) -> None:
    histories = histories_of(name, quick, device)
    reference = Reference(histories)
    entries = [Entry(peer, partial(backward, build, reference)) for peer, build in BACKWARD.items()]
    race(_contest(histories, f"{name}, forward and backward", entries, backward=True))


def _contest(histories: Histories, case: str, entries: list[Entry], backward: bool) -> Contest:
    facts = {
        "shape": histories.shape,
        "users": len(histories.lengths),
        "tokens": sum(histories.lengths),
        "longest": max(histories.lengths),
        "heads": HEADS,
        "head_dim": histories.head_dim,
        "backward": backward,
    }
    flops = histories.flops * (3.5 if backward else 1.0)
    return Contest(SUITE, case, entries, flops=flops, dtype=histories.dtype, facts=facts)
