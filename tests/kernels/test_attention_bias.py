"""Buckets and cycles: integers until the last moment, and the same bucket on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import DAY, NOW, TARGETS, WEEK, require

from alure.kernels import PositionBias, TimeBias, jagged_attention, position_thresholds, time_thresholds

LATEST = 2**62 - 1  # the latest time allowed: differences of times then fit int64


def buckets_by(backend: str, elapsed: list[int], thresholds: torch.Tensor, device: str = "cpu") -> list[int]:
    """The bucket of every (query time − key time), read back through attention.

    Each sequence has one query and two keys. The second key is so late that its bucket is 0, and the table holds
    multiples of a step, so the logarithm of the weights' ratio is the bucket of the first key.
    """
    number = thresholds.numel() + 1
    count = len(elapsed)
    step = 8.0 / number
    table = (torch.arange(number) * step)[None].to(device)
    query_times = torch.tensor([max(delta, 0) for delta in elapsed], dtype=torch.int64)
    key_times = query_times - torch.tensor(elapsed)
    late = torch.full((count,), LATEST, dtype=torch.int64)
    keys = torch.stack([key_times, late], dim=1).flatten()
    zeros = torch.zeros(count, 1, 1, device=device)
    values = torch.tensor([1.0, 0.0], device=device).repeat(count)[:, None, None]
    out = jagged_attention(
        zeros,
        torch.zeros(2 * count, 1, 1, device=device),
        values,
        torch.arange(count + 1, device=device),
        2 * torch.arange(count + 1, device=device),
        q_timestamps=query_times.to(device),
        k_timestamps=keys.to(device),
        time_bias=TimeBias(thresholds.to(device), table),
        backend=backend,
    )
    weight = out[:, 0, 0].double().cpu()
    return torch.log(weight / (1 - weight)).div(step).round().to(torch.int64).tolist()


def edges(thresholds: torch.Tensor) -> list[int]:
    return sorted({int(t) + near for t in thresholds for near in (-1, 0, 1)})


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_buckets_at_every_edge(backend: str, device: str) -> None:
    require(backend, device)
    thresholds = time_thresholds(per_octave=1, longest=2**24)
    elapsed = edges(thresholds)
    expected = [sum(int(t) <= delta for t in thresholds) for delta in elapsed]
    assert buckets_by(backend, elapsed, thresholds, device) == expected


@pytest.mark.parametrize("backend", ["reference", "native"])
@settings(max_examples=40)
@given(
    thresholds=st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=12, unique=True),
    elapsed=st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=12),
)
def test_buckets_are_python_integers(backend: str, thresholds: list[int], elapsed: list[int]) -> None:
    require(backend, "cpu")
    thresholds = sorted(thresholds)
    elapsed = elapsed + thresholds
    expected = [sum(t <= delta for t in thresholds) for delta in elapsed]
    assert buckets_by(backend, elapsed, torch.tensor(thresholds)) == expected


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("span", [2**31 - 3, 2**31 - 2, 2**31 - 1, 2**31, 2**40])
def test_spans_around_int32(span: int, backend: str, device: str) -> None:
    """Times are rebased to int32 only where every difference fits; thresholds at and beyond the edge stay right."""
    require(backend, device)
    thresholds = torch.tensor([-(2**41), -span, 1 - span, 0, span, span + 1, 2**41])
    times = torch.tensor([NOW, NOW + span], device=device)
    table = torch.arange(8.0, device=device)[None]
    x = torch.zeros(2, 1, 1, device=device)
    values = torch.tensor([1.0, 0.0], device=device)[:, None, None]
    bias = TimeBias(thresholds.to(device), table)
    offsets = torch.tensor([0, 2], device=device)
    out = jagged_attention(x, x, values, offsets, q_timestamps=times, time_bias=bias, backend=backend)
    weight = out[:, 0, 0].double().cpu()
    difference = torch.log(weight / (1 - weight))  # bias of the first key − bias of the second

    def bucket(delta: int) -> int:
        return int((thresholds <= delta).sum())

    expected = torch.tensor([bucket(0) - bucket(-span), bucket(span) - bucket(0)], dtype=torch.float64)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_two_events_a_second_apart_in_2026(backend: str, device: str) -> None:
    """float32 seconds of 2026 are 128 apart; integers tell 1 s from 0 s, in the table and in the cycle."""
    require(backend, device)
    assert torch.tensor(NOW, dtype=torch.float32) == torch.tensor(NOW + 1, dtype=torch.float32)
    x = torch.zeros(2, 1, 1, device=device)
    offsets = torch.tensor([0, 2], device=device)
    values = torch.tensor([1.0, 0.0], device=device)[:, None, None]
    times = torch.tensor([NOW, NOW + 1], device=device)
    table = torch.tensor([[0.0, 0.0, 3.0]], device=device)
    step = TimeBias(torch.tensor([0, 1], device=device), table)
    out = jagged_attention(x, x, values, offsets, q_timestamps=times, time_bias=step, backend=backend)
    torch.testing.assert_close(out[1, 0, 0].item(), 1 / (1 + math.exp(-3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(out[0, 0, 0].item(), 0.5, rtol=1e-5, atol=0)
    cycle = TimeBias(
        torch.tensor([], dtype=torch.int64, device=device),
        torch.zeros(1, 1, device=device),
        torch.tensor([4], device=device),
        torch.tensor([[2.0]], device=device),
        torch.tensor([[0.0]], device=device),
    )
    out = jagged_attention(x, x, values, offsets, q_timestamps=times, time_bias=cycle, backend=backend)
    torch.testing.assert_close(out[1, 0, 0].item(), 1 / (1 + math.exp(2)), rtol=1e-5, atol=0)  # cos(π/2) − cos(0)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_a_time_before_1970_and_cycles(backend: str, device: str) -> None:
    """The cyclic sum depends on the difference alone, and repeats after a period."""
    require(backend, device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, 4, generator=generator).to(device) for _ in range(3))
    cosine, sine = (torch.randn(2, 2, generator=generator).to(device) for _ in range(2))
    periods = torch.tensor([DAY, WEEK], device=device)
    empty = torch.tensor([], dtype=torch.int64, device=device)
    bias = TimeBias(empty, torch.zeros(2, 1, device=device), periods, cosine, sine)
    times = torch.tensor([0, 5000, 90_000, 90_001, 700_000, 10**6], device=device)
    outs = [
        jagged_attention(
            *(q, k, v, torch.tensor([0, 6], device=device)),
            q_timestamps=times + start,
            k_timestamps=times + start + later,
            time_bias=bias,
            backend=backend,
        )
        for start, later in ((0, 0), (-(10**9) // 3, 0), (NOW, 0), (0, 1000 * WEEK))
    ]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


def test_huge_entries_of_a_table_do_not_spill_into_other_buckets() -> None:
    """A table may forbid a bucket with −1e9 or −inf; the logits of other buckets keep every bit."""
    for forbidden in (-1e9, -math.inf):
        for backend in ("reference", "native", "triton"):
            require(backend, "cpu")
            table = torch.tensor([[forbidden, 0.5, 0.25, forbidden, 0.0]])
            bias = TimeBias(torch.tensor([-10, 0, 10, 20]), table)
            times = torch.tensor([0, 5, 12, 25, 40])
            q = torch.randn(5, 1, 4, generator=torch.Generator().manual_seed(3))
            out = jagged_attention(
                q, q, q, torch.tensor([0, 5]), q_timestamps=times, time_bias=bias, causal=True, backend=backend
            )
            clean = TimeBias(bias.thresholds, torch.tensor([[0.0, 0.5, 0.25, 0.0, 0.0]]))
            elapsed = times[:, None] - times
            bucket = (elapsed[..., None] >= clean.thresholds).sum(-1)
            logits = (q[:, 0] @ q[:, 0].T) / 2 + clean.table[0, bucket]
            hidden = (bucket == 0) | (bucket == 3) | (elapsed < 0)
            expected = logits.masked_fill(hidden, -math.inf).softmax(-1) @ q[:, 0]
            torch.testing.assert_close(out[:, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [time_thresholds, position_thresholds])
@pytest.mark.parametrize("per_octave", [1, 2, 4, 8, 12])
def test_thresholds_are_sorted_and_mirrored(make, per_octave: int) -> None:
    forward, both = make(per_octave, 100_000, bidirectional=False), make(per_octave, 100_000)
    assert both.dtype == forward.dtype == torch.int64
    assert (both.diff() > 0).all()
    assert forward[0] == 1
    assert ((forward > 2**15) & (forward <= 2**16)).sum() == per_octave
    assert 100_000 / 2 ** (1 / per_octave) < forward[-1] <= 100_000
    deltas = torch.randint(-200_000, 200_001, (2000,))
    bucket = torch.bucketize(deltas, both, right=True)
    assert torch.equal(bucket, both.numel() - torch.bucketize(-deltas, both, right=True))
    assert torch.bucketize(torch.tensor(0), both, right=True) * 2 == both.numel()
    with pytest.raises(ValueError, match="per_octave >= 1"):
        make(per_octave=0)


def test_position_bias_alone() -> None:
    thresholds = position_thresholds(longest=8)
    table = torch.randn(1, thresholds.numel() + 1)
    q, k = torch.zeros(2, 1, 1), torch.zeros(4, 1, 1)
    eye = torch.eye(4)[:, None]
    outs = [
        jagged_attention(
            q.expand(2, 1, 4).contiguous(),
            k.expand(4, 1, 4).contiguous(),
            eye,
            torch.tensor([0, 2]),
            torch.tensor([0, 4]),
            position_bias=PositionBias(thresholds, table),
            backend=backend,
        )
        for backend in ("reference", "native")
    ]
    distance = torch.tensor([2, 3])[:, None] - torch.arange(4)  # the last rows are aligned
    expected = table[0, torch.bucketize(distance, thresholds, right=True)].softmax(-1)
    for out in outs:
        torch.testing.assert_close(out[:, 0], expected)
