"""Sources that hear one another between layers: model.exchange."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.model import DAY, START, LogParts, SourceRows, planted_log, tiny_model, write_log
from torch import Tensor
from torch.nn import functional as F

from alure.engine.config import ModelConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import EventSchema, UserModel
from alure.engine.model.layers import Exchange, summarize
from alure.engine.model.schema import module_plan
from alure.engine.training import train


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("exchange") / "events", num_users=40)


def make(events: Events, **changes: object) -> UserModel:
    torch.manual_seed(0)
    return UserModel(tiny_model(**changes), EventSchema.of(events.manifest))


def test_before_it_has_learned_it_moves_no_bit(events: Events) -> None:
    batch = events.batch(range(20), events.manifest.last_timestamp)
    with torch.no_grad():
        plain, exchanging = (
            model(batch, model.catalog(events)) for model in (make(events, exchange=False), make(events, exchange=True))
        )
    assert torch.equal(plain, exchanging)


def test_every_source_hears_every_other_and_not_itself(tmp_path: Path) -> None:
    """The map by hand; then in a model of three sources each weight by the source it lets through."""
    generator = torch.Generator().manual_seed(0)
    exchange = Exchange(tiny_model(), 3)
    weight = torch.randn(16, 48, generator=generator)
    with torch.no_grad():
        exchange.weight.copy_(weight)
    offsets = torch.tensor([0, 2, 3, 7])
    x, summaries = torch.randn(7, 16, generator=generator), torch.randn(3, 3, 16, generator=generator)
    found = exchange(x, offsets, summaries)
    for user in range(3):
        heard = sum(weight[:, 16 * k : 16 * k + 16] @ summaries[user, k] for k in range(3))
        torch.testing.assert_close(
            found[offsets[user] : offsets[user + 1]], x[offsets[user] : offsets[user + 1]] + heard
        )

    users, item = np.arange(4), np.arange(4)
    log = {name: SourceRows(users, np.full(4, START), item) for name in ("a", "b", "c")}
    events = write_log(tmp_path, LogParts(4, 4, log))
    model = make(events, exchange=True).requires_grad_(False)
    catalog, batch = model.catalog(events), events.batch(range(4), START)

    def last_tokens(name: str, changed: str) -> tuple[Tensor, Tensor]:
        other = batch.sequences[changed]
        moved = {**batch.sequences, changed: replace(other, items=other.items.flip(0))}
        batches = (model.prepare(replace(batch, sequences=s), catalog) for s in (batch.sequences, moved))
        return tuple(model._run(prepared, catalog)[name].tokens for prepared in batches)  # type: ignore[return-value]

    for stack in model.sources():
        assert stack.others == [name for name in ("a", "b", "c") if name != stack.source]
        for heard in stack.others:
            before, after = last_tokens(stack.source, heard)
            assert torch.equal(before, after)  # weights of zero
            column = 16 * stack.others.index(heard)
            stack.exchanges[0].weight[:, column : column + 16] = torch.randn(16, 16)
            before, after = last_tokens(stack.source, heard)
            assert not torch.allclose(before, after, atol=1e-3)
            stack.exchanges[0].weight.zero_()


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    exchange = Exchange(ModelConfig(width=8, heads=1), 2).double()
    offsets = torch.tensor([0, 1, 4, 6])
    x, y, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 8), (6, 8), (8, 16))
    )

    def told(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        summaries = torch.stack([summarize(y, offsets), summarize(x * y, offsets)], dim=1)
        return torch.func.functional_call(exchange, {"weight": weight}, (x, offsets, summaries))

    assert torch.autograd.gradcheck(told, (x, y, weight))


def test_only_an_exchange_can_tell_what_an_event_means(tmp_path: Path) -> None:
    """A user's topic decides whether its act is for or against: read from the tokens of the acts alone."""
    generator = np.random.default_rng(0)
    topic, act = generator.integers(0, 10, 300), generator.integers(10, 20, 300)
    users, time = np.arange(300), START + generator.integers(0, DAY, 300)
    rows = {"topic": SourceRows(users, time, topic), "act": SourceRows(users, time + 60, act)}
    events = write_log(tmp_path, LogParts(300, 20, rows))
    label = torch.from_numpy((topic + act) % 2).float()

    def accuracy(exchange: bool) -> float:
        model = make(events, exchange=exchange)
        catalog, readout = model.catalog(events), torch.nn.Linear(2 * 16, 1)
        optimizer = torch.optim.Adam(
            [*(p for p in model.parameters() if p is not model.table), *readout.parameters()], 0.01
        )

        def logits(users: range) -> Tensor:
            batch = events.batch(users, START + 2 * DAY)
            return readout(model._run(model.prepare(batch, catalog), catalog)["act"].pooled[-1].flatten(1)).squeeze(1)

        for _ in range(25):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits(range(200)), label[:200]).backward()
            optimizer.step()
        with torch.no_grad():
            return float(((logits(range(200, 300)) > 0) == (label[200:] > 0.5)).float().mean())

    assert accuracy(exchange=False) < 0.65
    assert accuracy(exchange=True) > 0.9


def test_a_model_that_exchanges_is_trained_saved_and_read(events: Events, tmp_path: Path) -> None:
    config = TrainingConfig(steps=4, batch_users=24, negatives=16, max_events=8, threads=1, precision="bfloat16")
    train(events, tiny_model(exchange=True), config, tmp_path)
    model = UserModel.load(tmp_path)
    assert model.config.exchange
    weights = [stack.exchanges[0].weight for stack in model.sources()]
    assert [tuple(weight.shape) for weight in weights] == [(16, 16)] * 2
    assert all(weight.any() for weight in weights)
    batch, catalog = events.batch(range(9), events.manifest.last_timestamp), model.catalog(events)
    single = model(batch, catalog)
    torch.testing.assert_close(model.to(torch.bfloat16)(batch, catalog).float(), single, atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"layers": 1}, "view to layer 1, click to layer 1"),
        ({"taps": [(2, "view")]}, "view to layer 2"),
    ],
)
def test_an_exchange_without_anything_to_exchange(events: Events, changes: dict, got: str) -> None:
    with pytest.raises(InputError, match=rf"model.exchange: expected two sources and two layers .*; got {got}"):
        module_plan(tiny_model(exchange=True, **changes), EventSchema.of(events.manifest))


def test_a_causal_model_cannot_exchange() -> None:
    with pytest.raises(ValueError, match="later events in it; set causal to false"):
        tiny_model(exchange=True, causal=True)
