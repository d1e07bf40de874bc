"""Targets, labels and samples: against brute force, and nothing from the future."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model import DAY, START, LogParts, SourceRows, planted_log, write_log

from alure.engine.config import TaskConfig, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.training.sampling import POSITIVES, Sampler, ranges
from alure.engine.training.targets import (
    NEVER,
    AdEvents,
    Timeline,
    delays,
    find_exposures,
    find_targets,
    first_times,
)

EVENT = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 12))  # user, item, time


def columns(events: list[tuple[int, int, int]]) -> list[np.ndarray]:
    return [np.array([event[i] for event in events], np.int64) for i in range(3)]


@given(st.lists(EVENT, max_size=12), st.lists(EVENT, max_size=12))
@settings(max_examples=200)
def test_delays_are_those_of_a_loop(shown: list, positive: list) -> None:
    found = delays(columns(shown), columns(positive), num_items=4)
    for (user, item, time), delay in zip(shown, found, strict=True):
        after = [t - time for u, i, t in positive if (u, i) == (user, item) and t >= time]
        assert delay == min(after, default=NEVER)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 9)), max_size=15), st.integers(-9, 13))
@settings(max_examples=200)
def test_timeline_finds_what_a_loop_finds(events: list, asked: int) -> None:
    events = sorted(events)
    users, times = columns([(u, 0, t) for u, t in events])[::2]
    line = Timeline.of(5, users, np.zeros(len(users), np.int64), times)
    found = line.up_to(np.arange(5), np.full(5, asked))
    for user in range(5):
        inside = sum(u < user or (u == user and t <= asked) for u, t in events)
        assert found[user] == inside
    assert line.offsets.tolist() == [sum(u < user for u, _ in events) for user in range(6)]


def test_delays_keep_apart_pairs_whose_keys_adjoin() -> None:
    """The positive of the next (user, item) pair must not serve the one before it."""
    shown = columns([(0, 0, 10), (0, 1, 10)])
    assert delays(shown, columns([(0, 1, 10), (0, 1, 0), (0, 0, 0)]), 2).tolist() == [NEVER, 0]


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.array([], np.int64), np.array([], np.int64)).tolist() == []


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("targets") / "events", num_users=60)


def make_sampler(events: Events, until: int, seed: int = 0, **changes: object) -> Sampler:
    config = TrainingConfig.model_validate({"batch_users": 32, "negatives": 16, "label_horizon": 3 * DAY, **changes})
    ads = AdEvents.read(events, events.manifest.last_timestamp)
    return Sampler(find_targets(ads, config), find_exposures(ads, config), first_times(events), config, until, seed)


def truth(events: Events, source: str) -> set[tuple[int, int, int]]:
    c = events.source(source)
    users = np.repeat(np.arange(events.num_users), np.diff(c.offsets))
    return set(zip(users.tolist(), np.array(c.item).tolist(), np.array(c.timestamp).tolist()))


def test_samples_obey_time(events: Events) -> None:
    until = START + 20 * DAY
    sampler = make_sampler(events, until)
    clicks, views = truth(events, "click"), truth(events, "view")
    first = first_times(events)
    for _ in range(20):
        sample = sampler.draw()
        assert (sample.as_of >= first[sample.users]).all()  # there is something to read
        assert (sample.as_of < until).all()
        assert set(sample.positives.rows.tolist()) == set(range(32))  # everybody has a positive
        counts = np.bincount(sample.positives.rows)
        assert counts.max() <= POSITIVES
        pairs = list(zip(sample.positives.rows.tolist(), sample.positives.items.tolist()))
        assert len(set(pairs)) == len(pairs)
        for row, item in pairs:
            t = int(sample.as_of[row])
            later = [c[2] for c in clicks if c[:2] == (sample.users[row], item)]
            assert any(t < time <= min(t + 3 * DAY, until) for time in later)
        (shown,) = sample.shown
        assert len(shown.rows)
        for row, item, time, label in zip(*(column.tolist() for column in vars(shown).values())):
            user, t = int(sample.users[row]), int(sample.as_of[row])
            assert t < time <= t + 3 * DAY
            assert time + DAY <= until  # its label is known at the end of the training time
            assert (user, item, time) in views
            assert label == any(c[:2] == (user, item) and time <= c[2] <= time + DAY for c in clicks)


def test_an_event_of_the_targets_own_second_is_not_input(tmp_path: Path) -> None:
    """A source that says which ad is clicked, in the same second: reading it would be a leak."""
    users, items = np.repeat(np.arange(30), 3), np.tile([0, 1, 2], 30)
    time = START + np.tile([0, DAY, 2 * DAY], 30)
    rows = {name: SourceRows(users, time, items) for name in ("leak", "click")}
    events = write_log(tmp_path, LogParts(30, 3, rows))
    sampler = make_sampler(events, events.manifest.last_timestamp, label_horizon=100)
    for _ in range(10):
        sample = sampler.draw()
        batch = events.batch(sample.users, sample.as_of)
        for row, item in zip(sample.positives.rows, sample.positives.items):
            for sequence in batch.sequences.values():
                seen = sequence.items[sequence.offsets[row] : sequence.offsets[row + 1]]
                assert item != 0  # the first click has nothing before it, so it is no target
                assert seen.tolist() == list(range(item))


def test_users_without_a_usable_target_are_left_out(tmp_path: Path) -> None:
    """User 0 clicks once, user 1 twice in one second, user 2 twice, user 3 first after the end; 4 has no event."""
    users = np.array([0, 1, 1, 2, 2, 3, 3])
    time = START + np.array([0, 5, 5, 5, 6, 900, 950])
    events = write_log(tmp_path, LogParts(5, 7, {"click": SourceRows(users, time, np.arange(7))}))
    sampler = make_sampler(events, START + 100)
    assert sampler.users.tolist() == [2]
    sample = sampler.draw()
    assert sample.users.tolist() == [2]
    assert sample.positives.items.tolist() == [4]
    with pytest.raises(InputError, match="no user has a target event with another event before it"):
        make_sampler(events, START + 5)


def test_expected_draws_are_the_frequencies_of_draws(events: Events) -> None:
    sampler = make_sampler(events, START + 25 * DAY, label_horizon=1, negatives=8)  # only targets themselves
    drawn, uniform, rounds = np.zeros(60), np.zeros(60), 300
    num_positives = 0
    for _ in range(rounds):
        sample = sampler.draw()
        drawn += np.bincount(sample.positives.items, minlength=60)
        uniform += np.bincount(sample.negatives, minlength=60)
        num_positives += len(sample.positives.items)
    items = np.unique(sampler.targets.items)
    expected = sampler.expected_draws(items, num_positives, 8 * rounds)
    found = (drawn + uniform)[items]
    assert expected.sum() == pytest.approx(found.sum(), rel=0.02)
    assert (np.abs(found - expected) < 6 * np.sqrt(expected) + 1).all()


def test_the_same_seed_draws_the_same_samples(events: Events) -> None:
    draws = [make_sampler(events, START + 20 * DAY, seed) for seed in (3, 3, 4)]
    for _ in range(3):
        a, b, c = (sampler.draw() for sampler in draws)
        assert (a.users == b.users).all()
        assert (a.as_of == b.as_of).all()
        assert (a.negatives == b.negatives).all()
        assert (a.positives.items == b.positives.items).all()
        assert (a.users != c.users).any()


def test_every_user_comes_once_a_round(events: Events) -> None:
    sampler = make_sampler(events, START + 20 * DAY, batch_users=7)
    drawn = np.concatenate([sampler.draw().users for _ in range(len(sampler.users))])
    counts = np.bincount(drawn, minlength=events.num_users)
    assert (counts[sampler.users] == 7).all()


def test_targets_and_tasks_by_event_type(events: Events) -> None:
    ads = AdEvents.read(events, events.manifest.last_timestamp)
    clicks, views = (events.manifest.source_counts[name] for name in ("click", "view"))
    assert len(find_targets(ads, TrainingConfig())) == clicks
    assert len(find_targets(ads, TrainingConfig(target_types=["view"]))) == views
    assert len(find_targets(ads, TrainingConfig(target_types=["view", "click"]))) == views + clicks
    for types in (None, ["view"], ["view", "click"]):  # as labels of the events before them
        sampler = make_sampler(events, events.manifest.last_timestamp, target_types=types)
        for name, sequence in events.batch(range(60), events.manifest.last_timestamp).sequences.items():
            assert sampler.is_target(sequence).unique().tolist() == [name in (types or ["click"])]
    (ctr,) = find_exposures(ads, TrainingConfig())
    assert (ctr.name, ctr.window, len(ctr.timeline)) == ("ctr", DAY, views)
    assert find_exposures(ads, TrainingConfig(exposures=0)) == []
    own = TrainingConfig(tasks={"again": TaskConfig(exposure=["click"], positive=["click"], window=60, weight=2)})
    (again,) = find_exposures(ads, own)
    assert again.labels(np.arange(len(again.timeline)), again.window).all()  # a click is its own positive
    with pytest.raises(InputError, match=r"training.target_types: the log has no event type buy; it has view, click"):
        find_targets(ads, TrainingConfig(target_types=["buy"]))
    with pytest.raises(InputError, match=r"training.tasks.x.positive: the log has no event type buy"):
        find_exposures(ads, TrainingConfig(tasks={"x": TaskConfig(exposure=["view"], positive=["buy"])}))


def test_a_log_without_event_types_has_targets_and_no_tasks(tmp_path: Path) -> None:
    users, time = np.repeat(np.arange(4), 3), START + np.arange(12)
    events = write_log(tmp_path, LogParts(4, 5, {"buy": SourceRows(users, time, np.arange(12) % 5)}))
    ads = AdEvents.read(events, START + 5)
    assert len(find_targets(ads, TrainingConfig())) == 6
    assert find_exposures(ads, TrainingConfig()) == []
