"""Retrieval against a model of it in plain Python, to the bit: every number here is exact in float32."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.model import DAY, START, LogParts, SourceRows, write_log
from support.refresh import name_countries

from alure.engine.config import RetrievalConfig
from alure.engine.errors import InputError, Interrupted
from alure.engine.events import Events
from alure.engine.retrieval import CandidateRetriever, retrieve
from alure.engine.retrieval.eligibility import read_eligibility
from alure.engine.retrieval.engagements import Engaged, expand
from alure.engine.retrieval.neighbors import read_neighbors
from alure.engine.store import EmbeddingStore, Generation
from alure.kernels import Candidates, Engagements, NeighborLists, join_candidates

AS_OF = START + 30 * DAY
TYPES = ["click", "conversion", "view"]


@dataclass
class Case:
    """rows: (user, days before as_of, item, event type); graphs: name → user → [(neighbour, similarity)]."""

    rows: list[tuple[int, int, int, str]]
    graphs: dict[str, dict[int, list[tuple[int, float]]]]
    accounts: list[int]
    num_users: int = 6
    config: dict[str, Any] = field(default_factory=dict)
    eligible: list[tuple[int, str | None]] | None = None  # item, country

    def country(self, user: int) -> str:
        return "AR" if user < round(self.num_users / 2) else "BR"

    def may_be_shown(self, item: int, user: int) -> bool:
        return self.eligible is None or bool({(item, None), (item, self.country(user))} & set(self.eligible))

    @property
    def settings(self) -> RetrievalConfig:
        return RetrievalConfig(
            **{
                "half_life": float(DAY),
                "engagement": {"click": 1.0, "conversion": 2.0, "view": 0.0},
                "account_weight": 0.25,
                **self.config,
            }
        )


def write(case: Case, folder: Path) -> tuple[EmbeddingStore, Events]:
    case.config.pop("eligible", None)
    if case.eligible is not None:
        case.config["eligible"] = folder / "eligible.parquet"
        rows = [*case.eligible, (99, None)]  # the log does not know the last
        pq.write_table(
            pa.table({"country": pa.array([c for _, c in rows], pa.string()), "item_id": [i for i, _ in rows]}),
            case.config["eligible"],
        )
    """The case as an event log, and a store with one generation of it and its graphs."""
    user, days, item = (np.array([row[i] for row in case.rows], np.int64) for i in range(3))
    types = np.array([TYPES.index(row[3]) for row in case.rows])
    rows = SourceRows(user, AS_OF - days * DAY, item, types)
    write_log(
        folder / "events",
        LogParts(case.num_users, len(case.accounts), {"ads": rows}, TYPES, np.array(case.accounts)),
    )
    events = name_countries(folder / "events", {"AR": 0.5, "BR": 0.5})
    store = EmbeddingStore(folder / "store", create=True)
    write_users(store, events)
    for name, lists in case.graphs.items():
        store.write_graph("g", name, [graph_rows(lists)], {})
    return store, events


def write_users(store: EmbeddingStore, events: Events) -> None:
    users = events.users
    rows = {
        "user_id": users["user_id"],
        "country": users["country"],
        "embedding": pa.array([[1.0, 0.0]] * len(users), pa.list_(pa.float32())),
        "as_of": [AS_OF] * len(users),
        "model": ["m"] * len(users),
        "num_events": [1] * len(users),
        "refreshed_at": pa.array([0] * len(users), pa.timestamp("us", "UTC")),
    }
    store.write_unit("g", "all", pa.table(rows))
    store.publish(Generation("g", "embeddings", "", len(users), AS_OF, "m", {"k": 1, "d": 2}))


def graph_rows(lists: dict[int, list[tuple[int, float]]]) -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array(list(lists), pa.int64()),
            "country": pa.array(["AR"] * len(lists), pa.string()),
            "neighbor_ids": pa.array([[n for n, _ in row] for row in lists.values()], pa.list_(pa.int64())),
            "similarities": pa.array([[s for _, s in row] for row in lists.values()], pa.list_(pa.float32())),
        }
    )


def model(case: Case, user: int, names: list[str]) -> list[tuple[int, np.float32, str, str]]:
    """(item, score, reason, graphs) of a user, best first."""
    config = case.settings
    brings: dict[int, list[tuple[int, float, str]]] = {}
    engaged, totals = [], dict[int, float]()
    for who, days, item, kind in sorted(case.rows, key=lambda row: (row[0], -row[1])):
        weight = config.engagement.get(kind, 1.0) * 0.5 ** (days * DAY / config.half_life)
        if days >= 0 and weight > 0:
            engaged.append((who, item, weight))
            totals[item] = totals.get(item, 0.0) + weight
    for turn, (who, item, weight) in enumerate(engaged):
        brought = [(item, weight, "exact")]
        others = [i for i in range(len(case.accounts)) if case.accounts[i] == case.accounts[item] >= 0]
        others = [i for i in others if i != item and case.may_be_shown(i, who)]
        best = sorted((i for i in others if i in totals), key=lambda i: (-totals[i], i))[: config.account_items]
        cold = [i for i in others if i not in totals and case.eligible is not None]
        few = min(len(cold), config.cold_items)
        best += [cold[(turn + 1 + j) % len(cold)] for j in range(few)]
        brought += [(i, weight * config.account_weight, "account") for i in best if config.account_weight]
        brings.setdefault(who, []).extend(entry for entry in brought if case.may_be_shown(entry[0], who))
    seen = {item for who, days, item, _ in case.rows if who == user and days >= 0} if config.exclude_seen else set()
    blended: dict[int, tuple[float, set[str], list[str]]] = {}
    for name in names:
        found: dict[int, tuple[float, set[str]]] = {}
        for neighbor, similarity in case.graphs[name].get(user, []):
            for item, weight, reason in brings.get(neighbor, []) if similarity > 0 else []:
                score, reasons = found.get(item, (0.0, set()))
                found[item] = (score + similarity * weight, reasons | {reason})
        ranked = sorted((-np.float32(s), i) for i, (s, _) in found.items() if i not in seen)
        ranked = [(s, i) for s, i in ranked if case.may_be_shown(i, user)]
        ranked = best_of_accounts(case, ranked)[: config.quotas.get(name, config.cap)][: config.cap]
        for score, item in ranked:
            total, reasons, brought = blended.get(item, (0.0, set(), []))
            total += float(np.float32(config.graphs.get(name, 1.0))) * float(score / ranked[0][0])
            blended[item] = (total, reasons | found[item][1], [*brought, name])
    positive = sorted((-np.float32(score), i) for i, (score, _, _) in blended.items() if score > 0)
    order = [i for _, i in best_of_accounts(case, positive)[: config.cap]]
    named = {("exact",): "exact", ("account",): "account", ("account", "exact"): "exact+account"}
    return [(i, np.float32(blended[i][0]), named[tuple(sorted(blended[i][1]))], "+".join(blended[i][2])) for i in order]


def best_of_accounts(case: Case, ranked: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    kept, taken = [], dict[int, int]()
    for entry in ranked:
        account = case.accounts[entry[1]]
        taken[account] = taken.get(account, 0) + 1
        if account < 0 or taken[account] <= (case.settings.account_cap or len(ranked)):
            kept.append(entry)
    return kept


def as_rows(table: pa.Table) -> dict[int, list[tuple[int, np.float32, str, str]]]:
    return {
        row["user_id"]: [
            (i, np.float32(s), r, g)
            for i, s, r, g in zip(row["item_ids"], row["scores"], row["reasons"], row["graphs"])
        ]
        for row in table.to_pylist()
    }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    users, items = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    user, item = st.integers(0, users - 1), st.integers(0, items - 1)
    row = st.tuples(user, st.integers(-3, 6), item, st.sampled_from(TYPES))
    similarity = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])
    lists = st.dictionaries(user, st.lists(st.tuples(st.integers(0, users), similarity), max_size=4), max_size=users)
    config = {
        "cap": draw(st.sampled_from([1, 2, 3, 1500])),
        "account_items": draw(st.sampled_from([0, 1, 2, 5])),
        "account_weight": draw(st.sampled_from([0.0, 0.25, 1.0])),
        "account_cap": draw(st.sampled_from([None, 1, 2])),
        "cold_items": draw(st.sampled_from([0, 1, 2])),
        "quotas": draw(st.sampled_from([{}, {"alure": 1}, {"alure": 2, "social": 1}])),
        "exclude_seen": draw(st.booleans()),
        "graphs": {"alure": 1.0, "social": draw(st.sampled_from([0.0, 0.3, 2.0]))},
    }
    inventory = st.lists(st.tuples(item, st.sampled_from([None, "AR", "BR", "CL"])), max_size=9)
    eligible = draw(st.none() | inventory.map(lambda rows: [(0, "AR"), *rows]))
    return Case(
        eligible=eligible,
        rows=draw(st.lists(row, min_size=1, max_size=30)),
        graphs={"alure": draw(lists), "social": draw(lists)},
        accounts=draw(st.lists(st.integers(-1, 2), min_size=items, max_size=items)),
        num_users=users,
        config=config,
    )


def test_related_ads_are_as_many_whether_the_ad_itself_is_among_the_best_or_not() -> None:
    """Ads 0 to 4 of one account, best first; two related ones each."""
    items, weights = np.array([0, 1, 2, 3, 4, 4, 0], np.int32), np.array([5, 4, 3, 2, 1, 0.5, 0.5], np.float32)
    engaged = Engaged(np.array([0, 5, 6, 7]), items, weights)
    config = RetrievalConfig(account_items=2, account_weight=0.5)
    found = expand(engaged, np.zeros(5, np.int32), config, [(slice(0, 3), None)])
    brought = [part.tolist() for part in found.items.tensor_split(found.offsets[1:-1])]
    assert brought[1:] == [[4, 0, 1], [0, 1, 2]]
    assert found.weights[found.offsets[1] :].tolist() == [0.5, 0.25, 0.25] * 2


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_it_is_the_model(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    store, events = write(case, tmp_path_factory.mktemp("case"))
    for names in (["alure"], ["alure", "social"]):
        report = retrieve(store, events, case.settings, graphs=names)
        table = store.read_candidates(name="+".join(names))
        expected = {user: model(case, user, names) for user in range(case.num_users)}
        assert as_rows(table) == expected
        assert report.users == case.num_users
        assert report.candidates == sum(map(len, expected.values()))
        assert report.users_without_candidates == sum(not row for row in expected.values())
        library = CandidateRetriever(store, events, case.settings, graphs=names)
        asked = [case.num_users - 1, 0, 0]
        assert library.retrieve(asked).to_pylist() == [table.to_pylist()[user] for user in asked]


# user 0: neighbours 1 and 2; account 0 has items 0, 1, 2, account 1 items 3, 4; item 5 has none
SIMPLE = Case(
    rows=[
        (1, 0, 0, "click"),
        (1, 1, 3, "conversion"),
        (2, 0, 0, "click"),
        (2, 2, 5, "click"),
        (3, 0, 1, "click"),
        (3, 0, 1, "click"),
        (3, 1, 2, "click"),
        (0, 5, 3, "view"),
        (2, -1, 4, "click"),
    ],
    graphs={"alure": {0: [(1, 1.0), (2, 0.5)]}, "social": {0: [(3, 1.0)], 4: [(5, 1.0)]}},
    accounts=[0, 0, 0, 1, 1, -1],
)


@pytest.fixture
def simple(tmp_path: Path) -> tuple[EmbeddingStore, Events]:
    return write(SIMPLE, tmp_path)


def test_a_case_by_hand(simple: tuple[EmbeddingStore, Events]) -> None:
    retrieve(*simple, SIMPLE.settings, graphs=["alure"])
    rows = as_rows(simple[0].read_candidates())
    # item 0: 1·1 + 0.5·1; item 3: 1·2·½; items 1, 2 by account: ¼ of item 0; item 5: 0.5·¼; item 4 is of the future
    assert rows[0] == [
        (0, np.float32(1), "exact", "alure"),
        (3, np.float32(1 / 1.5), "exact", "alure"),
        (1, np.float32(0.25), "account", "alure"),
        (2, np.float32(0.25), "account", "alure"),
        (5, np.float32(0.125 / 1.5), "exact", "alure"),
    ]
    assert [user for user, row in rows.items() if row] == [0]  # the others have no neighbours, and a row each


def test_the_future_is_not_seen(simple: tuple[EmbeddingStore, Events], tmp_path: Path) -> None:
    """Without the event after as_of everything is the same."""
    past = Case([row for row in SIMPLE.rows if row[1] >= 0], SIMPLE.graphs, SIMPLE.accounts)
    other = write(past, tmp_path / "past")
    for store, events in (simple, other):
        retrieve(store, events, SIMPLE.settings)
    assert as_rows(simple[0].read_candidates(name="alure+social")) == as_rows(
        other[0].read_candidates(name="alure+social")
    )
    assert simple[0].read_popularity().equals(other[0].read_popularity())


def test_cold_ads_come_in_through_their_account(tmp_path: Path) -> None:
    """Item 4 of account 1 has no engagement by as_of, item 0 is over: it still brings its account's others."""
    case = Case(SIMPLE.rows, SIMPLE.graphs, SIMPLE.accounts, eligible=[(1, None), (3, "AR"), (4, "AR"), (5, "BR")])
    store, events = write(case, tmp_path)
    report = retrieve(store, events, case.settings, graphs=["alure"])
    assert as_rows(store.read_candidates())[0] == [
        (3, np.float32(1), "exact", "alure"),
        (1, np.float32(0.375), "account", "alure"),
        (4, np.float32(0.25), "account", "alure"),
    ]
    assert report.cold_candidates == 1
    assert report.eligible == {"rows": 5, "unknown_items": 1, "unknown_countries": 0, "items": 4}
    assert store.read_popularity()["item_ids"].to_pylist() == [[3], [1]]
    write_inventory = pa.table({"item_id": [5]})
    pq.write_table(write_inventory, case.settings.eligible)
    retrieve(store, events, case.settings, graphs=["alure"])
    assert [row[0] for row in as_rows(store.read_candidates())[0]] == [5]
    assert store.read_popularity()["item_ids"].to_pylist() == [[5], []]  # another inventory in the same file


@pytest.mark.parametrize(
    ("eligible", "given"),  # of each join: users, their engagements
    [
        ([(0, None), (3, None)], [(2, 3)]),  # the same everywhere: users 1 and 2
        ([(0, None), (3, "AR")], [(2, 3), (0, 0)]),  # in BR nobody has a neighbour
        ([(0, None), (3, "DE")], [(2, 2)]),  # where nobody is
    ],
)
def test_countries_that_may_be_shown_the_same_share_a_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eligible: list[tuple[int, str | None]], given: list[Any]
) -> None:
    """And a join is given the engagements of its neighbours alone: with thousands of countries all took hours."""
    store, events = write(Case(SIMPLE.rows, SIMPLE.graphs, SIMPLE.accounts, eligible=eligible), tmp_path)
    settings = SIMPLE.settings.model_copy(update={"eligible": tmp_path / "eligible.parquet", "account_weight": 0.0})
    found = []

    def join(near: NeighborLists, engagements: Engagements, *args: Any, **kwargs: Any) -> Candidates:
        found.append((len(engagements.offsets) - 1, len(engagements.items)))
        return join_candidates(near, engagements, *args, **kwargs)

    monkeypatch.setattr("alure.engine.retrieval.retriever.join_candidates", join)
    retrieve(store, events, settings, graphs=["alure"])
    assert found == given


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"item": [1]}, "expected a column item_id, got item; the nearest is 'item', rename it"),
        ({"item_id": ["1"]}, "expected ids of type int64 as the items of the log, got string"),
        ({"item_id": [77, 78]}, "none of its 2 items is among the 6 of the log"),
        ({"item_id": [1, 2], "country": ["ar", "br"]}, "none of ar, br, … is a country of the log, which has AR, BR"),
        ({"item_id": [1], "country": [["AR", "BR"]]}, "column country: expected text or whole numbers, got list"),
    ],
)
def test_an_inventory_that_cannot_be(
    simple: tuple[EmbeddingStore, Events], tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    path = tmp_path / "inventory.parquet"
    with pytest.raises(InputError, match="does not exist"):
        CandidateRetriever(*simple, RetrievalConfig(eligible=path))
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError, match=message):
        CandidateRetriever(*simple, RetrievalConfig(eligible=path))


def test_an_inventory_in_parts(simple: tuple[EmbeddingStore, Events], tmp_path: Path) -> None:
    """Countries that only the folders' names tell, or only some of the files; an id that fits no int64."""
    folders, files = tmp_path / "folders", tmp_path / "files"
    for country, items in (("AR", [1, 2]), ("BR", [3]), ("__HIVE_DEFAULT_PARTITION__", [4])):
        (folders / f"country={country}").mkdir(parents=True)
        pq.write_table(pa.table({"item_id": items}), folders / f"country={country}" / "part.parquet")
    files.mkdir()
    pq.write_table(pa.table({"item_id": pa.array([4, 2**63 + 4], pa.uint64())}), files / "a.parquet")
    table = {"item_id": [1, 2, 3], "country": pa.array(["AR", "AR", "BR"]).dictionary_encode()}
    pq.write_table(pa.table(table), files / "b.parquet")
    for path in (folders, files):
        eligibility = read_eligibility(path, simple[1])
        assert np.flatnonzero(eligibility.mask("AR")).tolist() == [1, 2, 4]
        assert np.flatnonzero(eligibility.mask("BR")).tolist() == [3, 4]
    assert eligibility.counts == {"rows": 5, "unknown_items": 1, "unknown_countries": 0, "items": 4}
    pq.write_table(pa.table({"item_id": [1, 2, 3], "country": ["AR", "", "DE"]}), tmp_path / "file.parquet")
    eligibility = read_eligibility(tmp_path / "file.parquet", simple[1])
    assert np.flatnonzero(eligibility.mask("AR")).tolist() == [1, 2]  # an empty country is none, as in ingest
    assert eligibility.counts["unknown_countries"] == 1


def test_quotas_keep_a_place_for_every_graph(simple: tuple[EmbeddingStore, Events]) -> None:
    settings = {"cap": 3, "graphs": {"alure": 1.0, "social": 0.01}, "account_weight": 0.0}
    for quotas, expected in (({}, [(0, "alure"), (3, "alure"), (5, "alure")]),
                             ({"alure": 2}, [(0, "alure"), (3, "alure"), (1, "social")])):  # fmt: skip
        retrieve(*simple, SIMPLE.settings.model_copy(update={**settings, "quotas": quotas}))
        rows = as_rows(simple[0].read_candidates(name="alure+social"))
        assert [(item, graphs) for item, _, _, graphs in rows[0]] == expected
    with pytest.raises(InputError, match="quotas: expected graphs among alure, social, ppr, got 'socal'"):
        retrieve(*simple, RetrievalConfig(quotas={"socal": 1}))


def test_what_a_user_has_seen_can_be_left_out(simple: tuple[EmbeddingStore, Events]) -> None:
    """User 0 has viewed item 3: a view weighs nothing here, and is a meeting all the same."""
    retrieve(*simple, SIMPLE.settings.model_copy(update={"exclude_seen": True}), graphs=["alure"])
    assert [row[0] for row in as_rows(simple[0].read_candidates())[0]] == [0, 1, 2, 5]


def test_a_blend_says_which_graphs_brought_an_item(simple: tuple[EmbeddingStore, Events]) -> None:
    config = SIMPLE.settings.model_copy(update={"graphs": {"alure": 1.0, "social": 0.5}})
    report = retrieve(*simple, config)
    rows = as_rows(simple[0].read_candidates(name="alure+social"))
    brought = {item: (reason, graphs) for item, _, reason, graphs in rows[0]}
    assert brought[0] == ("exact+account", "alure+social")
    assert brought[1] == ("exact+account", "alure+social")
    assert brought[5] == ("exact", "alure")
    assert report.name == "alure+social"
    assert report.users_without_neighbors == 4
    assert report.users_without_candidates == 5  # user 4's only neighbour has done nothing
    assert report.reasons["exact+account"] == pytest.approx(3 / 5)
    assert report.graphs == pytest.approx({"alure": 1.0, "social": 3 / 5})
    assert sum(report.histogram["counts"]) == report.users == 6


def test_popularity_is_each_countrys(simple: tuple[EmbeddingStore, Events]) -> None:
    store, events = simple
    retrieve(store, events, SIMPLE.settings, graphs=["alure"])
    assert store.read_popularity().to_pylist() == [
        {"country": "AR", "item_ids": [0, 3, 5], "scores": [2.0, 1.0, 0.25]},
        {"country": "BR", "item_ids": [1, 2], "scores": [2.0, 0.5]},
    ]
    sequence = store.latest("popularity").sequence
    retrieve(store, events, SIMPLE.settings, graphs=["social"])
    assert store.latest("popularity").sequence == sequence  # the same is not written again
    retrieve(store, events, SIMPLE.settings.model_copy(update={"cap": 1}), graphs=["social"])
    assert store.read_popularity()["item_ids"].to_pylist() == [[0], [1]]


def test_chunks_make_no_difference(simple: tuple[EmbeddingStore, Events], monkeypatch: pytest.MonkeyPatch) -> None:
    store, events = simple
    retrieve(store, events, SIMPLE.settings)
    whole = store.read_candidates(name="alure+social")
    monkeypatch.setattr("alure.engine.retrieval.retriever.CHUNK_CANDIDATES", 1)
    monkeypatch.setattr("alure.engine.retrieval.engagements.EXPANDED", 1)
    retrieve(store, events, SIMPLE.settings)
    assert store.read_candidates(name="alure+social").equals(whole)


def test_countries_share_a_chunk_where_they_may_be_shown_the_same(
    simple: tuple[EmbeddingStore, Events], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[int] = []

    def counted(near: NeighborLists, *arguments: Any, **named: Any) -> Candidates:
        joined.append(len(near.offsets) - 1)
        return join_candidates(near, *arguments, **named)

    monkeypatch.setattr("alure.engine.retrieval.retriever.join_candidates", counted)
    retrieve(*simple, SIMPLE.settings, graphs=["alure"])
    assert joined == [SIMPLE.num_users]


def test_lists_of_a_graph_in_any_order(simple: tuple[EmbeddingStore, Events]) -> None:
    _, events = simple
    users = events.users["user_id"].combine_chunks()
    first = graph_rows({4: [(0, 0.5), (99, 0.5)], 1: [], 77: [(0, 1.0)]}).to_batches()
    second = graph_rows({0: [(5, 1.0), (2, 0.25), (3, 0.0)]}).to_batches()
    lists = read_neighbors([*first, *second], users, events)
    assert lists.offsets.tolist() == [0, 2, 2, 2, 2, 3, 3]
    assert lists.ids.tolist() == [5, 2, 0]
    assert lists.similarities.tolist() == [1.0, 0.25, 0.5]
    assert lists.dropped == 2  # user 99 is not in the log, and a similarity of 0 is none
    chunk = lists.rows(3, 5)
    assert (chunk.offsets.tolist(), chunk.ids.tolist()) == ([0, 0, 1], [0])
    assert read_neighbors([], users, events).offsets.tolist() == [0] * 7


def test_a_graph_that_is_not_there(simple: tuple[EmbeddingStore, Events], tmp_path: Path) -> None:
    store, events = simple
    with pytest.raises(InputError, match=r"generation 'g' of graph 'ppr' to be published; published: g \(alure\)"):
        CandidateRetriever(store, events, graphs=["ppr"])
    with pytest.raises(InputError, match="different graphs, got alure, alure"):
        CandidateRetriever(store, events, graphs=["alure", "alure"])
    with pytest.raises(InputError, match="generation 'x' of embeddings"):
        CandidateRetriever(store, events, generation="x")
    with pytest.raises(InputError, match="none of ppr is published"):
        CandidateRetriever(store, events, RetrievalConfig(graphs={"ppr": 1.0}))
    with pytest.raises(InputError, match="user_ids: expected a sequence of ids, got '42'"):
        CandidateRetriever(store, events).retrieve("42")
    with pytest.raises(InputError, match="not among the 6 users"):
        CandidateRetriever(store, events).retrieve([9])


def test_candidates_go_to_another_store(simple: tuple[EmbeddingStore, Events], tmp_path: Path) -> None:
    out = EmbeddingStore(tmp_path / "out", create=True)
    retrieve(*simple, SIMPLE.settings, graphs=["alure"], out=out)
    assert out.read_candidates().num_rows == 6
    assert out.read_popularity().num_rows == 2
    assert simple[0].generations("candidates") == []


def test_a_signal_leaves_no_candidates(simple: tuple[EmbeddingStore, Events], monkeypatch: pytest.MonkeyPatch) -> None:
    store, events = simple

    def stopped(*arguments: Any) -> Iterator[None]:
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(CandidateRetriever, "to_table", stopped)
    with pytest.raises(Interrupted):
        retrieve(store, events, SIMPLE.settings)
    assert store.generations("candidates") == []


def test_a_log_without_types_or_accounts(tmp_path: Path) -> None:
    rows = SourceRows(np.array([1, 2]), np.array([AS_OF, AS_OF]), np.array([0, 1]))
    write_log(tmp_path / "events", LogParts(3, 2, {"ads": rows}))
    events = name_countries(tmp_path / "events", {"all": 1.0})
    store = EmbeddingStore(tmp_path / "store", create=True)
    write_users(store, events)
    store.write_graph("g", "alure", [graph_rows({0: [(2, 1.0), (1, 0.5)]})], {})
    retrieve(store, events)
    assert as_rows(store.read_candidates())[0] == [
        (1, np.float32(1), "exact", "alure"),
        (0, np.float32(0.5), "exact", "alure"),
    ]
