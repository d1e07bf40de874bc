"""What all operators share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from alure.kernels import (
    DotLinearCompression,
    EventEncoder,
    TimeBias,
    compress,
    encode_events,
    jagged_attention,
    personalized_pagerank,
    rms_norm,
    swiglu,
)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_an_operator_computes_in_the_dtypes_it_is_given(backend: str) -> None:
    q, k, v = torch.randn(3, 12, 2, 16).unbind(0)
    offsets, times = torch.tensor([0, 5, 12]), torch.arange(12) * 50
    bias = TimeBias(torch.tensor([60, 200]), torch.randn(2, 3))
    parameters = DotLinearCompression.initialize(6, 16, 2, 4, hidden=32)
    x = torch.randn(3, 6, 16)

    def outputs() -> list[torch.Tensor]:
        return [
            jagged_attention(q, k, v, offsets, q_timestamps=times, time_bias=bias, backend=backend),
            compress(x, parameters, backend=backend),
        ]

    expected = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert (q[:, 0] @ k[:, 0].T).dtype == torch.bfloat16
        found = outputs()
    for before, after in zip(expected, found):
        assert after.dtype == torch.float32
        assert torch.equal(before, after)


def _attention(x: Tensor) -> Tensor:
    return jagged_attention(*[x.view(12, 2, 8)] * 3, torch.tensor([0, 5, 12]))


def _encode(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    periods = torch.tensor([86_400])
    weights = (torch.randn(1, 16, 4), torch.randn(4, 4), torch.zeros(4), torch.randn(3, 4), torch.randn(2, 4))
    encoder = EventEncoder(*weights, periods, torch.zeros(1), 3600.0)
    ids, offsets, times = torch.arange(12)[:, None], torch.tensor([0, 12]), torch.arange(12) * 500
    return encode_events(ids, x, offsets, times, torch.tensor([9000]), encoder)


def _compress(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return compress(x.view(2, 6, 16), DotLinearCompression.initialize(6, 16, 2, 4, 32, generator))


DIFFERENTIABLE = pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("jagged_attention", _attention),
        ("encode_events", _encode),
        ("compress_dot_linear", _compress),
        ("rms_norm", lambda x: rms_norm(x, torch.ones(16))),
        ("swiglu", swiglu),
    ],
)


@DIFFERENTIABLE
def test_a_forward_mode_derivative_is_refused(name: str, operator: Callable[[Tensor], Tensor]) -> None:
    """Torch gave zeros."""
    x = torch.randn(12, 16)
    with pytest.raises(RuntimeError, match=f"alure::{name}: it has no forward-mode derivative"):
        torch.func.jvp(operator, (x,), (x,))
    with forward_ad.dual_level():
        assert torch.equal(operator(x), operator(x.clone()))  # of constants it has one


@DIFFERENTIABLE
def test_a_second_derivative_is_refused(name: str, operator: Callable[[Tensor], Tensor]) -> None:
    """Torch's fallback gave zeros, and one warning a process."""
    x = torch.randn(12, 16, requires_grad=True)
    (once,) = torch.autograd.grad(operator(x).square().sum(), x)
    (kept,) = torch.autograd.grad(operator(x).square().sum(), x, create_graph=True)
    assert torch.equal(once, kept)
    with pytest.raises(RuntimeError, match=f"alure::{name}: it has no second derivative"):
        kept.square().sum().backward()


def test_a_derivative_of_what_has_none_is_refused() -> None:
    weights = torch.ones(3, requires_grad=True)
    graph = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0], dtype=torch.int32)
    scores = personalized_pagerank(*graph, weights, torch.tensor([0]), k=2).scores
    with pytest.raises(RuntimeError, match="alure::personalized_pagerank: it has no derivative; detach"):
        scores.sum().backward()
