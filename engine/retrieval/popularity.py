"""The most engaged ads of each country: the baseline, and what a user without neighbours can be shown."""

import numpy as np
import pyarrow as pa

from alure.engine.events import Events
from alure.engine.retrieval.eligibility import Eligibility
from alure.engine.retrieval.engagements import Engaged


def popular_items(engaged: Engaged, events: Events, cap: int, eligibility: Eligibility | None = None) -> pa.Table:
    """country, item_ids, scores: the `cap` ads of the largest total weight among the country's users, best first."""
    rows = []
    for country in events.manifest.countries:
        users = slice(engaged.offsets[country.first_user], engaged.offsets[country.first_user + country.num_users])
        totals = np.bincount(engaged.items[users], engaged.weights[users], minlength=len(events.items))
        ads = np.flatnonzero((totals > 0) & (True if eligibility is None else eligibility.mask(country.name)))
        ads = ads[np.lexsort((ads, -totals[ads]))][:cap]
        rows.append((country.name, ads, totals[ads].astype(np.float32)))
    sizes = np.array([len(ads) for _, ads, _ in rows])
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    items = np.concatenate([ads for _, ads, _ in rows]) if rows else np.empty(0, np.int64)
    scores = np.concatenate([scores for _, _, scores in rows]) if rows else np.empty(0, np.float32)
    return pa.table(
        {
            "country": pa.array([name for name, _, _ in rows], pa.string()),
            "item_ids": pa.ListArray.from_arrays(offsets, events.items.item_ids.take(pa.array(items)).combine_chunks()),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores)),
        }
    )
