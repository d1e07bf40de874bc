"""What people do: when they are online, what they are shown and look for, and what they click and buy.

Nothing here knows embeddings, graphs or candidates: exposure is the world's own (a short list drawn from all items on
offer, an auction on affinity and appeal), in the truth period as before it.
"""

from dataclasses import dataclass

import numpy as np

from alure.engine.world.catalogue import DAYS, KINDS, Catalogue
from alure.engine.world.people import COUNTRIES, PEAKS, People

DAY = 86_400
SHORTLIST = 8  # items drawn for one impression, of which one is shown
EXPLORE = 0.15  # share of impressions drawn from everything on offer rather than from an interest
SOURCES = ("ad_view", "video_view", "comment", "page_like", "ad_click", "ad_conversion")
EVENT_TYPES = ("view", "watch", "comment", "like", "click", "conversion")  # of each of SOURCES
KIND_OF_ACTIVITY = ("ad", "video", "post", "page", "ad")  # columns of People.mix; the last is found, not shown
FOUND = 4
SHARPNESS = np.array([7.0, 9.0, 9.0, 9.0, 11.0])  # how much affinity decides among the short list, by activity
CHUNK = 1 << 17  # events at once: bounds the memory of [events, short list, LATENT]


@dataclass(frozen=True)
class Log:
    """Events, one row each, in no order."""

    users: np.ndarray  # int32 [events], index of the user
    items: np.ndarray  # int32 [events], index in the catalogue
    seconds: np.ndarray  # int64 [events], since the first day, UTC
    sources: np.ndarray  # int8 [events], index into SOURCES
    values: np.ndarray  # float32 [events]: price of a conversion, watched share of a video, else NaN

    @classmethod
    def concatenate(cls, logs: "list[Log]") -> "Log":
        fields = cls.__dataclass_fields__
        return cls(**{f: np.concatenate([getattr(log, f) for log in logs]) for f in fields})


def simulate(rng: np.random.Generator, people: People, catalogue: Catalogue) -> Log:
    """Everything that happens in DAYS days."""
    users, seconds = _draw_times(rng, people)
    activity = _pick(rng, people.mix[users])
    days = np.clip(seconds / DAY, 0, DAYS - 1e-3).astype(np.float32)
    items = np.empty(len(users), dtype=np.int64)
    affinity = np.empty(len(users), dtype=np.float32)
    favourite = np.empty(len(users), dtype=np.float32)
    for kind in dict.fromkeys(KIND_OF_ACTIVITY):
        offer = Offer(catalogue, kind)
        mine = np.flatnonzero(np.isin(activity, [a for a, k in enumerate(KIND_OF_ACTIVITY) if k == kind]))
        for part in np.array_split(mine, max(1, -(-len(mine) // CHUNK))):
            chosen = _choose(rng, people, catalogue, offer, users[part], days[part], SHARPNESS[activity[part]])
            items[part], affinity[part] = chosen
            favourite[part] = _loyalty(people, catalogue, users[part], chosen[0])
    values = np.where(activity == 1, rng.beta(1.0 + 2.0 * np.clip(affinity, 0, 1), 1.5), np.nan).astype(np.float32)
    base = Log(users, items.astype(np.int32), seconds, np.where(activity == FOUND, 4, activity).astype(np.int8), values)

    shown = np.flatnonzero(activity == 0)
    local_hour = (seconds + people.utc_offsets[users]) % DAY / 3_600
    logit = (
        -5.5 + 4.2 * affinity + 0.9 * favourite + catalogue.quality[items] + people.click_bias[users]
        + 0.35 * np.cos(2 * np.pi * (local_hour - 20.5) / 24)
    )  # fmt: skip
    clicked = shown[rng.random(len(shown)) < _sigmoid(logit[shown])]
    found = np.flatnonzero(activity == FOUND)
    delay = np.concatenate([rng.integers(3, 90, len(clicked)), np.zeros(len(found), dtype=np.int64)])
    clicks = np.concatenate([clicked, found])
    clicked_at = seconds[clicks] + delay
    click_log = _derive(base, clicked, seconds[clicked] + delay[: len(clicked)], source=4)

    buys = rng.random(len(clicks)) < _sigmoid(-3.9 + 2.2 * favourite[clicks] + 1.8 * affinity[clicks])
    wait = np.minimum(rng.lognormal(7.0, 1.6, len(clicks)), 3 * DAY).astype(np.int64) + 20
    prices = np.round(rng.lognormal(3.4, 0.7, len(clicks)), 2).astype(np.float32)
    buy_log = _derive(base, clicks[buys], (clicked_at + wait)[buys], source=5, values=prices[buys])
    return Log.concatenate([base, click_log, buy_log])


class Offer:
    """Draws items of one kind by country, day and niche, in proportion to appeal × freshness.

    All (country, day) rows lie end to end in one cumulative sum, so that a draw is one binary search.
    """

    def __init__(self, catalogue: Catalogue, kind: str) -> None:
        self.items = catalogue.of_kind(kind)
        days = np.arange(DAYS)[:, None] + 0.5
        age = days - catalogue.start_days[self.items]
        on_offer = (age >= 0) & (age < catalogue.lifetimes[self.items])
        freshness = on_offer * (0.35 + np.exp(-np.maximum(age, 0) / 10.0))
        if kind == KINDS[3]:
            freshness = np.ones_like(age)
        weight = freshness * catalogue.appeal[self.items]  # [DAYS, items]
        reach = catalogue.reach[catalogue.accounts[self.items]].T  # [countries, items]
        weights = reach[:, None, :] * weight[None]  # [countries, DAYS, items]
        self.cumulative = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
        bounds = np.searchsorted(catalogue.niches[self.items], np.arange(len(catalogue.niche_names) + 1))
        self.first, self.last = bounds[:-1], bounds[1:]

    def draw(
        self, rng: np.random.Generator, countries: np.ndarray, days: np.ndarray, niches: np.ndarray, count: int
    ) -> np.ndarray:
        """Catalogue indices [n, count]; niche −1, or a niche with nothing on offer, draws from everything."""
        row = (countries.astype(np.int64) * DAYS + days.astype(np.int64)) * len(self.items)
        anywhere = niches < 0
        low = self.cumulative[row + np.where(anywhere, 0, self.first[niches])]
        high = self.cumulative[row + np.where(anywhere, len(self.items), self.last[niches])]
        empty = high <= low
        low = np.where(empty, self.cumulative[row], low)
        high = np.where(empty, self.cumulative[row + len(self.items)], high)
        mark = low[:, None] + rng.random((len(row), count)) * (high - low)[:, None]
        place = np.searchsorted(self.cumulative, mark, side="right") - 1
        return self.items[np.clip(place - row[:, None], 0, len(self.items) - 1)]


def _choose(
    rng: np.random.Generator,
    people: People,
    catalogue: Catalogue,
    offer: Offer,
    users: np.ndarray,
    days: np.ndarray,
    sharpness: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(item [n], its affinity [n]): one of a short list from the niche of an interest alive today, by Gumbel-max."""
    weights = people.weights(users, days)
    slot = _pick(rng, weights)
    niches = people.niches[users, slot].astype(np.int64)
    niches[rng.random(len(users)) < EXPLORE] = -1
    shortlist = offer.draw(rng, people.countries[users], days, niches, SHORTLIST)
    wish = np.einsum("ns,nsd->nd", weights, people.tastes[users])
    wish /= np.maximum(np.linalg.norm(wish, axis=1, keepdims=True), 1e-6)
    affinity = np.einsum("nd,ncd->nc", wish, catalogue.latent[shortlist])
    best = np.argmax(sharpness[:, None] * affinity + rng.gumbel(size=shortlist.shape), axis=1)
    rows = np.arange(len(users))
    return shortlist[rows, best], affinity[rows, best]


def _loyalty(people: People, catalogue: Catalogue, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """1 where the item's account is the one the user is loyal to in that niche, else 0.

    In each of a user's niches one account in three wins the user's loyalty, by a hash of account and user.
    """
    account = catalogue.accounts[items].astype(np.int64)
    in_niche = people.niches[users] == catalogue.niches[items][:, None]
    seed = np.where(in_niche, people.loyal_seeds[users], -1.0).max(1)
    mixed = (account * 2_654_435_761 + (np.maximum(seed, 0) * 1_000_003).astype(np.int64) * 40_503) & 0xFFFF
    return ((seed >= 0) & (mixed % 3 == 0)).astype(np.float32)


def _draw_times(rng: np.random.Generator, people: People) -> tuple[np.ndarray, np.ndarray]:
    """(user, second) of every event a user starts: sessions of about six events, in the user's hours and weekdays."""
    n = people.num_events.astype(np.int64)
    users = np.repeat(np.arange(len(n)), n)
    sessions = np.maximum(1, -(-n // 6))
    first = np.concatenate([[0], np.cumsum(sessions)])
    session = first[users] + (rng.random(len(users)) * sessions[users]).astype(np.int64)

    owner = np.repeat(np.arange(len(n)), sessions)
    weekday = np.arange(DAYS) % 7  # day 0 is a Monday
    pace = np.where(weekday[None, :] >= 5, people.weekend[:, None], 1.0)
    pace = np.cumsum(pace, axis=1)
    pace = np.concatenate([np.zeros((len(n), 1)), pace], axis=1)
    joined = np.minimum(people.joined.astype(np.int64), DAYS - 1)
    low = pace[np.arange(len(n)), joined]
    mark = low[owner] + rng.random(len(owner)) * (pace[:, -1] - low)[owner]
    # one search over all users: each user's row is lifted above the one before it
    lift = np.concatenate([[0.0], np.cumsum(pace[:, -1] + 1.0)[:-1]])
    flat = (pace + lift[:, None]).ravel()
    day = np.searchsorted(flat, mark + lift[owner], side="right") - 1 - owner * (DAYS + 1)
    day = np.clip(day, joined[owner], DAYS - 1)
    hour = PEAKS[_pick(rng, people.hours[owner])] + rng.normal(0.0, 1.3, len(owner))
    start = day * DAY + (hour % 24 * 3_600).astype(np.int64) - people.utc_offsets[owner]
    seconds = start[session] + rng.exponential(360.0, len(users)).astype(np.int64)
    return users.astype(np.int32), seconds


def _derive(base: Log, rows: np.ndarray, seconds: np.ndarray, source: int, values: np.ndarray | None = None) -> Log:
    """Events that follow from `rows` of another log, at `seconds`."""
    nothing = np.full(len(rows), np.nan, dtype=np.float32)
    sources = np.full(len(rows), source, dtype=np.int8)
    return Log(base.users[rows], base.items[rows], seconds, sources, nothing if values is None else values)


def _pick(rng: np.random.Generator, odds: np.ndarray) -> np.ndarray:
    """A column for each row of `odds` [n, c], in proportion."""
    cumulative = np.cumsum(odds, axis=1)
    mark = rng.random(len(odds), dtype=np.float32)[:, None] * cumulative[:, -1:]
    return np.minimum((mark >= cumulative).sum(1), odds.shape[1] - 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def country_name(index: int) -> str:
    return COUNTRIES[index]
