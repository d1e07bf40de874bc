"""Builds the world and writes it as the engine's inputs: an event log, its items, follows, and a truth to come.

What is planted, and what is not:
- Users hold 6 interests (of 48 niches in 16 topics): 3 that swell and ebb, 3 episodes that rise on a day and fade over
  one or two weeks. Which interests go together is shared by all; which are common depends on the country.
- People watch, comment on and like what they are interested in, far more often than they click ads. Clicks depend on
  affinity to the interests of that moment, the account's hold on the user, the ad's quality, the user and the hour;
  conversions on loyalty to the account.
- Follows go mostly to a circle that has nothing to do with interests, partly to people of the same main interest.
- The last 3 days are the truth. Nobody's candidates shaped them: impressions come from the world's own auction
  among all active ads, and one engagement in two is with an ad the user found unprompted.
- No user similarity is written anywhere: what similar users share is interests, and nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alure.engine.errors import InputError
from alure.engine.world.behaviour import EVENT_TYPES, SOURCES, Log, simulate
from alure.engine.world.catalogue import DAYS, KINDS, Catalogue, build_catalogue
from alure.engine.world.people import COUNTRIES, People, build_people, draw_follows

START = 1_711_929_600  # Monday 2024-04-01 00:00 UTC
DAY = 86_400
HISTORY_DAYS = 60
AD_SOURCES = ("ad_view", "ad_click", "ad_conversion")


@dataclass(frozen=True)
class World:
    """Where the files of a world lie. `as_of` is the last second of the log; the truth comes after it."""

    root: Path
    events: Path  # user_id, timestamp, source, item_id, country, event_type, value, utc_offset
    items: Path  # item_id, account_id, category_id, title, dense
    social: Path  # user_id, followed_id
    truth: Path  # user_id, item_id, timestamp, source, event_type: exposures and engagements after as_of
    users: Path  # planted, for the report only: user_id, country, interest, topic (strongest at as_of)
    description: Path  # world.json
    as_of: int


def build_world(out: Path, num_users: int, seed: int) -> World:
    """Write a world of `num_users` users into the folder `out`. The same seed gives the same bytes of data.

    5,000 users come to about half a million events. Raises InputError for fewer than 10 users.
    """
    if num_users < 10:
        raise InputError(f"world: expected at least 10 users, got {num_users}; pass a larger number of users")
    if seed < 0:
        raise InputError(f"world: expected a seed of 0 or more, got {seed}")
    out.mkdir(parents=True, exist_ok=True)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4)]
    catalogue = build_catalogue(streams[0], num_users, len(COUNTRIES))
    people = build_people(streams[1], num_users, catalogue)
    follows = draw_follows(streams[2], people)
    log = simulate(streams[3], people, catalogue)

    as_of = START + HISTORY_DAYS * DAY
    timestamps = log.seconds + START
    order = np.lexsort((log.sources, people.user_ids[log.users], timestamps))
    history = order[timestamps[order] <= as_of]
    ads = np.isin(log.sources, [SOURCES.index(s) for s in AD_SOURCES])
    to_come = (timestamps > as_of) & (timestamps <= as_of + (DAYS - HISTORY_DAYS) * DAY) & ads
    truth = order[to_come[order]]

    world = World(
        root=out,
        events=out / "events.parquet",
        items=out / "items.parquet",
        social=out / "social.parquet",
        truth=out / "truth.parquet",
        users=out / "users.parquet",
        description=out / "world.json",
        as_of=as_of,
    )
    events = _event_table(log, people, catalogue, history, timestamps)
    _write(events, world.events)
    _write(_item_table(catalogue), world.items)
    ids = people.user_ids
    _write(pa.table({"user_id": ids[follows[:, 0]], "followed_id": ids[follows[:, 1]]}), world.social)
    columns = ["user_id", "item_id", "timestamp", "source", "event_type"]
    _write(_event_table(log, people, catalogue, truth, timestamps).select(columns), world.truth)
    _write(_user_table(people, catalogue), world.users)
    facts = {
        "as_of": as_of,
        "num_users": num_users,
        "seed": seed,
        "ad_sources": list(AD_SOURCES),
        "history_days": HISTORY_DAYS,
        "truth_days": DAYS - HISTORY_DAYS,
        "events": len(history),
        "truth_events": len(truth),
        "items": {kind: len(catalogue.of_kind(kind)) for kind in KINDS},
        "accounts": len(catalogue.account_ids),
        "follows": len(follows),
        "countries": {name: int((people.countries == i).sum()) for i, name in enumerate(COUNTRIES)},
        "niches": catalogue.niche_names,
        "sources": {name: int((log.sources[history] == i).sum()) for i, name in enumerate(SOURCES)},
    }
    world.description.write_text(json.dumps(facts, indent=2) + "\n")
    return world


def _event_table(log: Log, people: People, catalogue: Catalogue, rows: np.ndarray, timestamps: np.ndarray) -> pa.Table:
    users, sources, values = log.users[rows], log.sources[rows], log.values[rows]
    return pa.table(
        {
            "user_id": people.user_ids[users],
            "timestamp": timestamps[rows],
            "source": _strings(sources, SOURCES),
            "item_id": catalogue.item_ids[log.items[rows]],
            "country": _strings(people.countries[users], COUNTRIES),
            "event_type": _strings(sources, EVENT_TYPES),
            "value": pa.array(values, mask=np.isnan(values)),
            "utc_offset": people.utc_offsets[users],
        }
    )


def _item_table(catalogue: Catalogue) -> pa.Table:
    dense = pa.FixedSizeListArray.from_arrays(pa.array(catalogue.dense.ravel()), catalogue.dense.shape[1])
    return pa.table(
        {
            "item_id": catalogue.item_ids,
            "account_id": catalogue.account_ids[catalogue.accounts],
            "category_id": catalogue.topics.astype(np.int64) + 1,
            "title": catalogue.titles,
            "dense": dense.cast(pa.list_(pa.float32())),
        }
    )


def _user_table(people: People, catalogue: Catalogue) -> pa.Table:
    everyone = np.arange(len(people.user_ids))
    strongest = people.weights(everyone, np.full(len(everyone), float(HISTORY_DAYS))).argmax(1)
    niche = people.niches[everyone, strongest]
    return pa.table(
        {
            "user_id": people.user_ids,
            "country": _strings(people.countries, COUNTRIES),
            "interest": _strings(niche, catalogue.niche_names),
            "topic": _strings(catalogue.niche_topics[niche], catalogue.topic_names),
        }
    )


def _strings(index: np.ndarray, names: "tuple[str, ...] | list[str]") -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(list(names))).cast(pa.string())


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")
