"""Who lives in the world: users with drifting interests, their habits, and whom they follow."""

from dataclasses import dataclass

import numpy as np

from alure.engine.world.catalogue import DAYS, LATENT, Catalogue, unit

COUNTRIES = ("US", "IN", "BR", "DE", "JP", "NZ")
SHARES = (0.42, 0.25, 0.17, 0.10, 0.058, 0.002)  # NZ holds a handful of users: fewer than the graph has clusters
HOUR = 3_600
UTC_OFFSETS = {  # seconds east of Greenwich that a country's users live at
    "US": (-5 * HOUR, -6 * HOUR, -8 * HOUR), "IN": (5 * HOUR + HOUR // 2,), "BR": (-3 * HOUR,),
    "DE": (HOUR,), "JP": (9 * HOUR,), "NZ": (12 * HOUR,),
}  # fmt: skip
LONG, EPISODES = 3, 3  # interests that stay, and interests that come and go
PEAKS = np.array([8.0, 12.8, 20.5, 23.2])  # local hours at which people are online


@dataclass(frozen=True)
class People:
    """One row a user. Interests are `slots`: the first LONG last, the others rise on a day and fade."""

    user_ids: np.ndarray  # int64 [users]
    countries: np.ndarray  # int8 [users], index into COUNTRIES
    utc_offsets: np.ndarray  # int32 [users], seconds
    niches: np.ndarray  # int16 [users, slots]
    tastes: np.ndarray  # float32 [users, slots, LATENT], unit vectors near the slot's niche
    strengths: np.ndarray  # float32 [users, slots]
    onsets: np.ndarray  # float32 [users, slots], day an episode begins; for lasting interests a phase in days
    durations: np.ndarray  # float32 [users, slots], days an episode fades over; for lasting interests a period
    loyal_seeds: np.ndarray  # float32 [users, slots], in [0, 1): picks the account of the slot the user is loyal to
    joined: np.ndarray  # float32 [users], day of the first possible event
    num_events: np.ndarray  # int32 [users], events that the user starts (views, comments, …)
    mix: np.ndarray  # float32 [users, 5], odds of ad_view, video_view, comment, page_like and finding an ad unprompted
    hours: np.ndarray  # float32 [users, 4], odds of being online around each of PEAKS
    weekend: np.ndarray  # float32 [users], activity on Saturday and Sunday against weekdays
    click_bias: np.ndarray  # float32 [users], added to the logit of a click

    def weights(self, users: np.ndarray, days: np.ndarray) -> np.ndarray:
        """How strong each interest of `users` [n] is on `days` [n] (float): [n, slots], not normalised.

        Lasting interests swell and ebb over 40 to 120 days. An episode is absent before its onset, then decays.
        """
        since = days[:, None] - self.onsets[users]
        durations = self.durations[users]
        swell = np.exp(0.7 * np.sin(2 * np.pi * since / durations))
        fade = np.where(since >= 0, np.exp(-np.maximum(since, 0) / durations), 0.0)
        shape = np.where(np.arange(LONG + EPISODES) < LONG, swell, fade)
        return (self.strengths[users] * shape).astype(np.float32)


def build_people(rng: np.random.Generator, num_users: int, catalogue: Catalogue) -> People:
    """Users whose interests co-occur as topics do, in countries with tastes of their own."""
    counts = np.maximum(1, np.floor(np.array(SHARES) * num_users)).astype(np.int64)
    counts[-1] = min(counts[-1] + 2, num_users)
    counts[0] = max(0, num_users - counts[1:].sum())
    countries = np.repeat(np.arange(len(COUNTRIES)), counts)[:num_users].astype(np.int8)
    countries = rng.permuted(countries)
    offsets = [rng.choice(UTC_OFFSETS[COUNTRIES[c]]) for c in countries]
    slots = LONG + EPISODES
    niches = _draw_niches(rng, countries, catalogue, slots)
    tastes = unit(
        catalogue.niche_latent[niches] + 0.35 * unit(rng.standard_normal((num_users, slots, LATENT), dtype=np.float32))
    )
    lasting = np.arange(slots) < LONG
    shape = (num_users, slots)
    dormant = rng.random(num_users) < 0.10
    volume = np.minimum(rng.lognormal(3.85, 1.25, num_users), 8_000.0)
    mix = rng.gamma(4.0, 1.0, (num_users, 5)) * np.array([0.42, 0.32, 0.10, 0.06, 0.085])
    mix[:, 2] *= rng.random(num_users) < 0.7  # three in ten never comment
    return People(
        user_ids=_draw_ids(rng, num_users),
        countries=countries,
        utc_offsets=np.array(offsets, dtype=np.int32),
        niches=niches,
        tastes=tastes.astype(np.float32),
        strengths=np.where(lasting, rng.gamma(2.0, 0.5, shape), rng.uniform(1.0, 4.0, shape)).astype(np.float32),
        onsets=np.where(lasting, rng.uniform(0, 120, shape), rng.uniform(-15, DAYS, shape)).astype(np.float32),
        durations=np.where(lasting, rng.uniform(40, 120, shape), rng.uniform(5, 16, shape)).astype(np.float32),
        loyal_seeds=rng.random(shape).astype(np.float32),
        joined=np.where(rng.random(num_users) < 0.25, rng.uniform(0, DAYS - 2, num_users), 0).astype(np.float32),
        num_events=np.where(dormant, rng.integers(0, 4, num_users), np.round(volume)).astype(np.int32),
        mix=(mix / mix.sum(1, keepdims=True)).astype(np.float32),
        hours=rng.dirichlet([1.0, 0.8, 2.0, 0.7], num_users).astype(np.float32),
        weekend=rng.lognormal(0.2, 0.5, num_users).astype(np.float32),
        click_bias=rng.normal(0.0, 0.5, num_users).astype(np.float32),
    )


def draw_follows(rng: np.random.Generator, people: People) -> np.ndarray:
    """Who follows whom, int64 [follows, 2] of user indices: distinct pairs, nobody follows themselves.

    Of twenty follows eight stay in a circle (about 30 people of one country, school or street: nothing to do with
    interests), seven go to somebody with the same main interest, five to somebody well known. Four in ten are returned.
    So friends share interests more than strangers do, but a follow says much less than what people watch and click.
    """
    n = len(people.user_ids)
    order = np.lexsort((rng.random(n), people.countries))  # circles: runs of 30 in a random order within a country
    circles = np.empty(n, dtype=np.int64)
    circles[order] = np.arange(n) // 30
    degree = np.where(rng.random(n) < 0.10, 0, np.minimum(rng.geometric(0.09, n), 200))
    followers = np.repeat(np.arange(n), degree)
    kind = rng.random(len(followers))
    fame = rng.pareto(1.4, n) + 0.05
    in_circle = _draw_peer(rng, circles, np.ones(n), followers)
    same_interest = _draw_peer(rng, people.countries * np.int64(10_000) + people.niches[:, 0], fame, followers)
    well_known = _draw_peer(rng, people.countries.astype(np.int64), fame, followers)
    followed = np.select([kind < 0.4, kind < 0.75], [in_circle, same_interest], well_known)
    returned = rng.random(len(followers)) < 0.4
    pairs = np.stack(
        [np.concatenate([followers, followed[returned]]), np.concatenate([followed, followers[returned]])], axis=1
    )
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(pairs, axis=0)


def _draw_peer(rng: np.random.Generator, groups: np.ndarray, weights: np.ndarray, askers: np.ndarray) -> np.ndarray:
    """For each of `askers` [m] a member of the same group, drawn by weight (perhaps the asker)."""
    order = np.argsort(groups, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(weights[order])])
    sorted_groups = groups[order]
    low = cumulative[np.searchsorted(sorted_groups, groups[askers], side="left")]
    high = cumulative[np.searchsorted(sorted_groups, groups[askers], side="right")]
    place = np.searchsorted(cumulative, low + rng.random(len(askers)) * (high - low), side="right") - 1
    return order[np.clip(place, 0, len(order) - 1)]


def _draw_niches(rng: np.random.Generator, countries: np.ndarray, catalogue: Catalogue, slots: int) -> np.ndarray:
    """A main niche by the country's taste; each further one is in the same topic (2 of 10), in one of two topics
    that go together with it everywhere (4 of 10), or anywhere in the country's taste (4 of 10).
    """
    num_niches, num_topics = len(catalogue.niche_names), len(catalogue.topic_names)
    per_topic = num_niches // num_topics
    tastes = np.cumsum(rng.dirichlet(np.full(num_niches, 2.0), len(COUNTRIES)), axis=1)
    tastes /= tastes[:, -1:]
    companions = np.stack([rng.permutation(num_topics), rng.permutation(num_topics)], axis=1)
    n = len(countries)
    draws = (rng.random((n, slots))[:, :, None] >= tastes[countries][:, None, :]).sum(-1)
    main = catalogue.niche_topics[draws[:, 0]]
    same = main[:, None] * per_topic + rng.integers(0, per_topic, (n, slots))
    related = companions[main[:, None], rng.integers(0, 2, (n, slots))] * per_topic
    related = related + rng.integers(0, per_topic, (n, slots))
    kind = rng.random((n, slots))
    niches = np.select([kind < 0.2, kind < 0.6], [same, related], draws)
    niches[:, 0] = draws[:, 0]
    return niches.astype(np.int16)


def _draw_ids(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct ids with gaps, in no order that tells anything."""
    return rng.permuted(1_000_003 + np.cumsum(rng.integers(1, 18, n))).astype(np.int64)
