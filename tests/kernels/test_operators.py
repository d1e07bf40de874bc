"""What all operators share."""

import pytest
import torch

from alure.kernels import DotLinearCompression, TimeBias, compress, jagged_attention


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_an_operator_computes_in_the_dtypes_it_is_given(backend: str) -> None:
    torch.manual_seed(0)
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
