"""The user model: what its embeddings may depend on, and what they may not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.model import DAY, START, LogParts, SourceRows, planted_log, tiny_model, write_log

from alure.engine.config import ENCODERS
from alure.engine.errors import InputError
from alure.engine.events import EventBatch, Events
from alure.engine.model import AlureModel, EventSchema, UserModel
from alure.engine.model.catalog import hash_keys
from alure.engine.model.prepared import event_columns, plan_pooling
from alure.engine.model.schema import module_plan
from alure.engine.model.towers import Exposures, two_tower_scores
from alure.engine.model.user_model import gather_rows


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return planted_log(tmp_path_factory.mktemp("model") / "events", num_users=40)


def make(events: Events, **changes: object) -> UserModel:
    torch.manual_seed(0)
    model = UserModel(tiny_model(**changes), EventSchema.of(events.manifest)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # biases that begin at zero must count in these tests
        if not parameter.any():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        elif "time_bias" in name or "position_bias" in name:
            parameter.mul_(20)
    return model


def embed(model: UserModel, events: Events, users: np.ndarray | range, as_of: int | None = None) -> torch.Tensor:
    batch = events.batch(users, events.manifest.last_timestamp if as_of is None else as_of)
    return model(batch, model.catalog(events))


SHAPES = [
    {},
    {"causal": True},
    {"window": 3},
    {"compression": "interaction"},
    {"taps": [(1, "click"), (2, "view")]},
    {"sources": {"view": {"layers": 1, "heads": 4}, "click": {"layers": 3, "window": 2}}},
    {"bias_periods": []},
    {"exchange": True, "sources": {"view": {"layers": 1, "heads": 4}}},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_embeddings_have_length_one_and_do_not_depend_on_the_batch(events: Events, changes: dict) -> None:
    model = make(events, **changes)
    together = embed(model, events, range(20))
    assert together.shape == (20, 2, 16)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(20, 2))
    alone = torch.cat([embed(model, events, [user]) for user in range(20)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_order_of_users_does_not_matter(events: Events) -> None:
    model = make(events)
    order = np.random.default_rng(0).permutation(30)
    torch.testing.assert_close(
        embed(model, events, order), embed(model, events, range(30))[order], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("exchange", [False, True])
def test_changing_one_user_leaves_the_others_bit_identical(events: Events, exchange: bool) -> None:
    model = make(events, exchange=exchange)
    catalog = model.catalog(events)
    batch = events.batch(range(12), events.manifest.last_timestamp)
    before, changed = model(batch, catalog), 5
    sequences = {}
    for name, s in batch.sequences.items():
        rows = slice(int(s.offsets[changed]), int(s.offsets[changed + 1]))
        assert rows.stop > rows.start
        items, times, accounts = s.items.clone(), s.timestamps.clone(), s.accounts.clone()
        items[rows] = (items[rows] + 7) % events.manifest.num_items
        accounts[rows] = -1
        times[rows] -= 5 * DAY
        sequences[name] = replace(s, items=items, timestamps=times, accounts=accounts)
    after = model(EventBatch(batch.users, batch.as_of, sequences), catalog)
    others = torch.arange(12) != changed
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before[changed], after[changed], atol=1e-3)


def test_users_with_few_or_no_events(tmp_path: Path) -> None:
    """User 0 has none, user 1 one, user 2 two at one second, user 3 only in the other source."""
    user, item = np.array([1, 2, 2]), np.array([3, 4, 4])
    view = SourceRows(user, np.array([START, START + 9, START + 9]), item)
    click = SourceRows(np.array([3]), np.array([START + 5]), np.array([1]))
    events = write_log(tmp_path, LogParts(4, 5, {"view": view, "click": click}))
    for changes in ({}, {"compression": "interaction"}, {"exchange": True}):
        model = make(events, **changes)
        together = embed(model, events, range(4))
        assert torch.isfinite(together).all()
        torch.testing.assert_close(
            together, torch.cat([embed(model, events, [u]) for u in range(4)]), atol=1e-5, rtol=1e-4
        )
    assert embed(model, events, []).shape == (0, 2, 16)
    assert torch.isfinite(embed(model, events, range(4), as_of=START - 1)).all()  # nobody has any event yet


def test_a_tap_of_a_user_without_events_is_zero(events: Events) -> None:
    model = make(events)
    stack = next(model.sources())
    batch = events.batch(range(6), events.manifest.last_timestamp)
    s = batch.sequences[stack.source]
    keep = s.offsets[3]
    offsets = torch.cat([s.offsets[:4], keep.expand(3)])  # users 3 to 5 lose their events
    tokens = torch.randn(int(keep), 16)
    tap, times = stack.taps["1"], s.timestamps[:keep]
    plan = plan_pooling(stack, offsets, times, batch.as_of, every_event=False, kind=model.value_kind())
    pooled = tap(tap.context(tokens, offsets, times), plan)
    assert (pooled[3:] == 0).all()
    assert (pooled[:3].abs().sum((1, 2)) > 0).all()


SWITCHES: list[dict[str, object]] = [
    *({"encoders": [name for name in ENCODERS if name != off]} for off in ENCODERS),
    {"encoders": []},
    {"time_bias": False},
    {"position_bias": False},
    {"time_bias": False, "position_bias": False, "bias_periods": []},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_what_is_switched_off_has_no_say_and_nothing_to_learn(events: Events, switches: dict[str, object]) -> None:
    model = make(events, **switches)
    found = embed(model, events, range(4))
    assert torch.isfinite(found).all()
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    off = set(ENCODERS) - set(model.config.encoders)
    assert ("position_table" in names) == ("position" not in off)
    assert ("frequency_table" in names) == ("frequency" not in off)
    assert any("time_bias" in name for name, _ in model.named_parameters()) == model.config.time_bias
    assert any("position_bias" in name for name, _ in model.named_parameters()) == model.config.position_bias
    rows = {"age": slice(0, 1), "gap": slice(1, 2), "cyclic": slice(2, None)}
    for name, which in rows.items():
        for stack in model.sources():
            with torch.no_grad():
                stack.encoder.time_weight[which] += 1.0
        moved = embed(model, events, range(4))
        assert torch.equal(moved, found) == (name in off)
        found = moved


def test_truncating_old_history_moves_nothing_in_the_position_encoding(events: Events) -> None:
    model = make(events)
    catalog = model.catalog(events)
    stack = next(model.sources())
    tokens = []
    for newest in (None, 4):
        batch = events.batch([3], events.manifest.last_timestamp, max_events=newest)
        s = batch.sequences[stack.source]
        rows = catalog.event_rows(stack.source, s)
        tokens.append(
            stack.encoder(event_columns(s, rows, batch.as_of), model.table, catalog.event_dense(stack.source, s))
        )
    full, cut = tokens
    assert len(full) > len(cut) == 4
    torch.testing.assert_close(full[-3:], cut[-3:])  # the oldest that is left has lost its gap


def test_events_one_second_apart_in_2026_are_told_apart(tmp_path: Path) -> None:
    user = np.array([0, 0, 1, 1])
    time = np.array([START, START + 1_000, START, START + 1_001])
    events = write_log(tmp_path, LogParts(2, 3, {"view": SourceRows(user, time, np.array([0, 1, 0, 1]))}))
    one, other = embed(make(events), events, [0, 1], as_of=START + 2_000)
    assert not torch.equal(one, other)


def test_every_column_reaches_the_embedding(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    user, time = np.repeat(np.arange(3), 5), START + np.arange(15) * 977
    rows = SourceRows(
        user,
        time,
        generator.integers(0, 8, 15),
        event_type=generator.integers(0, 2, 15),
        dense=generator.standard_normal((15, 3)),
        semantic_ids=generator.integers(0, 50, (15, 2)),
        utc_offset=np.full(15, 3_600),
    )
    parts = LogParts(
        3, 8, {"post": rows}, ["like", "share"],
        item_accounts=np.arange(8) // 2,
        item_categories=np.arange(8) % 3,
        dense=generator.standard_normal((8, 4)).astype(np.float32),
        semantic_ids=generator.integers(0, 50, (8, 3)).astype(np.int32),
    )  # fmt: skip
    events = write_log(tmp_path, parts)
    model = make(events)
    catalog = model.catalog(events)
    assert len(model.schema.event_attributes("post")) == 2 + 2 + 3 + 1 + 2
    assert model.schema.event_dense_dim("post") == 7
    batch = events.batch(range(3), events.manifest.last_timestamp)
    start = model(batch, catalog)
    s = batch.sequences["post"]
    assert s.dense is not None
    assert s.semantic_ids is not None
    assert s.utc_offsets is not None
    changes = {
        "items": (s.items + 1) % 8,
        "accounts": (s.accounts + 1) % 4,
        "categories": torch.full_like(s.categories, -1),
        "event_types": 1 - s.event_types,
        "counts": s.counts + 40,
        "dense": s.dense + 1,
        "semantic_ids": s.semantic_ids + 1,
        "utc_offsets": s.utc_offsets + 6 * 3_600,
    }
    for name, column in changes.items():
        changed = EventBatch(batch.users, batch.as_of, {"post": replace(s, **{name: column})})
        assert not torch.allclose(model(changed, catalog), start, atol=1e-5), name
    later = EventBatch(batch.users, batch.as_of + DAY, batch.sequences)
    assert not torch.allclose(model(later, catalog), start, atol=1e-5)


def test_a_log_with_its_sources_in_another_order_gives_the_same_embeddings(events: Events, tmp_path: Path) -> None:
    rows = {}
    for name in reversed(events.manifest.sources):
        c = events.source(name)
        user = np.repeat(np.arange(events.num_users), np.diff(c.offsets))
        types = np.full(len(user), ["zap", "view", "click"].index(name))
        rows[name] = SourceRows(user, np.array(c.timestamp), np.array(c.item), types)
    index = np.arange(events.manifest.num_items)
    # another order of the event types as well, and one more of them, as a later log may have
    parts = LogParts(events.num_users, len(index), rows, ["zap", "view", "click"], index // 2, index % 4)
    other = write_log(tmp_path, parts)
    model = make(other)  # knows the third type
    first, second = model(batch := events.batch(range(10), START + 20 * DAY), model.catalog(events)), None
    second = model(other.batch(range(10), START + 20 * DAY), model.catalog(other))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
    assert batch.total > 0


def test_hashed_rows_are_in_range_salted_and_keep_missing() -> None:
    keys = np.array([0, 1, 5, (1 << 63) - 1, -1])
    rows = hash_keys(keys, "item", 17)
    assert (rows[:-1] >= 0).all()
    assert (rows[:-1] < 17).all()
    assert rows[-1] == -1
    many = np.arange(4_000)
    assert (hash_keys(many, "item", 1 << 16) != hash_keys(many, "account", 1 << 16)).mean() > 0.99
    assert hash_keys(np.array([12_345]), "item", 1 << 20)[0] == 377_898  # the same in every release


def test_gathered_rows_give_the_same_numbers_and_gradient(events: Events) -> None:
    model = make(events).requires_grad_(True)
    catalog = model.catalog(events)
    batch = events.batch(range(8), events.manifest.last_timestamp)
    weights = torch.randn(8, 2, 16)
    (model(batch, catalog) * weights).sum().backward()
    assert model.table.grad is not None
    assert model.table.grad.is_sparse
    sparse = model.table.grad.to_dense()
    with torch.no_grad():
        plain = model(batch, catalog)
        step = 1e-2 * sparse / sparse.norm()
        model.table += step
        up = (model(batch, catalog) * weights).sum()
        model.table -= 2 * step
        down = (model(batch, catalog) * weights).sum()
        model.table += step
    torch.testing.assert_close(model(batch, catalog), plain)
    assert float(up - down) / 2e-2 == pytest.approx(float(sparse.norm()), rel=0.02)
    ids = {"a": torch.tensor([[3, -1], [3, 1_023]])}
    table, renumbered = gather_rows(model.table, ids)
    assert table.shape[0] == 2
    assert renumbered["a"].tolist() == [[0, -1], [0, 1]]


def test_context_queries_see_only_their_own_user(events: Events) -> None:
    model = AlureModel(tiny_model(), EventSchema.of(events.manifest), ("ctr", "cvr")).requires_grad_(False)
    catalog = model.user.catalog(events)
    batch = events.batch(range(4), events.manifest.last_timestamp)
    users = torch.tensor([0, 0, 2, 3, 3, 3])
    offsets = torch.tensor([0, 2, 2, 3, 6])
    items = torch.arange(6)
    exposures = Exposures(items, offsets, users, batch.as_of[users] + 100)
    ads = model.embed_ads(items, catalog)
    together = model.heads["ranking"](model(batch, catalog), ads, exposures)
    assert together.shape == (6, 2)
    last = events.batch([3], events.manifest.last_timestamp)
    single = Exposures(items[3:], torch.tensor([0, 3]), torch.zeros(3, dtype=torch.int64), exposures.timestamps[3:])
    torch.testing.assert_close(
        together[3:], model.heads["ranking"](model(last, catalog), ads[3:], single), atol=1e-5, rtol=1e-4
    )
    cosines = torch.stack([torch.nn.functional.cosine_similarity(ads[1], e, dim=-1).mean() for e in ads])
    torch.testing.assert_close(two_tower_scores(ads, ads)[1], cosines)


@pytest.mark.gpu
def test_a_gpu_gives_the_embeddings_of_the_cpu(events: Events) -> None:
    model = make(events)
    expected = embed(model, events, range(20))
    model.to("cuda")
    batch = events.batch(range(20), events.manifest.last_timestamp).to("cuda")
    torch.testing.assert_close(model(batch, model.catalog(events)).cpu(), expected, atol=2e-3, rtol=1e-2)


def test_what_is_not_tapped_is_not_built(events: Events) -> None:
    model = make(events, taps=[(1, "view")])
    assert [stack.source for stack in model.sources()] == ["view"]
    assert [len(stack.layers) for stack in model.sources()] == [1]
    assert model.num_taps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taps": [(3, "view")]}, "layers 1 to 2, got layer 3"),
        ({"taps": [(1, "vew")]}, "no source 'vew'"),
        ({"taps": []}, "at least one"),
        ({"sources": {"comment": {"layers": 1}}}, "no source comment"),
    ],
)
def test_configurations_that_do_not_fit_the_log(events: Events, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        module_plan(tiny_model(**changes), EventSchema.of(events.manifest))


def test_logs_that_do_not_fit_the_model_are_named(events: Events) -> None:
    mine = EventSchema.of(events.manifest)
    mine.check_log(mine.model_copy(update={"sources": tuple(reversed(mine.sources)), "event_types": ("view",)}))
    changes = {"sources": ("view",), "event_types": ("view", "zap"), "dense_dim": 7}
    with pytest.raises(InputError) as error:
        mine.check_log(mine.model_copy(update=changes))
    for part in ("view, click", "zap", "dense_dim: the model was trained with 0, the log has 7"):
        assert part in str(error.value)
