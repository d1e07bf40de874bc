"""The forward pass of a prepared batch only launches, and gives what it gives of a batch that is not prepared."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.model import DAY, START, LogParts, SourceRows, tiny_model, write_log
from support.tolerance import require
from support.waits import DEVICE, DeviceWaits, Watch, launch_only
from torch import Tensor

from alure.engine.config import ModelConfig, OutputDtype, RefreshConfig
from alure.engine.events import EventBatch, Events
from alure.engine.model import EventSchema, UserModel
from alure.engine.model.prepared import PreparedBatch
from alure.engine.refresh.embedder import Embedder, Snapshot, Work
from alure.engine.refresh.transfer import Packed, Sender

MODELS: dict[str, ModelConfig] = {
    "default": tiny_model(),
    "several taps": tiny_model(layers=3),
    "exchange": tiny_model(exchange=True, layers=3),
    "interaction": tiny_model(compression="interaction"),
    "causal with a window": tiny_model(causal=True, window=5),
    "own shapes": tiny_model(sources={"click": {"layers": 1, "heads": 4, "window": 3}}, exchange=True),
    "without biases": tiny_model(time_bias=False, position_bias=False),
    "without cycles": tiny_model(bias_periods=[], periods=[]),
}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    """Three sources, with items' content, vectors of the events' own, local times, and users without events."""
    draw = np.random.default_rng(0)

    def rows(count: int, users: int, dense: int = 0) -> SourceRows:
        vectors = draw.standard_normal((count, dense)).astype(np.float32) if dense else None
        offsets = draw.integers(-10, 10, count) * 3_600
        times, items = START + draw.integers(0, 200 * DAY, count), draw.integers(0, 50, count)
        return SourceRows(draw.integers(0, users, count), times, items, dense=vectors, utc_offset=offsets)

    parts = LogParts(
        num_users=21,
        num_items=50,
        sources={"view": rows(700, 18), "click": rows(90, 12), "post": rows(60, 20, dense=4)},
        item_accounts=np.arange(50) // 2,
        item_categories=np.arange(50) % 3,
        dense=draw.standard_normal((50, 6)).astype(np.float32),
    )
    return write_log(tmp_path_factory.mktemp("log"), parts)


def make(events: Events, config: ModelConfig, device: torch.device | str = "cpu") -> UserModel:
    torch.manual_seed(0)
    model = UserModel(config, EventSchema.of(events.manifest)).eval()
    return model.requires_grad_(False).to(device)


def mover(to: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    known: dict[int, tuple[Tensor, Tensor]] = {}
    return lambda x: known.setdefault(id(x), (x, to(x)))[1]


def batch_of(events: Events, users: int = 21) -> EventBatch:
    return events.batch(range(users), START + 150 * DAY)


def on_device(model: UserModel, events: Events, batch: EventBatch) -> PreparedBatch:
    """Prepared on the host for a model on a device, and moved there."""
    return model.prepare(batch, model.catalog(events, torch.device("cpu"))).moved(mover(lambda x: x.to(model.device)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    require("triton", "cpu")
    monkeypatch.setattr(UserModel, "autocast", lambda model: nullcontext())  # there is none for meta tensors
    return launch_only(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_only_launches(events: Events, launches: dict[str, int], name: str, dtype: torch.dtype) -> None:
    model = make(events, MODELS[name], DEVICE).to(dtype)
    catalog = model.catalog(events)
    with torch.inference_mode():
        batch = on_device(model, events, batch_of(events))
        with Watch():
            found = model(batch, catalog)
            codes, scales = model.forward_int8(batch, catalog)
    k, d = model.config.num_embeddings, model.config.width
    assert (found.shape, codes.shape, scales.shape) == ((21, k, d), (21, k, d), (21, k))
    taps = model.num_taps
    groups = sum(len({s.heads for s in model.sources() if depth < len(s.layers)}) for depth in range(3))
    compression = 2 if model.config.compression == "interaction" else 0
    assert launches["forward_kernel"] == 2 * (taps + groups + compression)
    assert launches["encode_events_kernel"] == 2 * 3
    assert launches["normalize_kernel"] == 2


def test_turned_embeddings_only_launch(events: Events, launches: dict[str, int]) -> None:
    model = make(events, tiny_model())
    model.align(torch.eye(16).expand(2, 16, 16))
    model = model.to(DEVICE)
    with torch.inference_mode():
        batch, catalog = on_device(model, events, batch_of(events)), model.catalog(events)
        with Watch():
            model(batch, catalog)
            model.forward_int8(batch, catalog)


def test_a_batch_that_is_not_prepared_waits(events: Events, launches: dict[str, int]) -> None:
    model = make(events, tiny_model(), DEVICE)
    batch = batch_of(events).to(DEVICE)
    with torch.inference_mode(), pytest.raises(DeviceWaits), Watch():
        model(batch, model.catalog(events))


@pytest.mark.parametrize("users", [0, 1, 20])
def test_of_few_or_no_users_too(events: Events, launches: dict[str, int], users: int) -> None:
    model = make(events, MODELS["exchange"], DEVICE)
    with torch.inference_mode():
        batch = on_device(model, events, events.batch([20] if users == 1 else range(users), START + 150 * DAY))
        catalog = model.catalog(events)
        with Watch():
            assert model(batch, catalog).shape[0] == users


@pytest.mark.parametrize("name", MODELS)
def test_a_prepared_batch_gives_the_same_bits(events: Events, name: str) -> None:
    model, batch = make(events, MODELS[name]), batch_of(events)
    catalog = model.catalog(events)
    prepared = model.prepare(batch, catalog)
    moved = prepared.moved(mover(Tensor.clone))
    expected = model(batch, catalog)
    assert torch.isfinite(expected).all()
    for found in (prepared, moved):
        assert len(found) == 21
        assert torch.equal(model(found, catalog), expected)
        for x, y in zip(model.forward_int8(found, catalog), model.forward_int8(batch, catalog)):
            assert torch.equal(x, y)


def test_what_is_prepared_for_a_device_is_checked(events: Events, launches: dict[str, int]) -> None:
    model, batch = make(events, tiny_model(), DEVICE), batch_of(events)
    batch.sequences["view"].timestamps[5] = 1 << 62
    with pytest.raises(ValueError, match="timestamps: expected"):
        on_device(model, events, batch)
    batch = batch_of(events)
    batch.sequences["click"].offsets[3] += 1_000
    with pytest.raises((ValueError, IndexError), match="offsets: expected"):
        on_device(model, events, batch)


@pytest.mark.parametrize("name", ["default", "interaction"])
def test_a_packed_batch_is_the_batch(events: Events, name: str) -> None:
    model, batch = make(events, MODELS[name]), batch_of(events)
    catalog = model.catalog(events)
    prepared = model.prepare(batch, catalog)
    packed = Packed.of(prepared, pinned=False)
    buffer = packed.buffer.clone()
    packed.buffer.fill_(0xFF)
    unpacked = packed.unpacked(buffer)
    assert torch.equal(model(unpacked, catalog), model(prepared, catalog))
    pairs: dict[int, Tensor] = {}
    copies = iter(tensors_of(unpacked))
    for x in tensors_of(prepared):
        copy = next(copies)
        assert pairs.setdefault(id(x), copy) is copy  # one copy of each
        assert copy.dtype == x.dtype
        assert torch.equal(copy, x)
        assert copy.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert copy.is_contiguous()
        assert (copy.data_ptr() - buffer.data_ptr()) % 16 == 0
    places = sorted((copy.data_ptr(), copy.nbytes) for copy in pairs.values())
    assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(places))


def tensors_of(batch: PreparedBatch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.moved(lambda x: (found.append(x), x)[1])
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_copy_is_not_written_over_before_it_is_read(events: Events) -> None:
    """Batch after batch over the sender's stream while the device is kept behind: each gives what it gives alone."""
    model, device = make(events, tiny_model(), "cuda"), torch.device("cuda")
    host, sender = model.catalog(events, torch.device("cpu")), Sender(device)
    catalog = host.to(device)
    with torch.inference_mode():
        batches = [events.batch(range(first, first + 3), START + 150 * DAY) for first in range(18)]
        expected = [model(batch.to(device), catalog) for batch in batches]
        torch.cuda.synchronize()
        found = []
        for batch in batches:
            torch.cuda._sleep(10_000_000)
            found.append(model(sender.send(sender.pack(model.prepare(batch, host))), catalog))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_on_a_gpu_a_refresh_waits_for_results_alone(events: Events, dtype: OutputDtype) -> None:
    config = RefreshConfig(token_budget=120, precision="float32", output_dtype=dtype)
    snapshot, users = Snapshot("g", START + 150 * DAY, "m", None, config), np.arange(21)
    tokens = events.num_events(snapshot.as_of)
    on_host = Embedder(make(events, tiny_model()), events, snapshot, torch.device("cpu"))
    expected, _ = on_host.embed(users, tokens, Work().add)
    embedder = Embedder(make(events, tiny_model()), events, snapshot, torch.device("cuda"))
    embedder.embed(users, tokens, Work().add)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # an event that is waited for, that of the results, is none
    try:
        found, work = embedder.embed(users, tokens, Work().add)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert work.batches > 3
    np.testing.assert_allclose(found.values, expected.values, atol=2 if dtype == "int8" else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_cuda_sees_no_wait(events: Events, name: str) -> None:
    model = make(events, MODELS[name], "cuda")
    catalog = model.catalog(events)
    with torch.inference_mode():
        expected = model(batch_of(events).to("cuda"), catalog)  # compiles
        model.forward_int8(batch_of(events).to("cuda"), catalog)
        batch = on_device(model, events, batch_of(events))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = model(batch, catalog)
            model.forward_int8(batch, catalog)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
