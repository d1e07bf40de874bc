"""Every peer of the attention race computes what the race says it computes."""

import importlib.util

import pytest
import torch

from alure.bench.attention import BACKWARD, FORWARD
from alure.bench.histories import Histories, bucket_thresholds, lengths_of
from alure.bench.peers.alure import alure
from alure.bench.peers.hstu import as_time_bias, hstu
from alure.bench.peers.runs import Reference, backward, forward
from alure.bench.race import LeftOut

CPU = torch.device("cpu")
COMPILED = [name for name in FORWARD if "compiled" in name]
INTERPRETED = "HSTU's bias of before 2024-12"
ELSEWHERE = ["FlashAttention varlen, no bias", "PyTorch varlen_attn, no bias"]
PLAIN = [name for name in FORWARD if name not in [*COMPILED, *ELSEWHERE, INTERPRETED]]


def histories_of(shape: str, tokens: int, dtype: torch.dtype = torch.float32) -> Histories:
    return Histories(shape, tokens, head_dim=16, dtype=dtype, device=CPU)


@pytest.mark.parametrize("shape", ["equal 60", "lognormal"])
@pytest.mark.parametrize("name", PLAIN)
def test_forward(name: str, shape: str) -> None:
    try:
        run, check = forward(FORWARD[name], Reference(histories_of(shape, 600)))
    except LeftOut:
        assert name == "SDPA of the batch, no bias"
        assert shape == "lognormal"
        return
    assert check(run()) == ""


@pytest.mark.parametrize("name", [name for name in BACKWARD if name in PLAIN])
def test_backward(name: str) -> None:
    run, check = backward(FORWARD[name], Reference(histories_of("equal 60", 300)))
    assert check(run()) == ""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["equal 64", "lognormal"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, shape: str) -> None:
    histories = Histories(shape, 512, head_dim=64, dtype=torch.float32, device=CPU)
    run, check = forward(FORWARD[name], Reference(histories))
    assert check(run()) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["equal 256", "lognormal"])
@pytest.mark.parametrize("name", FORWARD)
def test_on_the_gpu(name: str, shape: str) -> None:
    reference = Reference(Histories(shape, 2048, head_dim=64, dtype=torch.bfloat16, device=torch.device("cuda")))
    try:
        run, check = forward(FORWARD[name], reference)
    except LeftOut as reason:
        pytest.skip(str(reason))
    assert check(run()) == ""
    if name in BACKWARD:
        run, check = backward(FORWARD[name], reference)
        assert check(run()) == ""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_hstu_is_the_reference_with_the_thresholds_of_its_logarithm() -> None:
    run, check = forward(hstu, Reference(histories_of("lognormal", 200)))
    assert check(run()) == ""


def test_a_check_catches_another_bias() -> None:
    histories = histories_of("equal 60", 120)
    run, _ = forward(lambda h: alure(h, with_bias=False), Reference(histories))
    _, check = forward(lambda h: alure(h, with_bias=True), Reference(histories))
    assert "off the reference" in check(run())


def test_hstu_buckets_by_thresholds() -> None:
    bias = as_time_bias(torch.arange(64.0))
    elapsed = torch.tensor([0, 1, 2, 3, 60, 3600, 86_400, 7_776_000])
    logarithmic = (elapsed.clamp(min=1).float().log() * (1 / 0.301)).int()
    found = bias.table[0, torch.bucketize(elapsed, bias.thresholds, right=True)]
    assert found.int().tolist() == logarithmic.tolist()
    mirrored = bias.table[0, torch.bucketize(-elapsed, bias.thresholds, right=True)]
    assert torch.equal(found, mirrored)


def test_bucket_thresholds_are_the_cells_of_a_float() -> None:
    thresholds = bucket_thresholds()
    middle = len(thresholds) // 2
    elapsed = torch.cat([torch.arange(0, 5000), 2 ** torch.arange(4, 24), 3 * 2 ** torch.arange(4, 22) - 1]).int()
    cells = torch.maximum((elapsed.float().view(torch.int32) >> 22) - 254, elapsed.clamp(max=1))
    assert torch.equal(torch.bucketize(elapsed, thresholds, right=True), middle + cells.long())
    assert torch.equal(torch.bucketize(-elapsed, thresholds, right=True), middle - cells.long())


@pytest.mark.parametrize("shape", ["equal 64", "lognormal", "heavy-tailed"])
def test_lengths_sum_to_the_tokens(shape: str) -> None:
    lengths = lengths_of(shape, 8192)
    assert sum(lengths) == 8192
    assert min(lengths) >= 1
    assert (len(set(lengths)) == 1) == (shape == "equal 64")
