"""An ad tower of accounts: model.ad_level."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.model import DAY, START, LogParts, SourceRows, tiny_model, write_log

from alure.engine.config import Config, TrainingConfig
from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.model import AlureModel
from alure.engine.training import train
from alure.engine.training.full_ranking import rank_truth
from alure.engine.training.sampling import Sampler
from alure.engine.training.targets import AdEvents, find_targets, first_times

ITEMS, ACCOUNTS, GROUPS = 120, 24, 4
EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = {"steps": 25, "batch_users": 48, "negatives": 12, "max_events": 8, "threads": 1}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    """Users click on accounts of their group, any of an account's five items; the last item has no account."""
    generator = np.random.default_rng(0)
    user = np.repeat(np.arange(150), 10)
    group = np.repeat(generator.integers(0, GROUPS, 150), 10)
    account = group + GROUPS * generator.integers(0, ACCOUNTS // GROUPS, len(user))
    item = account + ACCOUNTS * generator.integers(0, ITEMS // ACCOUNTS, len(user))
    item[generator.random(len(user)) < 0.05] = ITEMS
    rows = SourceRows(user, START + generator.integers(0, 30 * DAY, len(user)), item)
    parts = LogParts(
        150, ITEMS + 1, {"click": rows},
        item_accounts=np.append(np.arange(ITEMS) % ACCOUNTS, -1),
        item_categories=np.arange(ITEMS + 1) % 7,
        dense=generator.standard_normal((ITEMS + 1, 3)).astype(np.float32),
    )  # fmt: skip
    return write_log(tmp_path_factory.mktemp("accounts") / "events", parts)


def sampler_of(ads: AdEvents, events: Events) -> Sampler:
    config = TrainingConfig(batch_users=60, negatives=40, exposures=0)
    return Sampler(find_targets(ads, config), [], first_times(events), config, events.manifest.last_timestamp, seed=0)


def test_every_item_is_the_first_of_its_account(events: Events) -> None:
    history = AdEvents.read(events, events.manifest.last_timestamp)
    ads = history.of_accounts(events.items.accounts)
    kept = history.items < ITEMS
    assert 0 < (~kept).sum() < 200
    np.testing.assert_array_equal(ads.items, history.items[kept] % ACCOUNTS)
    np.testing.assert_array_equal(ads.users, history.users[kept])
    np.testing.assert_array_equal(ads.timestamps, history.timestamps[kept])
    np.testing.assert_array_equal(ads.event_types, history.event_types[kept])


def test_samples_count_by_account(events: Events) -> None:
    """Which of an account's items was clicked changes no sample; nobody has an account twice among the positives."""
    history = AdEvents.read(events, events.manifest.last_timestamp)
    items = history.items.copy()
    moved = items < ITEMS
    items[moved] = (items[moved] + ACCOUNTS) % ITEMS
    one, other = (
        sampler_of(ads.of_accounts(events.items.accounts), events) for ads in (history, replace(history, items=items))
    )
    np.testing.assert_array_equal(one.universe, np.arange(ACCOUNTS))
    assert one.probability.sum() == pytest.approx(1)
    several = 0
    for _ in range(5):
        a, b = one.draw(), other.draw()
        for name in ("rows", "items"):
            np.testing.assert_array_equal(getattr(a.positives, name), getattr(b.positives, name))
        np.testing.assert_array_equal(a.negatives, b.negatives)
        pairs = a.positives.rows * ACCOUNTS + a.positives.items
        assert len(np.unique(pairs)) == len(pairs)
        several += len(pairs) - len(np.unique(a.positives.rows))
    assert several > 100


def test_it_learns_which_accounts_a_user_is_for(events: Events, tmp_path: Path) -> None:
    model = tiny_model(ad_level="account")
    report = train(events, model, TrainingConfig.model_validate(QUICK), tmp_path / "model")
    assert report.validation is not None
    found = report.validation["retrieval"]
    assert (found["level"], found["items"]) == ("account", ACCOUNTS)
    assert found["recall"]["10"] > 1.4 * found["popularity_recall"]["10"]

    loaded = AlureModel.load(tmp_path / "model")
    ads = loaded.embed_ads(torch.arange(ITEMS + 1), loaded.user.catalog(events))
    for number in range(1, ITEMS // ACCOUNTS):
        assert torch.equal(ads[:ACCOUNTS], ads[number * ACCOUNTS : (number + 1) * ACCOUNTS])
    assert len(torch.unique(ads[: ITEMS + 1], dim=0)) == ACCOUNTS + 1  # those of no account have one too
    truth = tmp_path / "truth.parquet"
    pq.write_table(pa.table({"user_id": [0], "item_id": [0]}), truth)
    with pytest.raises(InputError, match="retrieves accounts"):
        rank_truth(tmp_path / "model", events, truth, [10], max_events=None)


def test_what_needs_items_or_accounts(events: Events, tmp_path: Path) -> None:
    users = np.repeat(np.arange(9), 4)
    rows = SourceRows(users, START + np.arange(36) * 60, np.arange(36) % 5)
    without = write_log(tmp_path / "events", LogParts(9, 5, {"click": rows}))
    model, config = tiny_model(ad_level="account"), TrainingConfig.model_validate(QUICK)
    with pytest.raises(InputError, match=r"model\.ad_level: account needs items with accounts"):
        train(without, model, config, tmp_path / "model")
    with pytest.raises(InputError, match="next_event has items as labels"):
        train(events, model, config.model_copy(update={"labels": "next_event"}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_configurations(path: Path) -> None:
    assert Config.load(path).events.inputs
    assert Config.load(str(path), data=str(path.parent)).events.inputs[0].is_relative_to(path.parent)
