"""compress, n vectors to k, in both forms, beside plain PyTorch, eager and compiled, with XXᵀ materialised and not."""

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from alure.bench.race import Contest, backward_entry, forward_entry
from alure.kernels import DotLinearCompression, InteractionCompression, compress

HIDDEN, HEADS = 128, 4
DOT_LINEAR = ("n=256 d=96 r=24 k=2", "n=64 d=192 r=16 k=4")
INTERACTION = ("n=256 d=96 k=2",)


class DotLinearCase:
    def __init__(self, size: str, users: int, device: torch.device) -> None:
        g = torch.Generator().manual_seed(0)
        n, d, r, k = numbers_of(size)
        self.name = f"dot-linear, {users:,} users, {size}"
        self.k, self.d = k, d
        self.x = torch.randn(users, n, d, generator=g).to(device)
        start = DotLinearCompression.initialize(n, d, k, r, HIDDEN, g)
        mixed = torch.randn(HIDDEN, k * d, generator=g) * HIDDEN**-0.5  # zero at the start, which would hide errors
        self.c = DotLinearCompression(
            **{name: t.to(device) for name, t in (vars(start) | {"output_weight": mixed}).items()}
        )
        self.parameters = [getattr(self.c, field.name) for field in fields(self.c)]
        self.flops = 2.0 * users * (n * d * (2 * r + k) + n * r * HIDDEN + HIDDEN * k * d)
        self.moved = 4.0 * users * (n * d + k * d)

    def ours(self, backend: str = "auto") -> Tensor:
        return compress(self.x, self.c, backend=backend)

    def thin(self) -> Tensor:
        return self._eager(self.x @ (self.x.transpose(1, 2) @ self.c.mix))

    def square(self) -> Tensor:
        return self._eager((self.x @ self.x.transpose(1, 2)) @ self.c.mix)

    def _eager(self, products: Tensor) -> Tensor:
        """products: X(XᵀY) [B, n, r], however it was made."""
        c = self.c
        flat = products.flatten(1)
        hidden = F.gelu(F.rms_norm(flat, flat.shape[1:]) @ c.hidden_weight + c.hidden_bias, approximate="tanh")
        mixed = (hidden @ c.output_weight + c.output_bias).view(-1, self.k, self.d)
        return F.normalize(F.rms_norm(c.linear @ self.x + c.gate * mixed, (self.d,)), dim=-1)

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "alure": self.ours,
            "eager PyTorch, X(XᵀY)": self.thin,
            "eager PyTorch, (XXᵀ)Y": self.square,
            "eager X(XᵀY), compiled": torch.compile(self.thin, dynamic=False),
        }


class InteractionCase:
    def __init__(self, size: str, users: int, device: torch.device) -> None:
        g = torch.Generator().manual_seed(0)
        n, d, k = numbers_of(size)
        self.name = f"interaction, {users:,} users, {size}"
        self.x = torch.randn(users, n, d, generator=g).to(device)
        start = InteractionCompression.initialize(d, k, HEADS, generator=g)
        layers = tuple(type(layer)(**{name: t.to(device) for name, t in vars(layer).items()}) for layer in start.layers)
        self.c = InteractionCompression(start.seeds.to(device), layers, HEADS)
        self.parameters = [self.c.seeds, *(getattr(layer, f.name) for layer in layers for f in fields(layer))]
        # Keys and values of the n vectors; then what the k seeds need, which is small beside them.
        self.flops = 2.0 * users * (2 * n * d * d + 2 * k * n * d + k * d * d * (2 + 4 + 6 * len(layers)))
        self.moved = 4.0 * users * (n * d + k * d)

    def ours(self, backend: str = "auto") -> Tensor:
        return compress(self.x, self.c, backend=backend)

    def eager(self) -> Tensor:
        batch, _, d = self.x.shape
        tokens = self.c.seeds.expand(batch, -1, -1)
        vectors = F.rms_norm(self.x, (d,))
        for index, layer in enumerate(self.c.layers):
            queries = F.rms_norm(tokens, (d,))
            keys = queries if index else vectors
            sides = ((queries, layer.query), (keys, layer.key), (keys, layer.value))
            q, k, v = ((x @ weight).unflatten(2, (HEADS, -1)).transpose(1, 2) for x, weight in sides)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + attended @ layer.output
            h = F.rms_norm(tokens, (d,))
            tokens = tokens + (F.silu(h @ layer.gate) * (h @ layer.up)) @ layer.down
        return F.normalize(F.rms_norm(tokens, (d,)), dim=-1)

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "alure": self.ours,
            "eager PyTorch, SDPA": self.eager,
            "eager PyTorch, compiled": torch.compile(self.eager, dynamic=False),
        }


def numbers_of(size: str) -> list[int]:
    return [int(word.split("=")[1]) for word in size.split()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" not in metafunc.fixturenames:
        return
    quick, backward = bool(metafunc.config.getoption("--quick")), metafunc.function.__name__ == "bench_backward"
    forms = [("dot-linear", size) for size in DOT_LINEAR] + [("interaction", size) for size in INTERACTION]
    chosen = [forms[0]] if quick or backward else forms
    metafunc.parametrize(("form", "size"), chosen, ids=[f"{form}, {size}" for form, size in chosen])


@pytest.fixture
def case(form: str, size: str, quick: bool, device: torch.device) -> DotLinearCase | InteractionCase:
    users = 64 if quick else 16_384 if device.type == "cuda" else 512
    return (DotLinearCase if form == "dot-linear" else InteractionCase)(size, users, device)


def bench_forward(race: Callable[[Contest], None], case: DotLinearCase | InteractionCase, size: str) -> None:
    expected = case.ours("reference")
    entries = [forward_entry(name, call, expected, torch.float32) for name, call in case.calls().items()]
    race(Contest("compression", case.name, entries, case.flops, case.moved, facts={"size": size, "backward": False}))


def bench_backward(race: Callable[[Contest], None], case: DotLinearCase | InteractionCase, size: str) -> None:
    """Gradients of the vectors and of every parameter."""
    inputs = [case.x, *case.parameters]
    for x in inputs:
        x.requires_grad_()
    expected_out = case.ours("reference")
    grad_out = torch.randn(expected_out.shape, generator=torch.Generator().manual_seed(1)).to(expected_out.device)
    expected = torch.autograd.grad(expected_out, inputs, grad_out)
    entries = [
        backward_entry(name, call, inputs, grad_out, expected, torch.float32) for name, call in case.calls().items()
    ]
    name = f"{case.name}, forward and backward"
    race(Contest("compression", name, entries, 3 * case.flops, facts={"size": size, "backward": True}))
