"""What can be engaged with: advertisers and their ads, creators and their posts and videos, and pages of both.

Planted: topics are directions in a latent space, niches lie around their topic, accounts around their niche, items
around their account. `dense` content vectors are noisy, rotated views of an item's latent vector.
"""

from dataclasses import dataclass

import numpy as np

from alure.engine.world.names import (
    BRAND_FIRST,
    BRAND_SECOND,
    CREATOR_FIRST,
    CREATOR_SECOND,
    POSTS,
    TOPICS,
    VIDEOS,
)

LATENT = 24  # dimensions of interest space
DENSE = 32  # dimensions of a content vector
DAYS = 63  # 60 days of history and 3 of truth
KINDS = ("ad", "post", "video", "page")
FIRST_ID = {"ad": 10_000_001, "post": 20_000_001, "video": 30_000_001, "page": 40_000_001}


@dataclass(frozen=True)
class Catalogue:
    """All items, those of one kind together (ads first), sorted by niche within a kind."""

    item_ids: np.ndarray  # int64 [items]
    kinds: np.ndarray  # int8 [items], index into KINDS
    niches: np.ndarray  # int16 [items]
    topics: np.ndarray  # int16 [items]
    accounts: np.ndarray  # int32 [items], index of the advertiser or creator
    account_ids: np.ndarray  # int64 [accounts]
    latent: np.ndarray  # float32 [items, LATENT], unit vectors
    dense: np.ndarray  # float32 [items, DENSE]
    start_days: np.ndarray  # float32 [items], first day on offer; negative: before the log begins
    lifetimes: np.ndarray  # float32 [items], days on offer
    appeal: np.ndarray  # float32 [items], popularity weight, heavy-tailed
    quality: np.ndarray  # float32 [items], added to the logit of a click
    reach: np.ndarray  # bool [accounts, countries], where an account's items are shown
    titles: list[str]
    niche_latent: np.ndarray  # float32 [niches, LATENT], unit vectors
    niche_names: list[str]
    topic_names: list[str]
    niche_topics: np.ndarray  # int16 [niches]

    def of_kind(self, kind: str) -> np.ndarray:
        """Indices of the items of `kind`, a contiguous range."""
        return np.flatnonzero(self.kinds == KINDS.index(kind))


def build_catalogue(rng: np.random.Generator, num_users: int, num_countries: int) -> Catalogue:
    """Accounts and items for a world of `num_users`: 5,000 users see about 4,000 ads of 500 advertisers."""
    topic_names = list(TOPICS)
    niche_names = [niche for niches in TOPICS.values() for niche in niches]
    niche_topics = np.repeat(np.arange(len(topic_names)), [len(n) for n in TOPICS.values()]).astype(np.int16)
    centres = unit(rng.standard_normal((len(topic_names), LATENT)))
    niche_latent = unit(centres[niche_topics] + 0.8 * unit(rng.standard_normal((len(niche_names), LATENT))))

    scale = (num_users / 5_000) ** 0.7
    advertisers, creators = max(48, round(500 * scale)), max(24, round(150 * scale))
    account_niches = np.concatenate([_spread(rng, count, len(niche_names)) for count in (advertisers, creators)])
    num_accounts = advertisers + creators
    account_latent = unit(niche_latent[account_niches] + 0.35 * unit(rng.standard_normal((num_accounts, LATENT))))
    reach = _draw_reach(rng, num_accounts, num_countries)
    account_names = [*_brands(rng, advertisers), *_creators(rng, creators)]

    owners: dict[str, np.ndarray] = {
        "ad": np.repeat(np.arange(advertisers), rng.integers(3, 14, advertisers)),
        "post": rng.integers(advertisers, num_accounts, max(150, round(4_000 * scale))),
        "video": rng.integers(advertisers, num_accounts, max(100, round(2_500 * scale))),
        "page": np.arange(num_accounts),
    }
    owners = {kind: o[np.lexsort((o, account_niches[o]))] for kind, o in owners.items()}
    accounts = np.concatenate([owners[kind] for kind in KINDS]).astype(np.int32)
    kinds = np.repeat(np.arange(len(KINDS)), [len(owners[kind]) for kind in KINDS]).astype(np.int8)
    niches = account_niches[accounts].astype(np.int16)
    latent = unit(account_latent[accounts] + 0.25 * unit(rng.standard_normal((len(accounts), LATENT))))
    latent[kinds == KINDS.index("page")] = account_latent
    rotation = np.linalg.qr(rng.standard_normal((DENSE, LATENT)))[0].T  # [LATENT, DENSE], orthonormal rows
    dense = latent @ rotation + 0.08 * rng.standard_normal((len(accounts), DENSE))
    start_days, lifetimes = _draw_calendar(rng, kinds)
    return Catalogue(
        item_ids=np.concatenate([np.arange(len(owners[k])) + FIRST_ID[k] for k in KINDS]).astype(np.int64),
        kinds=kinds,
        niches=niches,
        topics=niche_topics[niches],
        accounts=accounts,
        account_ids=(np.arange(num_accounts) + 5_001).astype(np.int64),
        latent=latent.astype(np.float32),
        dense=dense.astype(np.float32),
        start_days=start_days.astype(np.float32),
        lifetimes=lifetimes.astype(np.float32),
        appeal=rng.lognormal(0.0, 0.9, len(accounts)).astype(np.float32),
        quality=rng.normal(0.0, 0.4, len(accounts)).astype(np.float32),
        reach=reach,
        titles=_titles(rng, kinds, niches, accounts, niche_names, account_names),
        niche_latent=niche_latent.astype(np.float32),
        niche_names=niche_names,
        topic_names=topic_names,
        niche_topics=niche_topics,
    )


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _spread(rng: np.random.Generator, count: int, niches: int) -> np.ndarray:
    """A niche for each account: every niche gets its turn before a second one comes, in shuffled order."""
    return rng.permuted(np.arange(count) % niches)


def _draw_reach(rng: np.random.Generator, accounts: int, countries: int) -> np.ndarray:
    """A third of the accounts are global; the others reach a home country and each other one with odds of 1 in 5."""
    reach = rng.random((accounts, countries)) < 0.2
    reach[np.arange(accounts), rng.integers(0, countries, accounts)] = True
    reach[rng.random(accounts) < 0.35] = True
    return reach


def _draw_calendar(rng: np.random.Generator, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First day on offer and days on offer: campaigns of weeks, posts of days, pages for ever."""
    n = len(kinds)
    start = rng.uniform(-35.0, DAYS, n)
    lifetime = np.select(
        [kinds == 0, kinds == 1, kinds == 2],
        [rng.uniform(14.0, 60.0, n), rng.uniform(7.0, 30.0, n), rng.uniform(14.0, 60.0, n)],
        default=10 * DAYS,
    )
    return np.where(kinds == KINDS.index("page"), -100.0, start), lifetime


def _brands(rng: np.random.Generator, count: int) -> list[str]:
    return _combine(rng, count, BRAND_FIRST, BRAND_SECOND, "{}{}")


def _creators(rng: np.random.Generator, count: int) -> list[str]:
    return _combine(rng, count, CREATOR_FIRST, CREATOR_SECOND, "{} {}")


def _combine(
    rng: np.random.Generator, count: int, first: tuple[str, ...], second: tuple[str, ...], pattern: str
) -> list[str]:
    """Distinct names; past the number of combinations they carry a number."""
    combinations = rng.permutation(len(first) * len(second))
    names = []
    for i in range(count):
        turn, place = divmod(i, len(combinations))
        a, b = divmod(int(combinations[place]), len(second))
        names.append(pattern.format(first[a], second[b]) + (f" {turn + 1}" if turn else ""))
    return names


def _titles(
    rng: np.random.Generator,
    kinds: np.ndarray,
    niches: np.ndarray,
    accounts: np.ndarray,
    niche_names: list[str],
    account_names: list[str],
) -> list[str]:
    products = [p for topic in TOPICS.values() for p in topic.values()]
    turns = rng.integers(0, 1 << 20, len(kinds)).tolist()
    titles = []
    for kind, niche, account, turn in zip(kinds.tolist(), niches.tolist(), accounts.tolist(), turns):
        name, owner = niche_names[niche], account_names[account]
        if kind == 0:
            titles.append(f"{products[niche][turn % len(products[niche])]} · {owner}")
        elif kind == 3:
            titles.append(f"{owner} (page)")
        else:
            phrases = POSTS if kind == 1 else VIDEOS
            text = phrases[turn % len(phrases)].format(name)
            titles.append(f"{text[0].upper()}{text[1:]} · {owner}")
    return titles
