"""The real-time half: the nightly answer where nothing is new, and that of a log with the new events where some are."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from support.events import DAY, START, make_events, random_table
from support.graph import add_generation
from support.refresh import save_model

from alure.engine import OnlineRetriever
from alure.engine.config import GraphConfig, RefreshConfig, RetrievalConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.graph import build_graphs
from alure.engine.refresh import RefreshJob
from alure.engine.retrieval import CandidateRetriever
from alure.engine.retrieval.nearest import NearestUsers
from alure.engine.store import EmbeddingStore

SNAPSHOT, NOW = START + 20 * DAY, START + 20 * DAY + DAY // 2
ITEMS = pa.table({"item_id": 5_000 + np.arange(60), "account_id": np.arange(60) % 7})
PRECISE = RefreshConfig(precision="float32")
NEWCOMERS = (1_000, 1_001)  # who have no event up to the snapshot
PLAIN: dict[str, Any] = {"account_weight": 0.0}


class World:
    """A log of 60 users up to SNAPSHOT with a store made from it, and one that has the events up to NOW as well."""

    def __init__(self, folder: Path) -> None:
        table = random_table(num_users=60, num_events=2_000, seed=5)
        late = pc.greater(table["timestamp"], SNAPSHOT)
        table = table.filter(pc.or_(late, pc.invert(pc.is_in(table["user_id"], value_set=pa.array(NEWCOMERS)))))
        late = pc.greater(table["timestamp"], SNAPSHOT)
        self.news = table.filter(pc.and_(late, pc.less_equal(table["timestamp"], NOW)))
        self.later = table.filter(pc.greater(table["timestamp"], NOW))
        nightly = table.filter(pc.invert(late))
        options = {"ad_sources": ["ad_click", "video_view"]}
        self.events = make_events(folder, nightly, ITEMS, "nightly", **options)
        self.whole = make_events(folder, pa.concat_tables([nightly, self.news]), ITEMS, "whole", **options)
        self.model = save_model(folder / "model", self.events)
        self.store = EmbeddingStore(folder / "store", create=True)
        job = RefreshJob(self.model, self.events, self.store, as_of=SNAPSHOT, config=PRECISE)
        self.generation = job.run().generation
        self.follows = folder / "follows.parquet"
        rng = np.random.default_rng(0)
        pairs = {"user_id": 1_000 + rng.integers(0, 60, 200), "followed_id": 1_000 + rng.integers(0, 60, 200)}
        pq.write_table(pa.table(pairs), self.follows)
        build_graphs(self.store, GraphConfig(k=5), social=self.follows)
        self.users = self.store.read_users()["user_id"].to_pylist()

    def nightly(self, **config: Any) -> CandidateRetriever:
        return CandidateRetriever(self.store, self.events, RetrievalConfig(**config))

    def online(self, model: bool = True, news: pa.Table | None = None, **config: Any) -> OnlineRetriever:
        """With `news` (default: those up to NOW)."""
        found = OnlineRetriever(self.nightly(**config), self.model if model else None)
        found.add(self.news if news is None else news)
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def event(**changes: Any) -> pa.Table:
    row = {"user_id": 1_005, "timestamp": SNAPSHOT + 60, "item_id": 5_001, "source": "ad_click", "event_type": "click"}
    return pa.Table.from_pylist([{**row, **changes}])


NOTHING = event().slice(0, 0)


@pytest.mark.parametrize("config", [{}, {"exclude_seen": True, "account_cap": 2, "cap": 20, "quotas": {"social": 3}}])
def test_without_new_events_it_is_the_nightly_answer(world: World, config: dict[str, Any]) -> None:
    expected = world.nightly(**config).retrieve(world.users)
    online = world.online(news=world.later, **config)
    assert online.add(event(timestamp=SNAPSHOT)).before_snapshot == 1
    for as_of in (SNAPSHOT, SNAPSHOT + DAY // 4):
        found = pa.concat_tables([online.retrieve(user, as_of) for user in world.users])
        assert found.combine_chunks().equals(expected.combine_chunks())


def test_the_embedding_is_that_of_a_refresh_with_the_new_events(world: World, tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path / "store", create=True)
    RefreshJob(world.model, world.whole, store, as_of=NOW, config=PRECISE).run()
    online, changed = world.online(), set(world.news["user_id"].to_pylist())
    for user in changed:
        found = online.embed(online.read(user, NOW), NOW)
        np.testing.assert_allclose(found, store.read_user(user)["embedding"], atol=2e-6)
    user = next(iter(changed & set(world.users)))
    before = world.store.read_user(user)["embedding"]
    assert np.abs(online.embed(online.read(user, NOW), NOW) - before).max() > 1e-3


@pytest.mark.parametrize("config", [PLAIN, {**PLAIN, "exclude_seen": True, "account_cap": 2, "half_life": 1.0 * DAY}])
def test_the_candidates_are_those_of_a_log_with_the_new_events(
    world: World, tmp_path: Path, config: dict[str, Any]
) -> None:
    """A generation at NOW of the log that has all, with the neighbours that the online half found as a graph of it."""
    store = EmbeddingStore(tmp_path / "store", create=True)
    generation = RefreshJob(world.model, world.whole, store, as_of=NOW, config=PRECISE).run().generation
    online = world.online(**config)
    ids = world.events.users["user_id"].to_pylist()
    near = {}
    for user in sorted(set(world.news["user_id"].to_pylist())):
        visitor = online.read(user, NOW)
        near[user] = online.search(visitor, online.embed(visitor, NOW))
        assert len(near[user].ids)
    moved = pa.table({
        "user_id": list(near), "country": ["DE"] * len(near),
        "neighbor_ids": [[ids[i] for i in each.ids.tolist()] for each in near.values()],
        "similarities": pa.array([each.similarities.tolist() for each in near.values()], pa.list_(pa.float32())),
    })  # fmt: skip
    for name in ("alure", "social"):
        store.write_graph(generation, name, [world.store.read_graph(world.generation, name)], {})
    store.write_graph(generation, "online", [moved], {})
    graphs = ["alure", "social", "online"]
    expected = CandidateRetriever(store, world.whole, RetrievalConfig(**config), graphs=graphs)
    for user, want in zip(near, expected.retrieve(list(near)).to_pylist()):
        (got,) = online.retrieve(user, NOW).to_pylist()
        assert got["country"] == want["country"]
        scores = dict(zip(want["item_ids"], want["scores"]))
        assert set(got["item_ids"]) == set(scores)
        np.testing.assert_allclose(got["scores"], [scores[item] for item in got["item_ids"]], rtol=1e-5)
        assert sorted(zip(got["item_ids"], got["reasons"], got["graphs"])) == sorted(
            zip(want["item_ids"], want["reasons"], want["graphs"])
        )


def test_nothing_later_is_seen_and_the_order_of_arrival_does_not_matter(world: World) -> None:
    everything = pa.concat_tables([world.later, world.news, world.later, world.news])
    shuffled = everything.take(pa.array(np.random.default_rng(1).permutation(len(everything))))
    online, other = world.online(), world.online(news=shuffled)
    for user in [*world.users, *NEWCOMERS][::3]:
        assert online.retrieve(user, NOW).equals(other.retrieve(user, NOW))


def test_an_engagement_of_a_neighbour_comes_in_at_once(world: World) -> None:
    """User 1,005 engages; whoever has it for a neighbour gets the ad, with the ads of its account, from that second."""
    online = world.online(model=False, news=event(item_id=5_008, event_type="conversion"))
    graph = world.store.read_graph(world.generation, "alure").to_pylist()
    fans = [row["user_id"] for row in graph if 1_005 in row["neighbor_ids"]]
    assert fans
    for user in fans:
        before, after = (online.retrieve(user, SNAPSHOT + s).to_pylist()[0] for s in (59, 60))
        assert before == world.nightly().retrieve([user]).to_pylist()[0]
        rank = after["item_ids"].index(5_008)
        assert "exact" in after["reasons"][rank]
        assert rank <= before["item_ids"].index(5_008) if 5_008 in before["item_ids"] else True
        gained = {i for i, s in zip(after["item_ids"], after["scores"]) if s != dict_of(before).get(i)}
        assert {i for i in gained if (i - 5_000) % 7 == 1} - {5_008}  # of account 1, by the account
    strangers = set(world.users) - set(fans) - {
        row["user_id"] for row in world.store.read_graph(world.generation, "social").to_pylist()
        if 1_005 in row["neighbor_ids"]
    }  # fmt: skip
    some = sorted(strangers - {1_005})[0]
    assert online.retrieve(some, NOW).equals(world.nightly().retrieve([some]))


def dict_of(row: dict[str, Any]) -> dict[int, float]:
    return dict(zip(row["item_ids"], row["scores"]))


def test_what_is_old_no_longer_counts(world: World) -> None:
    online = world.online(recent_seconds=600)
    nightly = world.nightly().retrieve(world.users).to_pylist()
    last = max(world.news["timestamp"].to_pylist())
    assert [online.retrieve(user, last + 600).to_pylist()[0] for user in world.users] == nightly
    assert [online.retrieve(user, last + 599).to_pylist()[0] for user in world.users] != nightly


def test_the_oldest_go_where_memory_ends(world: World) -> None:
    online = world.online(recent_events=1)
    assert len(online.recent) == 1
    last = world.news.slice(len(world.news) - 1)
    assert online.retrieve(world.users[0], NOW).equals(world.online(news=last).retrieve(world.users[0], NOW))


@pytest.mark.parametrize("k", [1, 5, 500])
def test_an_embedding_that_did_not_move_has_the_graphs_neighbours(world: World, k: int) -> None:
    build_graphs(world.store, GraphConfig(k=k))
    try:
        check_neighbours(world.online(news=NOTHING), world.store)
    finally:
        build_graphs(world.store, GraphConfig(k=5))


def test_the_same_in_clusters(tmp_path: Path) -> None:
    """Three of six clusters are probed, so some of the true neighbours are missed: the same ones."""
    table = random_table(num_users=700, num_events=1_500, seed=2, sources=("ad_click",))
    events = make_events(tmp_path, table, ITEMS)
    model, store = save_model(tmp_path / "model", events), EmbeddingStore(tmp_path / "store", create=True)
    RefreshJob(model, events, store, config=PRECISE).run()
    report = build_graphs(store, GraphConfig(k=7, nlist=6, nprobe=3, search="grouped"))
    assert report.recall < 1
    online = OnlineRetriever(CandidateRetriever(store, events), model)
    check_neighbours(online, store)


def check_neighbours(online: OnlineRetriever, store: EmbeddingStore) -> None:
    rows = {row["user_id"]: row for row in store.read_graph(None, "alure").to_pylist()}
    values = {row["user_id"]: row["embedding"] for row in store.read_embeddings().to_pylist()}
    for row, (user, country) in enumerate(zip(online.user_ids.to_pylist(), online.countries.to_pylist())):
        similarities, near = online.nearest.search(np.array(values[user], np.float32), country, row)
        assert online.user_ids.take(pa.array(near)).to_pylist() == rows[user]["neighbor_ids"]
        assert similarities.tolist() == rows[user]["similarities"]


def test_copies_ties_and_zero_vectors(tmp_path: Path) -> None:
    """Against all cosines: many equal ones, where the lower row comes first, and users without a direction."""
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (90, 6)).astype(np.float32)
    values[30:] = values[rng.integers(0, 8, 60)]
    values[[4, 50, 51]] = 0
    store = EmbeddingStore(tmp_path, create=True)
    add_generation(store, "g", np.concatenate([np.zeros((45, 6), np.float32), values]))  # BR: nobody has a direction
    nearest = NearestUsers(store, store.published("g", "embeddings"), 7)
    unit = values / np.maximum(np.linalg.norm(values.astype(float), axis=1, keepdims=True), 1e-9)
    for row in range(90):
        similarities, found = nearest.search(values[row] * 9, "US", 45 + row)
        cosines = np.round(unit @ unit[row], 6)
        order = [o for o in np.lexsort((np.arange(90), -cosines)) if o != row and values[o].any()][:7]
        assert (found - 45).tolist() == (order if values[row].any() else [])
        np.testing.assert_allclose(similarities, cosines[order][: len(found)], atol=1e-6)
    assert nearest.search(values[0], "BR")[1].tolist() == nearest.search(values[0], "nowhere")[1].tolist() == []


def test_who_was_not_there_at_the_snapshot(world: World) -> None:
    online = world.online()
    here = set(NEWCOMERS) & set(world.news["user_id"].to_pylist())
    assert here
    for user in here:
        (found,) = online.retrieve(user, NOW).to_pylist()
        assert found["country"] == ("DE" if user % 2 == 0 else "US")
        assert set(found["graphs"]) == {"online"}
        assert len(found["item_ids"]) > 5
    assert world.online(model=False).retrieve(min(here), NOW)["item_ids"].to_pylist() == [[]]
    nowhere = world.online(news=event(user_id=77))
    assert nowhere.retrieve(77, NOW).to_pylist() == [
        {"user_id": 77, "country": "all", "item_ids": [], "scores": [], "reasons": [], "graphs": []}
    ]
    nowhere.add(event(user_id=77, country="US", timestamp=SNAPSHOT + 30))
    assert nowhere.retrieve(77, NOW)["country"].to_pylist() == ["US"]
    assert nowhere.retrieve(77, SNAPSHOT + 29 + 31)["item_ids"].to_pylist() != [[]]


def test_an_inventory_and_seen_ads_hold_for_new_engagements(world: World, tmp_path: Path) -> None:
    inventory = pa.table({"item_id": 5_000 + np.arange(0, 60, 2), "country": ["DE", None] * 15})
    pq.write_table(inventory, tmp_path / "inventory.parquet")
    online = world.online(eligible=tmp_path / "inventory.parquet", exclude_seen=True)
    shown = dict(zip(inventory["item_id"].to_pylist(), inventory["country"].to_pylist()))
    sources, users = world.news["source"].to_pylist(), world.news["user_id"].to_pylist()
    met = [(u, i) for u, i, s in zip(users, world.news["item_id"].to_pylist(), sources) if s != "comment"]
    for user in set(users):
        (found,) = online.retrieve(user, NOW).to_pylist()
        assert found["item_ids"]
        assert all(shown.get(item, "nowhere") in (None, found["country"]) for item in found["item_ids"])
        assert not set(found["item_ids"]) & {item for who, item in met if who == user}


def test_a_short_half_life_does_not_overflow(world: World) -> None:
    online = world.online(half_life=1.0)
    for user in world.users[::10]:
        scores = online.retrieve(user, NOW)["scores"].to_pylist()[0]
        assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("user", "as_of", "message"),
    [
        (9, NOW, "user 9: not among the .* users of generation .*, and no event of it since is known"),
        (NEWCOMERS[0], SNAPSHOT, "user 1000: not among"),
        (None, NOW, "user None: not among"),
        ("Ann", NOW, "users: expected ids of type int64, got 'Ann'"),
        (1_005, SNAPSHOT - 1, "is before the snapshot of generation"),
        (1_005, float(NOW), "as_of: expected unix seconds as an integer, got"),
        (1_005, True, "as_of: expected unix seconds as an integer, got True"),
    ],
)
def test_questions_that_cannot_be_answered(world: World, user: Any, as_of: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        world.online().retrieve(user, as_of)


def test_models_and_graphs_that_do_not_fit(world: World, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", world.events, seed=1)
    with pytest.raises(InputError, match="embeddings of two models are never mixed"):
        OnlineRetriever(world.nightly(), other)
    social = CandidateRetriever(world.store, world.events, graphs=["social"])
    with pytest.raises(InputError, match="moves users in the graph alure, which is not among social"):
        OnlineRetriever(social, world.model)
    with pytest.raises(InputError, match="k: expected at least 1 neighbour, got 0"):
        OnlineRetriever(world.nightly(), world.model, k=0)
    assert OnlineRetriever(social).retrieve(world.users[0], NOW).equals(social.retrieve(world.users[:1]))


def test_a_model_that_yields_nan_is_no_answer(world: World) -> None:
    online = world.online()
    assert online.model is not None
    online.model.table.data.fill_(float("nan"))
    user = next(u for u in world.news["user_id"].to_pylist() if u in world.users)
    with pytest.raises(AlureError, match=rf"user {user}: its embedding with \d+ new events is not finite"):
        online.retrieve(user, NOW)


def test_threads_ask_and_add_at_once(world: World) -> None:
    """Whatever is added meanwhile, an answer for SNAPSHOT + 60 is one of two: without, or with the news until then."""
    early, moment = event(item_id=5_030, user_id=world.users[3]), SNAPSHOT + 60
    online = world.online(news=NOTHING)
    answers = {False: world.online(news=NOTHING), True: world.online(news=early)}
    expected = {u: [a.retrieve(u, moment) for a in answers.values()] for u in world.users[:8]}
    stop = threading.Event()

    def ask(seed: int) -> int:
        """How many answers were neither."""
        rng, wrong = np.random.default_rng(seed), 0
        while not stop.is_set():
            user = world.users[rng.integers(8)]
            found = online.retrieve(user, moment)
            wrong += not any(found.equals(each) for each in expected[user])
        return wrong

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, seed) for seed in range(3)]
        for first in range(0, len(world.later), 40):
            online.add(world.later.slice(first, 40))
            if first == 400:
                online.add(early)
        stop.set()
        assert [each.result() for each in asking] == [0, 0, 0]
    assert all(online.retrieve(u, moment).equals(answers[True].retrieve(u, moment)) for u in world.users[:8])
