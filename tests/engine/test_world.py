"""The synthetic world: its files, its promises, and that what is planted can be found again."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from alure.engine.errors import InputError
from alure.engine.world import World, build_world
from alure.engine.world.behaviour import Offer
from alure.engine.world.catalogue import DAYS, build_catalogue
from alure.engine.world.people import COUNTRIES, build_people, draw_follows

USERS = 800
AD_SOURCES = ["ad_click", "ad_conversion", "ad_view"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), USERS, seed=4)


def read(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names if name != "dense"}


def test_same_seed_same_data_and_another_seed_another(world: World, tmp_path: Path) -> None:
    again = build_world(tmp_path / "again", USERS, seed=4)
    other = build_world(tmp_path / "other", USERS, seed=5)
    for name in ("events", "items", "social", "truth", "users"):
        first = pq.read_table(getattr(world, name))
        assert first.equals(pq.read_table(getattr(again, name)))
        assert not first.equals(pq.read_table(getattr(other, name)))
    assert world.description.read_bytes() == again.description.read_bytes()


def test_schema_is_that_of_the_engines_inputs(world: World) -> None:
    events = pq.read_schema(world.events)
    assert events.names == [
        "user_id", "timestamp", "source", "item_id", "country", "event_type", "value", "utc_offset",
    ]  # fmt: skip
    assert events.field("user_id").type == events.field("item_id").type == events.field("timestamp").type == pa.int64()
    assert pq.read_schema(world.items).names == ["item_id", "account_id", "category_id", "title", "dense"]
    assert pq.read_schema(world.social).names == ["user_id", "followed_id"]
    assert pq.read_schema(world.truth).names == ["user_id", "item_id", "timestamp", "source", "event_type"]
    facts = json.loads(world.description.read_text())
    assert facts["as_of"] == world.as_of
    assert facts["events"] == pq.read_metadata(world.events).num_rows
    assert sorted(facts["ad_sources"]) == AD_SOURCES


def test_log_ends_at_as_of_and_truth_begins_after_it(world: World) -> None:
    events, truth = read(world.events), read(world.truth)
    assert events["timestamp"].max() <= world.as_of < truth["timestamp"].min()
    assert truth["timestamp"].max() <= world.as_of + 3 * 86_400
    assert set(truth["source"]) == set(AD_SOURCES)
    assert set(truth["event_type"]) == {"view", "click", "conversion"}


def test_every_id_is_known_where_it_must_be(world: World) -> None:
    events, items, truth, social, users = (
        read(getattr(world, n)) for n in ("events", "items", "truth", "social", "users")
    )
    assert len(np.unique(items["item_id"])) == len(items["item_id"])
    assert len(np.unique(users["user_id"])) == USERS
    for log in (events, truth):
        assert np.isin(log["item_id"], items["item_id"]).all()
        assert np.isin(log["user_id"], users["user_id"]).all()
    assert np.isin(social["user_id"], users["user_id"]).all()
    assert np.isin(social["followed_id"], users["user_id"]).all()


def test_shape_of_the_population(world: World) -> None:
    events, users = read(world.events), read(world.users)
    lengths = np.bincount(np.searchsorted(np.sort(users["user_id"]), events["user_id"]), minlength=USERS)
    assert 50 * USERS < lengths.sum() < 160 * USERS
    assert (lengths <= 3).mean() > 0.05  # some hardly came
    assert lengths.max() > 15 * np.median(lengths)  # some never left
    sizes = Counter(users["country"])
    assert set(sizes) == set(COUNTRIES)
    assert sizes["US"] > 100 * sizes["NZ"] > 0  # very unequal, one with a handful


def test_ads_in_the_log_are_on_offer_and_new_ones_keep_coming(world: World) -> None:
    events, truth = read(world.events), read(world.truth)
    ads = events["item_id"][np.isin(events["source"], AD_SOURCES)]
    fresh = ~np.isin(truth["item_id"], ads)
    assert 0 < fresh.mean() < 0.3


def test_content_vectors_are_finite_and_of_one_length(world: World) -> None:
    dense = pq.read_table(world.items)["dense"]
    assert pc.unique(pc.list_value_length(dense)).to_pylist() == [32]
    assert np.isfinite(pc.list_flatten(dense).to_numpy()).all()


def test_titles_can_be_read(world: World) -> None:
    titles = pq.read_table(world.items)["title"].to_pylist()
    assert all(title and "{" not in title and title == title.strip() for title in titles)
    assert sum(" · " in title for title in titles) > 0.9 * len(titles)


def test_values_are_prices_and_watched_shares(world: World) -> None:
    events = pq.read_table(world.events)
    for source, low, high in (("ad_conversion", 0.0, 1e5), ("video_view", 0.0, 1.0)):
        values = events.filter(pc.equal(events["source"], source))["value"]
        assert values.null_count == 0
        assert low < pc.min(values).as_py() <= pc.max(values).as_py() <= high
    assert events.filter(pc.equal(events["source"], "comment"))["value"].null_count > 0


def test_daily_cycle_is_local(world: World) -> None:
    events = read(world.events)
    hour = (events["timestamp"] + events["utc_offset"]) % 86_400 // 3_600
    by_hour = np.bincount(hour, minlength=24)
    assert by_hour[3] < 0.2 * by_hour[20]


def test_clicks_follow_interest(world: World) -> None:
    """Who watches videos of a topic clicks ads of that topic: planted, and visible without knowing what is planted."""
    events, items = read(world.events), read(world.items)
    topic = dict(zip(items["item_id"].tolist(), items["category_id"].tolist()))
    watched: dict[int, Counter] = {}
    for user, item in zip(*(events[c][events["source"] == "video_view"].tolist() for c in ("user_id", "item_id"))):
        watched.setdefault(user, Counter())[topic[item]] += 1
    clicks = events["source"] == "ad_click"
    same, total = 0, 0
    for user, item in zip(events["user_id"][clicks].tolist(), events["item_id"][clicks].tolist()):
        if sum(watched.get(user, Counter()).values()) >= 10:
            same += topic[item] == watched[user].most_common(1)[0][0]
            total += 1
    assert total > 200
    assert same / total > 3 / 16  # 16 topics: three times as often as by chance


def test_follows_say_something_but_little(world: World) -> None:
    social, users = read(world.social), read(world.users)
    topic = dict(zip(users["user_id"].tolist(), users["topic"]))
    country = dict(zip(users["user_id"].tolist(), users["country"]))
    pairs = list(zip(social["user_id"].tolist(), social["followed_id"].tolist()))
    assert all(a != b for a, b in pairs)
    assert len(set(pairs)) == len(pairs)
    share = np.mean([topic[a] == topic[b] for a, b in pairs])
    assert 1.2 / 16 < share < 0.5
    assert np.mean([country[a] == country[b] for a, b in pairs]) > 0.95
    assert len({a for a, _ in pairs}) < USERS  # some follow nobody


def test_similar_users_know_more_than_popularity_and_follows_less(tmp_path: Path) -> None:
    """Neighbours by the content of what users did recall more of the truth than popularity does, and those more than
    follows: a collaborative signal is there to be found, by arrays alone, without the engine.
    """
    world = build_world(tmp_path, 2_500, seed=0)
    events, truth, social, users = (read(getattr(world, n)) for n in ("events", "truth", "social", "users"))
    user_ids, item_ids = np.sort(users["user_id"]), read(world.items)["item_id"]
    n, m = len(user_ids), len(item_ids)
    country = users["country"][np.argsort(users["user_id"])]
    dense = np.array(pq.read_table(world.items)["dense"].to_pylist())
    user, item = np.searchsorted(user_ids, events["user_id"]), np.searchsorted(item_ids, events["item_id"])
    fade = 0.5 ** ((world.as_of - events["timestamp"]) / (7 * 86_400))
    engaged = np.isin(events["source"], ["ad_click", "ad_conversion"])
    clicks = sp.csr_matrix((fade[engaged], (user[engaged], item[engaged])), shape=(n, m))
    vectors = sp.csr_matrix((fade, (user, item)), shape=(n, m)) @ dense
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    cosine = np.where(country[:, None] == country[None, :], vectors @ vectors.T, -1)
    np.fill_diagonal(cosine, -1)
    best = np.argsort(-cosine, axis=1)[:, :15]
    similar = sp.csr_matrix((np.ones(best.size), (np.repeat(np.arange(n), 15), best.ravel())), shape=(n, n))
    pairs = [np.searchsorted(user_ids, social[name]) for name in ("user_id", "followed_id")]
    follows = sp.csr_matrix((np.ones(len(pairs[0])), pairs), shape=(n, n))
    popular = np.stack([np.asarray(clicks[country == c].sum(0)).ravel() for c in COUNTRIES])
    later = truth["source"] != "ad_view"
    relevant: dict[int, set[int]] = {}
    for u, i in zip(
        np.searchsorted(user_ids, truth["user_id"][later]), np.searchsorted(item_ids, truth["item_id"][later])
    ):
        relevant.setdefault(int(u), set()).add(int(i))

    def recall(scores: np.ndarray) -> float:
        top = np.argsort(-scores, axis=1, kind="stable")[:, :50]
        return float(np.mean([len(found & set(row)) / len(found) for found, row in zip(relevant.values(), top)]))

    rows = list(relevant)
    by_country = popular[[COUNTRIES.index(country[row]) for row in rows]]
    found = [recall(x) for x in ((similar @ clicks)[rows].toarray(), by_country, (follows @ clicks)[rows].toarray())]
    assert found[0] > 1.2 * found[1] > 1.2 * found[2]
    assert found[2] > 0.03  # not nothing


def test_interests_drift() -> None:
    rng = np.random.default_rng(0)
    people = build_people(rng, 400, build_catalogue(rng, 400, len(COUNTRIES)))
    everyone = np.arange(400)
    then, now = (people.weights(everyone, np.full(400, day)).argmax(1) for day in (10.0, 60.0))
    assert 0.2 < (then != now).mean() < 0.95
    late = people.onsets[:, 3:] > 30
    assert (
        people.weights(everyone, np.full(400, 30.0))[:, 3:][late] == 0
    ).all()  # an episode is absent before it begins


def test_offers_are_of_the_niche_on_offer_and_in_reach() -> None:
    rng = np.random.default_rng(0)
    catalogue = build_catalogue(rng, 2_000, len(COUNTRIES))
    offer = Offer(catalogue, "ad")
    n = 3_000
    countries = rng.integers(0, len(COUNTRIES), n).astype(np.int8)
    days = rng.uniform(0, DAYS - 0.01, n)
    niches = rng.integers(0, len(catalogue.niche_names), n)
    drawn = offer.draw(rng, countries, days, niches, 4)
    age = np.floor(days)[:, None] + 0.5 - catalogue.start_days[drawn]
    assert ((age >= 0) & (age < catalogue.lifetimes[drawn])).all()
    assert catalogue.reach[catalogue.accounts[drawn], countries[:, None]].all()
    assert (catalogue.kinds[drawn] == 0).all()
    assert (catalogue.niches[drawn] == niches[:, None]).mean() > 0.9  # else nothing of the niche is on offer there


@pytest.mark.parametrize("users", [10, 37])
def test_tiny_worlds(tmp_path: Path, users: int) -> None:
    world = build_world(tmp_path / "tiny", users, seed=0)
    assert len(pq.read_table(world.users)) == users
    assert pq.read_metadata(world.events).num_rows > 0


def test_follows_of_a_handful() -> None:
    rng = np.random.default_rng(0)
    people = build_people(rng, 10, build_catalogue(rng, 10, len(COUNTRIES)))
    follows = draw_follows(rng, people)
    assert follows.shape[1] == 2
    assert (follows[:, 0] != follows[:, 1]).all()


@pytest.mark.parametrize(("users", "seed", "named"), [(0, 0, "at least 10 users"), (-5, 0, "got -5"), (50, -1, "seed")])
def test_bad_arguments_are_named(tmp_path: Path, users: int, seed: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_world(tmp_path, users, seed)
