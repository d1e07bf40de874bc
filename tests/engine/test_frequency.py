"""Q learned from the stream of positives, beside the true one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model import planted_log

from alure.engine.config import TrainingConfig
from alure.engine.training.frequency import StreamingFrequency
from alure.engine.training.sampling import Sampler
from alure.engine.training.targets import AdEvents, find_targets, first_times

ITEMS = 500
Q = 1.0 / np.arange(1, ITEMS + 1)
Q /= Q.sum()


def feed(estimate: StreamingFrequency, q: np.ndarray, draws: int, seed: int = 0, batch: int = 400) -> None:
    drawn = np.random.default_rng(seed).choice(len(q), draws, p=q)
    for begin in range(0, draws, batch):
        estimate.add(drawn[begin : begin + batch])


def test_it_converges_for_frequent_and_rare_items() -> None:
    """Zipf's law: from 15 % to 0.03 % of the draws, the first item 60 times in a batch."""
    estimate = StreamingFrequency(ITEMS)
    feed(estimate, Q, 100_000)
    error = np.abs(np.log(estimate(np.arange(ITEMS)) / Q))
    assert error[:20].max() < 0.4  # a moving mean over about 1 / RATE = 50 gaps: a deviation of 10 %
    assert error[:20].mean() < 0.12
    assert error[250:].mean() < 0.25  # drawn 30 to 60 times
    assert error[250:].max() < 1.0


def test_it_follows_a_change() -> None:
    estimate = StreamingFrequency(ITEMS)
    feed(estimate, Q, 30_000)
    feed(estimate, Q[::-1], 60_000, seed=1)
    error = np.abs(np.log(estimate(np.arange(ITEMS)) / Q[::-1]))
    assert error[-20:].max() < 0.4
    assert estimate(np.array([0])) < Q[0] / 20  # the gaps that were short are forgotten at the pace of the new ones


@given(
    draws=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12),
    buckets=st.integers(1, 40),
)
@settings(max_examples=50)
def test_batches_are_the_paper_s_updates_one_draw_after_another(draws: list[list[int]], buckets: int) -> None:
    whole, single = StreamingFrequency(10, buckets), StreamingFrequency(10, buckets)
    for batch in draws:
        whole.add(np.array(batch, np.int64))
        for item in batch:
            single.add(np.array([item]))
    items = np.arange(10)
    np.testing.assert_array_equal(whole(items), single(items))

    last, gap, hits = np.zeros(3 * buckets), np.full(3 * buckets, 10.0), np.zeros(3 * buckets)
    for step, item in enumerate((item for batch in draws for item in batch), 1):
        for bucket in whole.buckets(np.array([item]))[:, 0]:
            hits[bucket] += 1
            rate = max(whole.rate, 1 / (hits[bucket] + 1))
            gap[bucket] = (1 - rate) * gap[bucket] + rate * (step - last[bucket])
            last[bucket] = step
    np.testing.assert_allclose(whole.gap, gap)
    np.testing.assert_allclose(whole(items), 1 / gap[whole.buckets(items)].max(0))


def test_items_that_share_a_bucket_keep_their_longest_gap() -> None:
    """Half as many buckets as items: one table would take rare items for frequent ones."""
    estimate = StreamingFrequency(ITEMS, buckets=ITEMS // 2)
    feed(estimate, Q, 60_000)
    items = np.arange(ITEMS)
    one = 1.0 / estimate.gap[estimate.buckets(items)[0]]
    error, error_of_one = (np.log(q / Q)[100:].mean() for q in (estimate(items), one))
    assert error_of_one > 0.9
    assert error < error_of_one / 2


def test_an_item_that_never_came_has_the_uniform_probability() -> None:
    estimate = StreamingFrequency(ITEMS)
    np.testing.assert_array_equal(estimate(np.arange(ITEMS)), np.full(ITEMS, 1 / ITEMS))
    estimate.add(np.empty(0, np.int64))
    assert estimate(np.empty(0, np.int64)).shape == (0,)


def test_the_sampler_learns_how_often_its_positives_come(tmp_path: Path) -> None:
    """Users of several positives a sample: of them the streaming Q is right, the exact one is of a single target."""
    events = planted_log(tmp_path, num_users=60)
    config = TrainingConfig(batch_users=48, negatives=20, exposures=0, item_probability="streaming")
    ads = AdEvents.read(events, events.manifest.last_timestamp)
    sampler = Sampler(
        find_targets(ads, config), [], first_times(events), config, events.manifest.last_timestamp, seed=0
    )
    drawn = np.concatenate([sampler.draw().positives.items for _ in range(300)])
    true = np.bincount(drawn, minlength=60) / len(drawn)
    items = np.flatnonzero(true > 1e-3)
    expected = sampler.expected_draws(items, 100, 20)
    estimated = (expected - 20 / len(sampler.universe)) / 100
    assert np.abs(np.log(estimated / true[items])).mean() < 0.12
    assert estimated.sum() == pytest.approx(1, abs=0.1)
    state = sampler.state()
    again = Sampler(sampler.targets, [], sampler.first_times, config, sampler.until, seed=1)
    again.load_state(*state)
    for one, other in ((sampler.draw(), again.draw()) for _ in range(3)):
        np.testing.assert_array_equal(one.positives.items, other.positives.items)
    np.testing.assert_array_equal(sampler.expected_draws(items, 9, 9), again.expected_draws(items, 9, 9))
