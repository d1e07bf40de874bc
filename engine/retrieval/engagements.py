"""What every user brings to those it is a neighbour of: ads it engaged with, and other ads of their accounts, weighted.

    weight(event) = engagement[event type] · 0.5^((T − t) / half_life)
    an event on ad i of account a brings  (i, weight, exact)
                                     and  (j, account_weight · weight, account)  for the account's best other ads j,
                                                                                 and its cold ads in turn
Only events up to T = as_of of ad sources count; an account's best ads are those of the largest total weight by then.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from alure.engine.config import RetrievalConfig
from alure.engine.events import History
from alure.kernels import Engagements, NeighborLists

EXACT, ACCOUNT = 1, 2  # bits of a reason
REASONS = ["", "exact", "account", "exact+account"]  # by bits
EXPANDED = 1 << 18  # engagements expanded at once
MOST_DOUBLINGS = 64.0  # of an event after T: a half-life of minutes must not take float32 to infinity


@dataclass(frozen=True)
class Engaged:
    """Weighted engagements of every user of the log as one CSR matrix; weights are above 0."""

    offsets: np.ndarray  # int64 [num_users + 1]
    items: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]


def weigh(history: History, event_types: list[str], as_of: int, config: RetrievalConfig) -> Engaged:
    """The events of `history` that count for something, with their weights; of t after T, too."""
    by_type = np.array([config.engagement.get(name, 1.0) for name in event_types] + [1.0], np.float32)  # last: no type
    age = as_of - history.timestamps  # int64; float32 seconds of this decade would be rounded by up to 64 s
    weights = by_type[history.event_types] * np.exp2(np.minimum(-age / config.half_life, MOST_DOUBLINGS)).astype(
        np.float32
    )
    counts = weights > 0
    return Engaged(kept_offsets(history.offsets, counts), history.items[counts], weights[counts])


def kept_offsets(offsets: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Offsets of what is left of a CSR matrix; kept: bool [n]."""
    before = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(kept, out=before[1:])
    return before[offsets]


@dataclass(frozen=True)
class AccountAds:
    """Ads of each account: account a's are `items[offsets[a] : offsets[a + 1]]`."""

    offsets: np.ndarray  # int64 [num_accounts + 1]
    items: np.ndarray  # int32

    @classmethod
    def of(cls, ads: np.ndarray, accounts: np.ndarray) -> "AccountAds":
        """ads: item indices, ascending by account."""
        num_accounts = int(accounts.max(initial=-1)) + 1
        return cls(np.searchsorted(accounts[ads], np.arange(num_accounts + 1)), ads.astype(np.int32))

    @property
    def sizes(self) -> np.ndarray:
        """int64 [num_accounts + 1]; the last is of account −1, none."""
        return np.append(np.diff(self.offsets), 0)


def rank_of_accounts(totals: np.ndarray, accounts: np.ndarray) -> np.ndarray:
    """The engaged ads that have an account, by account, best first: by total weight [num_items], ties by lower item.

    accounts: int32 [num_items], −1 for none.
    """
    ads = np.flatnonzero((totals > 0) & (accounts >= 0))
    return ads[np.lexsort((ads, -totals[ads], accounts[ads]))]


def best_of_accounts(ranked: np.ndarray, accounts: np.ndarray, count: int, eligible: np.ndarray | None) -> AccountAds:
    """The first `count` ads an account. ranked: from `rank_of_accounts`. eligible: bool [num_items], None for all."""
    ads = ranked if eligible is None else ranked[eligible[ranked]]
    whole = AccountAds.of(ads, accounts)
    rank = np.arange(len(ads)) - whole.offsets[accounts[ads]]
    return AccountAds.of(ads[rank < count], accounts)


def cold_of_accounts(totals: np.ndarray, accounts: np.ndarray, eligible: np.ndarray | None) -> AccountAds:
    """The ads that may be shown and nobody has engaged yet. Without an inventory there are none: a log knows an ad by
    its events, and one without an event by now is known from what comes later.
    """
    ads = np.flatnonzero((totals == 0) & (accounts >= 0) & (False if eligible is None else eligible))
    return AccountAds.of(ads[np.argsort(accounts[ads], kind="stable")], accounts)


@dataclass(frozen=True)
class Inventory:
    """What engagements with an account's ads bring besides, where `eligible` may be shown."""

    best: AccountAds
    cold: AccountAds
    eligible: np.ndarray | None  # bool [num_items], None for all

    @classmethod
    def of(
        cls,
        totals: np.ndarray,
        ranked: np.ndarray,
        accounts: np.ndarray,
        config: RetrievalConfig,
        eligible: np.ndarray | None,
    ) -> "Inventory":
        """totals: weight of all engagements of each ad; ranked: `rank_of_accounts` of them."""
        brings = config.account_weight > 0
        best = best_of_accounts(ranked, accounts, config.account_items + 1 if brings else 0, eligible)
        return cls(best, cold_of_accounts(totals, accounts, eligible if brings else None), eligible)


def expand(
    engaged: Engaged,
    accounts: np.ndarray,
    config: RetrievalConfig,
    inventories: Iterable[tuple[slice, np.ndarray | None]],
) -> Engagements:
    """Each engagement with ads of its account: what `join_candidates` takes.

    inventories: (users, what may be shown where they are: bool [num_items], None for all), tiling the users.
    """
    totals = np.bincount(engaged.items, engaged.weights, minlength=len(accounts))
    ranked = rank_of_accounts(totals, accounts)
    parts = []
    for users, eligible in inventories:
        inventory = Inventory.of(totals, ranked, accounts, config, eligible)
        bounds = engaged.offsets[users.start : users.stop + 1]
        for block in _blocks(bounds):
            parts.append(expand_users(engaged, block, accounts, config, inventory))
    columns = zip(*parts)
    sizes, items, weights, reasons = (torch.from_numpy(np.concatenate(column)) for column in columns)
    offsets = torch.zeros(len(engaged.offsets), dtype=torch.int64)
    torch.cumsum(sizes, 0, out=offsets[1:])
    return Engagements(offsets, items, weights, reasons)


def _blocks(bounds: np.ndarray) -> Iterator[np.ndarray]:
    """Offsets of runs of whole users with about EXPANDED engagements each; at least one run."""
    first = 0
    while True:
        last = int(np.searchsorted(bounds, bounds[first] + EXPANDED, side="right")) - 1
        last = min(max(last, first + 1), len(bounds) - 1)
        yield bounds[first : last + 1]
        if (first := last) >= len(bounds) - 1:
            return


def expand_users(
    engaged: Engaged, bounds: np.ndarray, accounts: np.ndarray, config: RetrievalConfig, ads: Inventory
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(what each user brings, items, weights, reasons) of the users whose engagements are bounds[0] to bounds[-1]."""
    event = np.arange(bounds[0], bounds[-1])
    exact = engaged.items[event]
    owner = accounts[exact].astype(np.int64)
    num_best, num_cold = ads.best.sizes[owner], ads.cold.sizes[owner]
    widths = 1 + num_best + np.minimum(num_cold, config.cold_items)
    source = np.repeat(np.arange(len(event)), widths)
    nth = np.arange(len(source)) - np.repeat(np.cumsum(widths) - widths, widths)  # 0: the engagement itself
    items, weights = exact[source], engaged.weights[event][source]
    reasons = np.full(len(source), EXACT, np.uint8)
    reasons[nth > 0] = ACCOUNT
    weights[nth > 0] *= np.float32(config.account_weight)

    is_best = (nth > 0) & (nth <= num_best[source])
    items[is_best] = ads.best.items[ads.best.offsets[owner[source[is_best]]] + nth[is_best] - 1]
    is_cold = nth > num_best[source]
    from_ = source[is_cold]
    turn = event[from_] + nth[is_cold] - num_best[from_]  # another engagement brings other cold ads
    items[is_cold] = ads.cold.items[ads.cold.offsets[owner[from_]] + turn % num_cold[from_]]

    # of account_items + 1 best, without the exact one account_items are left; where it is not among them, the last goes
    exact_again = is_best & (items == exact[source])
    has_exact = np.bincount(source[exact_again], minlength=len(event)) > 0
    kept = ~exact_again & ~(is_best & (nth == config.account_items + 1) & ~has_exact[source])
    if ads.eligible is not None:
        kept &= ads.eligible[items]  # an ad that is over still brings its account's
    starts = np.append(np.cumsum(widths) - widths, len(source))[bounds - bounds[0]]
    return np.diff(kept_offsets(starts, kept)), items[kept], weights[kept], reasons[kept]


def within_reach(near: NeighborLists, engagements: Engagements) -> tuple[NeighborLists, Engagements]:
    """Both as far as the lists from the lowest neighbour to the highest go: a join checks all that it is given, and
    users of a country lie side by side.
    """
    first, last = (int(near.ids.min()), int(near.ids.max()) + 1) if len(near.ids) else (0, 0)
    begin, end = engagements.offsets[[first, last]].tolist()
    return replace(near, ids=near.ids - first), Engagements(
        engagements.offsets[first : last + 1] - begin,
        engagements.items[begin:end],
        engagements.weights[begin:end],
        engagements.reasons[begin:end],
    )


def seen_items(history: History) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [num_users + 1], items int32 ascending and unique within a user): every ad a user has met."""
    user = np.repeat(np.arange(len(history.offsets) - 1, dtype=np.int64), np.diff(history.offsets))
    pairs = np.sort((user << 32) | history.items)
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    offsets = np.searchsorted(pairs >> 32, np.arange(len(history.offsets)))
    return offsets.astype(np.int64), (pairs & 0xFFFFFFFF).astype(np.int32)
