"""The story of a few users: what they did, who is like them, and which ads that brings, with the reason of each."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alure.engine.config import Config
from alure.engine.evaluation.truth import engagements, indices, read_truth
from alure.engine.events import Events, History
from alure.engine.store import EmbeddingStore, Generation

STORIES = 6
SAMPLE = 300  # users among whom the stories are looked for
HISTORY = 12  # newest events told
NEIGHBORS = 8
ADS = 12
EVENTS = (30, 600)  # a history that can be told
MOST_EVENTS = 400  # newest events of a source in the timeline


def tell_stories(
    store: EmbeddingStore, events: Events, chosen: Generation, config: Config, truth: Path | None, planted: Path | None
) -> list[dict[str, Any]]:
    """Up to STORIES users of a generation: first those whose later engagements were among their candidates, then
    others, of different countries where there are. [] where the generation has no graph or no candidates.

    Each: user_id, country, interest, num_events, timeline [{source, days before as_of}], history, neighbors, ads.
    """
    names = [g.name for g in store.generations("candidates") if g.generation == chosen.generation]
    graphs = [g.name for g in store.generations("graph") if g.generation == chosen.generation]
    if not names or not graphs:
        return []
    blend = max(names, key=lambda name: ("alure" in name.split("+"), len(name)))
    graph = "alure" if "alure" in graphs else graphs[0]

    totals = events.num_events(chosen.as_of)
    eligible = np.flatnonzero((totals >= EVENTS[0]) & (totals <= EVENTS[1]))
    if not len(eligible):
        eligible = np.flatnonzero(totals > 0)
    sample = np.sort(np.random.default_rng(config.seed).permutation(eligible)[:SAMPLE])
    ids = events.users["user_id"].take(pa.array(sample))
    lists = store.read_candidates(chosen.generation, blend, users=ids.to_pylist())
    rows = read_truth(truth, chosen.as_of, events.manifest.ad_sources) if truth else None
    later = _later_engagements(engagements(rows, config.evaluation.truth_types), ids) if rows else {}
    picked = _pick(lists, later)
    neighbors = store.read_graph(chosen.generation, graph, users=[row["user_id"] for row in picked])
    links = {row["user_id"]: row for row in neighbors.to_pylist()}
    history = events.engagements(chosen.as_of)
    interests = _interests(planted)
    stories = []
    for row in picked:
        user = int(events.user_indices([row["user_id"]])[0])
        link = links.get(row["user_id"], {"neighbor_ids": [], "similarities": []})
        told = {
            "user_id": row["user_id"],
            "country": row["country"],
            "interest": interests.get(row["user_id"]),
            "num_events": int(totals[user]),
            "blend": blend,
            "graph": graph,
            **_past(events, user, chosen.as_of),
            **_similar(events, history, row, link, later.get(row["user_id"], {})),
        }
        stories.append(told)
    return stories


def _pick(lists: pa.Table, later: dict[Any, dict[Any, str]]) -> list[dict[str, Any]]:
    """Two thirds users with a hit among their best ads, the rest without; countries take turns."""
    rows = [row for row in lists.to_pylist() if row["item_ids"]]
    hits = {row["user_id"]: len(set(row["item_ids"][:ADS]) & set(later.get(row["user_id"], {}))) for row in rows}
    with_hit = _take_turns([row for row in rows if hits[row["user_id"]]])
    without = _take_turns([row for row in rows if not hits[row["user_id"]]])
    many = min(len(with_hit), max(STORIES - STORIES // 3, STORIES - len(without)))
    return with_hit[:many] + without[: STORIES - many]


def _take_turns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows so that each country comes once before any comes twice."""
    seen: dict[str, int] = {}
    turns = []
    for place, row in enumerate(rows):
        turns.append((seen.get(row["country"], 0), place))
        seen[row["country"]] = turns[-1][0] + 1
    return [rows[place] for _, place in sorted(turns)]


def _later_engagements(rows: pa.Table, ids: pa.ChunkedArray) -> dict[Any, dict[Any, str]]:
    """{user: {item: event type}} of what users `ids` did after the snapshot."""
    found: dict[Any, dict[Any, str]] = {}
    for row in rows.filter(pa.array(indices(rows["user_id"], ids) >= 0)).to_pylist():
        found.setdefault(row["user_id"], {})[row["item_id"]] = row["event_type"] or "engaged"
    return found


def _interests(planted: Path | None) -> dict[Any, str]:
    if planted is None or not planted.exists():
        return {}
    table = pq.read_table(planted, columns=["user_id", "interest"])
    return dict(zip(table["user_id"].to_pylist(), table["interest"].to_pylist()))


def _title(events: Events, item: int) -> str:
    title = events.items.table["title"][item].as_py()
    return title or f"item {events.items.item_ids[item].as_py()}"


def _past(events: Events, user: int, as_of: int) -> dict[str, Any]:
    """Timeline (days before the snapshot, per source) and the newest events."""
    batch = events.batch(np.array([user]), as_of, max_events=MOST_EVENTS)
    timeline, newest = [], []
    for source, sequence in batch.sequences.items():
        times = sequence.timestamps.numpy()
        timeline.append({"source": source, "days": np.round((as_of - times) / 86_400, 2).tolist()})
        types = [*events.manifest.event_types, ""]
        for place in range(max(0, len(times) - HISTORY), len(times)):
            kind = types[int(sequence.event_types[place])]
            newest.append((int(times[place]), source, kind, int(sequence.items[place])))
    newest.sort(reverse=True)
    history = [
        {"days": round((as_of - when) / 86_400, 2), "source": source, "type": kind, "title": _title(events, item)}
        for when, source, kind, item in newest[:HISTORY]
    ]
    return {"timeline": timeline, "history": history}


def _similar(
    events: Events, history: History, row: dict[str, Any], link: dict[str, Any], later: dict[Any, str]
) -> dict[str, Any]:
    """The nearest users with ads they engaged with, and the best ads with how many of those users engaged."""
    ads = row["item_ids"][:ADS]
    ad_index = events.item_indices(ads)
    neighbor_index = events.user_indices(link["neighbor_ids"])
    viewed = events.manifest.event_types.index("view") if "view" in events.manifest.event_types else -2
    engaged = []
    for user in neighbor_index:
        mine = slice(int(history.offsets[user]), int(history.offsets[user + 1])) if user >= 0 else slice(0, 0)
        engaged.append(history.items[mine][history.event_types[mine] != viewed])
    neighbors = []
    for user_id, similarity, items in list(zip(link["neighbor_ids"], link["similarities"], engaged))[:NEIGHBORS]:
        shared = items[np.isin(items, ad_index)]
        shown = list(dict.fromkeys([*shared[::-1].tolist(), *items[::-1].tolist()]))[:2]
        neighbors.append(
            {
                "user_id": user_id,
                "similarity": round(float(similarity), 4),
                "titles": [_title(events, i) for i in shown],
            }
        )
    told = []
    for place, item in enumerate(ads):
        told.append(
            {
                "item_id": item,
                "title": _title(events, int(ad_index[place])) if ad_index[place] >= 0 else f"item {item}",
                "score": round(float(row["scores"][place]), 4),
                "reason": row["reasons"][place],
                "graph": row["graphs"][place],
                "by": int(sum(bool((items == ad_index[place]).any()) for items in engaged)),
                "later": later.get(item),
            }
        )
    found = sum(item in set(row["item_ids"]) for item in later)
    return {
        "neighbors": neighbors,
        "num_neighbors": len(link["neighbor_ids"]),
        "ads": told,
        "num_ads": len(row["item_ids"]),
        "later": len(later),
        "later_found": found,
    }
