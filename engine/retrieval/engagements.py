"""What every user brings to those it is a neighbour of: ads it engaged with, and other ads of their accounts, weighted.

    weight(event) = engagement[event type] · 0.5^((T − t) / half_life)
    an event on ad i of account a brings  (i, weight, exact)
                                     and  (j, account_weight · weight, account)  for the account's best other ads j
Only events up to T = as_of of ad sources count; an account's best ads are those of the largest total weight by then.
"""

from dataclasses import dataclass

import numpy as np
import torch

from alure.engine.config import RetrievalConfig
from alure.engine.events import History
from alure.kernels import Engagements

EXACT, ACCOUNT = 1, 2  # bits of a reason
REASONS = ["", "exact", "account", "exact+account"]  # by bits


@dataclass(frozen=True)
class Engaged:
    """Weighted engagements of every user of the log as one CSR matrix; weights are above 0."""

    offsets: np.ndarray  # int64 [num_users + 1]
    items: np.ndarray  # int32 [n]
    weights: np.ndarray  # float32 [n]


def weigh(history: History, event_types: list[str], as_of: int, config: RetrievalConfig) -> Engaged:
    """The events of `history` that count for something, with their weights."""
    by_type = np.array([config.engagement.get(name, 1.0) for name in event_types] + [1.0], np.float32)  # last: no type
    age = as_of - history.timestamps  # int64; float32 seconds of this decade would be rounded by up to 64 s
    weights = by_type[history.event_types] * np.exp2(-age / config.half_life).astype(np.float32)
    counts = weights > 0
    return Engaged(kept_offsets(history.offsets, counts), history.items[counts], weights[counts])


def kept_offsets(offsets: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Offsets of what is left of a CSR matrix; kept: bool [n]."""
    before = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(kept, out=before[1:])
    return before[offsets]


@dataclass(frozen=True)
class AccountAds:
    """The best ads of each account: account a's are `items[offsets[a] : offsets[a + 1]]`, best first."""

    offsets: np.ndarray  # int64 [num_accounts + 1]
    items: np.ndarray  # int32


def best_of_accounts(engaged: Engaged, accounts: np.ndarray, count: int) -> AccountAds:
    """accounts: int32 [num_items], −1 for none. At most `count` ads an account, by total weight, ties by lower item."""
    totals = np.bincount(engaged.items, engaged.weights, minlength=len(accounts))
    ads = np.flatnonzero((totals > 0) & (accounts >= 0))
    ads = ads[np.lexsort((ads, -totals[ads], accounts[ads]))]
    owners = accounts[ads]
    num_accounts = int(accounts.max(initial=-1)) + 1
    starts = np.searchsorted(owners, np.arange(num_accounts))
    best = np.arange(len(ads)) - starts[owners] < count
    offsets = np.searchsorted(owners[best], np.arange(num_accounts + 1))
    return AccountAds(offsets, ads[best].astype(np.int32))


def expand(engaged: Engaged, accounts: np.ndarray, config: RetrievalConfig) -> Engagements:
    """Each engagement followed by the other ads of its account: what `join_candidates` takes."""
    count = config.account_items if config.account_weight > 0 else 0
    best = best_of_accounts(engaged, accounts, count + 1)  # one more: the exact ad may be among them
    owner = accounts[engaged.items].astype(np.int64)
    account_sizes = np.append(np.diff(best.offsets), 0)  # the last is of owner −1, no account
    sizes = account_sizes[owner] if count else np.zeros_like(owner)
    total = len(owner) + int(sizes.sum())
    places = np.arange(len(owner)) + np.cumsum(sizes) - sizes  # of each engagement; its account's ads follow it
    source = np.repeat(np.arange(len(owner)), sizes + 1)
    nth = np.arange(total) - places[source] - 1  # −1: the engagement itself
    items, weights = engaged.items[source], engaged.weights[source]
    reasons = np.full(total, EXACT, np.uint8)
    others = nth >= 0
    reasons[others] = ACCOUNT
    items[others] = best.items[best.offsets[owner[source[others]]] + nth[others]]
    weights[others] *= np.float32(config.account_weight)
    exact_again = others & (items == engaged.items[source])
    # of count + 1 ads, without the exact one `count` are left; where it is not among them, the last goes
    has_exact = np.bincount(source[exact_again], minlength=len(owner)) > 0
    kept = ~exact_again & ~(others & (nth == count) & ~has_exact[source])
    ends = np.append(places, total)[engaged.offsets]
    return Engagements(
        offsets=torch.from_numpy(kept_offsets(ends, kept)),
        items=torch.from_numpy(items[kept]),
        weights=torch.from_numpy(weights[kept]),
        reasons=torch.from_numpy(reasons[kept]),
    )


def seen_items(history: History) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [num_users + 1], items int32 ascending and unique within a user): every ad a user has met."""
    user = np.repeat(np.arange(len(history.offsets) - 1, dtype=np.int64), np.diff(history.offsets))
    pairs = np.unique((user << 32) | history.items)
    offsets = np.searchsorted(pairs >> 32, np.arange(len(history.offsets)))
    return offsets.astype(np.int64), (pairs & 0xFFFFFFFF).astype(np.int32)
