"""Labels after every event: the same embeddings as snapshots give, nothing held out is read, and exact losses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.model import DAY, START, LogParts, SourceRows, planted_log, tiny_model, write_log
from torch.nn import functional as F

from alure.engine.config import TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import EventBatch, Events, EventSequence
from alure.engine.model import AlureModel, EventSchema, UserModel
from alure.engine.model.checkpoint import TENSORS
from alure.engine.training import train
from alure.engine.training.every_event import embedding_times, label_rows
from alure.engine.training.full_ranking import LeaveOneOut, held_out_ranks, rank_truth
from alure.engine.training.losses import CandidateItems, RowSoftmax, sampled_softmax, view_loss
from alure.engine.training.metrics import hit_rate_and_ndcg
from alure.engine.training.sampling import Sampler
from alure.engine.training.targets import AdEvents, find_targets, first_times

CAUSAL: dict[str, Any] = {"causal": True, "encoders": ["frequency", "gap", "cyclic"]}
NEXT: dict[str, Any] = {"labels": "next_event", "held_out": "last_event", "batch_users": 16, "negatives": 64}


def one_source(folder: Path, items: np.ndarray | None = None, users: int = 24, events: int = 10) -> Events:
    """Users who walk through 12 items in a circle, from a place and at times of their own."""
    generator = np.random.default_rng(0)
    user = np.repeat(np.arange(users), events)
    walk = (generator.integers(0, 12, users)[:, None] + np.arange(events)).ravel() % 12
    gaps = generator.integers(1, 2 * DAY, (users, events))
    rows = SourceRows(user, START + gaps.cumsum(1).ravel(), walk if items is None else items)
    return write_log(folder, LogParts(num_users=users, num_items=12, sources={"visit": rows}))


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return one_source(tmp_path_factory.mktemp("every") / "events")


@pytest.mark.parametrize("changes", [{}, {"time_bias": False}, {"window": 3}, {"compression": "interaction"}], ids=str)
def test_the_embedding_after_an_event_is_that_of_a_snapshot_then(events: Events, changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = UserModel(tiny_model(**CAUSAL, **changes), EventSchema.of(events.manifest)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "bias" in name or "gate" in name or not parameter.any():
            parameter.copy_(torch.randn_like(parameter))
    catalog = model.catalog(events)
    batch = events.batch(range(5), events.manifest.last_timestamp)
    sequence = batch.sequences["visit"]
    times = embedding_times(sequence)
    found = model.encode_events(batch, catalog, times)
    for user in range(5):
        for row in range(int(sequence.offsets[user]), int(sequence.offsets[user + 1])):
            alone = model(events.batch([user], int(times[row])), catalog)[0]
            torch.testing.assert_close(found[row], alone, atol=2e-5, rtol=1e-4)


def test_an_embedding_lies_between_its_event_and_the_next(events: Events) -> None:
    sequence = events.batch(range(24), events.manifest.last_timestamp).sequences["visit"]
    times = embedding_times(sequence)
    assert (times >= sequence.timestamps).all()
    assert (
        (times[:-1] < sequence.timestamps[1:])
        .logical_or(times[:-1] == sequence.timestamps[:-1])[sequence.timestamps[1:] > sequence.timestamps[:-1]]
        .all()
    )
    assert (times == sequence.timestamps).float().mean() > 0.3
    assert (times > sequence.timestamps).any()
    for end in sequence.offsets[1:] - 1:
        assert times[end] == sequence.timestamps[end]  # the last event's is its own


def jagged(histories: list[list[int]]) -> EventSequence:
    """Events at these times, one list a user."""
    times = torch.tensor([t for history in histories for t in sorted(history)], dtype=torch.int64)
    offsets = torch.tensor([0, *np.cumsum([len(h) for h in histories])], dtype=torch.int64)
    nothing = torch.zeros_like(times)
    return EventSequence(
        offsets=offsets,
        timestamps=times,
        items=torch.arange(len(times)),
        accounts=nothing,
        categories=nothing,
        event_types=nothing,
        values=nothing.float(),
        counts=nothing + 1,
    )


@given(st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=5), st.integers(1, 12))
@settings(max_examples=150)
def test_labels_are_those_of_a_loop(histories: list[list[int]], horizon: int) -> None:
    sequence = jagged(histories)
    following = label_rows(sequence, sequence.timestamps, None)
    drawn = label_rows(sequence, sequence.timestamps, horizon)
    for user in range(len(histories)):
        begin, end = int(sequence.offsets[user]), int(sequence.offsets[user + 1])
        for row in range(begin, end):
            assert following[row] == (row + 1 if row + 1 < end else -1)
            inside = [j for j in range(row + 1, end) if sequence.timestamps[j] <= sequence.timestamps[row] + horizon]
            assert int(drawn[row]) in inside if inside else int(drawn[row]) == -1


@given(st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=5))
@settings(max_examples=50)
def test_halves_share_nothing_and_lose_nothing(histories: list[list[int]]) -> None:
    sequence = jagged(histories)
    batch = EventBatch(torch.arange(len(histories)), torch.full((len(histories),), 99), {"s": sequence})
    older, newer = batch.halves()
    older.check_integrity()
    newer.check_integrity()
    for user in range(len(histories)):
        first, second, whole = (
            s.items[s.offsets[user] : s.offsets[user + 1]].tolist()
            for s in (older.sequences["s"], newer.sequences["s"], sequence)
        )
        assert first + second == whole
        assert len(second) - len(first) in (0, 1)


@pytest.mark.parametrize("rows", [1, RowSoftmax.BLOCK + 3])
def test_row_softmax_is_the_softmax(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    users, ads = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (rows, 9))
    correction = torch.randn(9, dtype=torch.float64, generator=generator)
    own = torch.randint(-1, 9, (rows,), generator=generator)  # −1: the positive is no candidate
    other = torch.randn(rows, dtype=torch.float64, generator=generator)
    inputs = [x.requires_grad_(True) for x in (users, ads, other)]

    def positives() -> torch.Tensor:
        return torch.where(own >= 0, (users * ads[own]).sum(1), other)

    def naive() -> torch.Tensor:
        logits = users @ ads.T + correction
        logits = logits.masked_fill(F.one_hot(own + 1, 10)[:, 1:].bool(), -math.inf)
        return (torch.cat([positives()[:, None], logits], 1).logsumexp(1) - positives()).mean()

    loss = RowSoftmax.apply(users, ads, correction, positives(), own, torch.float64)
    expected = naive()
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want)


def test_row_softmax_with_every_item_is_cross_entropy() -> None:
    users, ads = torch.randn(40, 6), torch.randn(11, 6)
    own = torch.randint(0, 11, (40,))
    inputs = (users, ads, torch.zeros(11), (users * ads[own]).sum(1), own)
    loss = RowSoftmax.apply(*inputs, torch.float32)
    torch.testing.assert_close(loss, F.cross_entropy(users @ ads.T, own))
    low = RowSoftmax.apply(*inputs, torch.bfloat16)
    assert low.dtype == torch.float32
    assert abs(float(low - loss)) < 0.02


@pytest.mark.parametrize(("log_q", "ratio"), [("negatives", 1.0), ("tfrs", 0.126)])
def test_a_rare_positive_gets_its_gradient_from_log_q_on_the_negatives_alone(log_q: str, ratio: float) -> None:
    """2,000 items of Zipf frequency, 512 in-batch negatives, P(positive) = 0.3: its gradient is −0.7."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2_000, generator=generator, dtype=torch.float64)
    q = 1.0 / torch.arange(1, 2_001, dtype=torch.float64)
    q /= q.sum()
    positive = 1_500  # Q = 8e-5
    z[positive] = torch.cat([z[:positive], z[positive + 1 :]]).logsumexp(0) + math.log(0.3 / 0.7)
    gradients = []
    for _ in range(400):
        drawn = torch.multinomial(q, 512, replacement=True, generator=generator)
        items, counts = torch.cat([drawn, torch.tensor([positive])]).unique(return_counts=True)
        counts[items == positive] -= 1  # the positive is there by itself, not as a draw
        logits = z[items][None].clone().requires_grad_(True)
        candidates = CandidateItems(items, counts.clamp_min(1).to(z.dtype), 512 * q[items])
        here = (items == positive).nonzero()[0]
        sampled_softmax(logits, candidates, torch.zeros(1, dtype=torch.int64), here, log_q).backward()
        assert logits.grad is not None
        gradients.append(float(logits.grad[0, here]))
    assert np.mean(gradients) / -0.7 == pytest.approx(ratio, abs=0.05)


def test_views_of_one_user_find_each_other() -> None:
    views = torch.eye(8, 10)
    assert float(view_loss(views, views, 0.01)) < 1e-3
    assert float(view_loss(views, views.roll(1, 0), 0.01)) > 10


def test_next_events_are_learned(events: Events, tmp_path: Path) -> None:
    config = TrainingConfig(**NEXT, steps=120, learning_rate=1e-2)
    report = train(events, tiny_model(**CAUSAL), config, tmp_path / "model", seed=0)
    assert report.validation is not None
    assert report.validation["users"] == 24
    assert report.validation["hit_rate"]["10"]["value"] > 0.9
    assert report.curve[-1]["loss"] < 0.5 * report.curve[0]["loss"]


@pytest.mark.parametrize(
    "changes", [{"negatives": 5, "in_batch_negatives": 8}, {"labels": "dense_all_action"}], ids=str
)
def test_sampled_negatives_and_labels_of_a_horizon_learn_too(
    events: Events, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = TrainingConfig(**{**NEXT, "steps": 60, "learning_rate": 1e-2, "label_horizon": DAY, **changes})
    report = train(events, tiny_model(**CAUSAL), config, tmp_path / "model", seed=0)
    assert report.curve[-1]["loss"] < 0.9 * report.curve[0]["loss"]


def test_what_is_held_out_is_not_read(events: Events, tmp_path: Path) -> None:
    items = np.array(events.source("visit").item).reshape(24, 10).copy()
    items[:, -1] = (items[:, -1] + 5) % 12  # every last event becomes another one
    changed = one_source(tmp_path / "changed", items.ravel())
    config = TrainingConfig(**NEXT, steps=4)
    for name, log in (("as_it_was", events), ("changed", changed)):
        train(log, tiny_model(**CAUSAL), config, tmp_path / name, seed=0)
    assert (tmp_path / "as_it_was" / TENSORS).read_bytes() == (tmp_path / "changed" / TENSORS).read_bytes()


def test_ranks_are_those_of_a_loop(events: Events) -> None:
    torch.manual_seed(3)
    model = AlureModel(tiny_model(**CAUSAL), EventSchema.of(events.manifest)).eval().requires_grad_(False)
    catalog = model.user.catalog(events)
    last = events.manifest.last_timestamp
    asked = LeaveOneOut(events, last, None, seed=0)
    found = asked.measure(model, catalog)
    ranks = []
    for user in range(24):
        batch = events.batch([user], last, None, 1)
        batch = replace(batch, as_of=batch.sequences["visit"].timestamps[-1:])
        embedding = model(batch, catalog).embeddings[0].flatten()
        scores = model.embed_ads(torch.arange(12), catalog).flatten(1) @ embedding
        own = int(events.source("visit").item[(user + 1) * 10 - 1])
        seen = set(batch.sequences["visit"].items.tolist())
        ranks.append(sum(scores[i] >= scores[own] for i in range(12) if i != own and i not in seen))
    expected = hit_rate_and_ndcg(np.array(ranks), [10, 50], 0)
    assert found["hit_rate"] == expected["hit_rate"]
    assert found["ndcg"] == expected["ndcg"]
    assert expected["ndcg"]["10"]["value"] == pytest.approx(
        np.mean([1 / math.log2(r + 2) if r < 10 else 0.0 for r in ranks])
    )


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_model_that_tells_nothing_apart_ranks_last(events: Events, value: float) -> None:
    model = AlureModel(tiny_model(**CAUSAL), EventSchema.of(events.manifest)).eval().requires_grad_(False)
    for parameter in model.user.compression.parameters():
        parameter.fill_(value)
    long = LeaveOneOut(events, events.manifest.last_timestamp, None, seed=0)
    found = held_out_ranks(
        model,
        events,
        model.user.catalog(events),
        long.users,
        long.items,
        as_of=long.as_of,
        max_events=5,
        without_newest=1,
    )
    seen = [len(set(events.source("visit").item[u * 10 : u * 10 + 9]) | {i}) for u, i in zip(long.users, long.items)]
    assert (found >= 12 - np.array(seen)).all()


def test_a_checkpoint_ranks_a_truth(events: Events, tmp_path: Path) -> None:
    train(events, tiny_model(**CAUSAL), TrainingConfig(**NEXT, steps=2), tmp_path / "model", seed=0)
    truth = tmp_path / "truth.parquet"
    pq.write_table(pa.table({"user_id": [0, 1, 2, 999], "item_id": [1, 2, 77, 3]}), truth)
    found = rank_truth(tmp_path / "model", events, truth, [1, 12], max_events=None)
    assert (found.users, found.unknown_items, found.items) == (3, 1, 12)
    assert found.hit_rate["12"]["value"] == pytest.approx(2 / 3)
    for table, message in (
        ({"user_id": [0]}, "expected a column item_id, got user_id"),
        ({"user_id": ["0"], "item_id": [1]}, "column user_id: expected ids of type int64 as the users of the log"),
    ):
        pq.write_table(pa.table(table), truth)
        with pytest.raises(InputError, match=message):
            rank_truth(tmp_path / "model", events, truth, [1], max_events=None)
    truth.write_text("user_id,item_id")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        rank_truth(tmp_path / "model", events, truth, [1], max_events=None)
    with pytest.raises(InputError, match="does not exist"):
        rank_truth(tmp_path / "model", events, tmp_path / "none.parquet", [1], max_events=None)


def test_models_and_logs_that_do_not_fit_are_named(events: Events, tmp_path: Path) -> None:
    config = TrainingConfig(**NEXT, steps=1)
    with pytest.raises(InputError, match=r"model.causal.*\n.*position, age"):
        train(events, tiny_model(), config, tmp_path / "model")
    with pytest.raises(InputError, match="expected one source, got view, click"):
        train(planted_log(tmp_path / "two"), tiny_model(**CAUSAL), config, tmp_path / "model")
    with pytest.raises(ValidationError, match="last_event needs labels"):
        TrainingConfig(held_out="last_event")


def test_the_user_user_loss_is_part_of_a_training(tmp_path: Path) -> None:
    log = planted_log(tmp_path / "events", num_users=40)
    config = TrainingConfig(steps=20, batch_users=16, negatives=8, view_weight=1.0)
    report = train(log, tiny_model(), config, tmp_path / "model", seed=0)
    assert report.curve[-1]["views"] < report.curve[0]["views"]


def test_windows_of_long_histories_move_and_never_hold_what_is_held_out(tmp_path: Path) -> None:
    events = one_source(tmp_path / "events", users=40, events=30)
    drawn: dict[str, list[int]] = {}
    for windows in ("newest", "random"):
        config = TrainingConfig.model_validate(NEXT | {"max_events": 8, "windows": windows, "batch_users": 40})
        until = events.manifest.last_timestamp
        ads = AdEvents.read(events, until)
        sampler = Sampler(find_targets(ads, config), [], first_times(events), config, until, seed=0)
        drawn[windows] = []
        for _ in range(20):
            sample = sampler.draw()
            batch = events.batch(sample.users, sample.as_of, config.max_events, sample.without_newest)
            sequence = batch.sequences["visit"]
            assert (sequence.lengths <= 8).all()
            history = events.engagements(events.manifest.last_timestamp, ["visit"])
            newest = torch.from_numpy(history.timestamps[history.offsets[sample.users + 1] - 2])
            last = sequence.timestamps[sequence.offsets[1:] - 1]
            assert (last <= newest).all()  # the user's last event is held out
            drawn[windows] += (newest - last).tolist()
    assert set(drawn["newest"]) == {0}
    share = np.mean(np.array(drawn["random"]) > 0)
    assert 0.4 < share < 0.55  # half of the visits, less those that draw the end
