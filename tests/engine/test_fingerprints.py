"""Fingerprints of histories, and what an incremental refresh sees by them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.events import DAY, START, make_events, random_table
from support.refresh import save_model
from support.store import generation, unit

from alure.engine.config import RefreshConfig
from alure.engine.events import Events, fingerprints
from alure.engine.events.fingerprints import FINGERPRINTS_FILE
from alure.engine.refresh import RefreshJob
from alure.engine.store import EmbeddingStore
from alure.engine.store.rows import EMBEDDING_COLUMNS, FINGERPRINT, embedding_schema

CONFIG = RefreshConfig(unit_users=16, precision="float32")
ITEMS = [{"item_id": 5_000 + i, "dense": [float(i), 0.0], "semantic_ids": [i, 3]} for i in range(60)]


def by_user(events: Events, as_of: int | None = None) -> dict[Any, int]:
    return dict(zip(events.users["user_id"].to_pylist(), events.fingerprints(as_of).tolist()))


def changed(table: pa.Table, row: int, **values: Any) -> pa.Table:
    """`table` with other values in one row."""
    rows = table.to_pylist()
    rows[row] |= values
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return random_table()


def test_the_same_history_has_the_same_fingerprint_in_any_log(tmp_path: Path, table: pa.Table) -> None:
    """Others' rows move every index; a column that only they have changes nothing."""
    ids = sorted(set(table["user_id"].to_pylist()))
    some = table.filter(pa.compute.less(table["user_id"], ids[20])).drop_columns(["event_type", "utc_offset"])
    more = [
        {"user_id": -1, "timestamp": START, "source": "aaa", "item_id": -9, "country": "AA", "account_id": -7,
         "event_type": "x", "utc_offset": 60, "semantic_ids": [1, 2], "dense": [1.0]},
    ]  # fmt: skip
    few = by_user(make_events(tmp_path, some, name="few"))
    many = by_user(make_events(tmp_path, some.to_pylist()[::-1] + more, name="many"))
    assert few == {user: many[user] for user in few}
    assert len(set(many.values())) == len(many) == 21


@pytest.mark.parametrize(
    "values",
    [
        {"timestamp": START + 1}, {"item_id": 1_000}, {"source": "mail"}, {"account_id": 1_000},
        {"category_id": "new"}, {"event_type": "mystery"}, {"utc_offset": 17},
    ],
)  # fmt: skip
def test_every_column_that_a_model_reads_counts(tmp_path: Path, table: pa.Table, values: dict[str, Any]) -> None:
    before, after = (make_events(tmp_path, t, name=n) for n, t in (("a", table), ("b", changed(table, 7, **values))))
    then, now = by_user(before), by_user(after)
    assert [user for user in then if now[user] != then[user]] == [table["user_id"][7].as_py()]


@pytest.mark.parametrize("change", [{"dense": [5.0, 0.5]}, {"semantic_ids": [5, 4]}])
def test_content_of_items_and_of_events_counts(tmp_path: Path, table: pa.Table, change: dict[str, Any]) -> None:
    items = [item | change if item["item_id"] == 5_005 else item for item in ITEMS]
    before = make_events(tmp_path, table, ITEMS, name="a")
    after = make_events(tmp_path, table, items, name="b")
    then, now = by_user(before), by_user(after)
    who = set(table.filter(pa.compute.equal(table["item_id"], 5_005))["user_id"].to_pylist())
    assert {user for user in then if now[user] != then[user]} == who
    assert 0 < len(who) < 40
    rows = [{**row, "dense": [1.0, 0.0], "semantic_ids": [1, 1]} for row in table.to_pylist()]
    then = by_user(make_events(tmp_path, rows, name="c"))
    rows[7] |= change
    now = by_user(make_events(tmp_path, rows, name="d"))
    assert [user for user in then if now[user] != then[user]] == [rows[7]["user_id"]]


@settings(max_examples=10)
@given(seed=st.integers(0, 1_000), block=st.sampled_from([1, 3, 1 << 20]))
def test_those_of_a_part_are_those_of_a_log_that_ends_there(
    tmp_path_factory: pytest.TempPathFactory, seed: int, block: int
) -> None:
    """Whole histories as `ingest` left them, others from their events, in blocks of any size."""
    folder, rng = tmp_path_factory.mktemp("part"), np.random.default_rng(seed)
    table, as_of = random_table(20, 30, 100, seed), START + int(rng.integers(0, 30 * DAY))
    events = make_events(folder, table, name="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alure.engine.events.reader.BLOCK_ROWS", block)
        patch.setattr(fingerprints, "BLOCK_ROWS", block)
        found = by_user(events, as_of)
        (events.path / FINGERPRINTS_FILE).unlink()
        assert by_user(Events.open(events.path), as_of) == found
    part = table.filter(pa.compute.less_equal(table["timestamp"], as_of))
    expected = by_user(make_events(folder, part, name="part")) if len(part) else {}
    assert found == {user: expected.get(user, 0) for user in found}


def test_incremental_sees_what_was_replaced_in_place(tmp_path: Path, table: pa.Table) -> None:
    """One user's event is of another item now, and an item's vector another; nobody has more or fewer events."""
    events = make_events(tmp_path, table, ITEMS, name="events")
    model, store = save_model(tmp_path / "model", events), tmp_path / "store"
    RefreshJob(model, events, store, config=CONFIG).run()
    same = RefreshJob(model, events, store, as_of=START + 40 * DAY, incremental=True, config=CONFIG).run()
    assert (same.embedded, same.carried) == (0, 40)
    items = [item | ({"dense": [9.0, 9.0]} if item["item_id"] == 5_003 else {}) for item in ITEMS]
    later = make_events(tmp_path, changed(table, 7, item_id=1), items, name="later")
    who = {*table.filter(pa.compute.equal(table["item_id"], 5_003))["user_id"].to_pylist(), table["user_id"][7].as_py()}
    report = RefreshJob(model, later, store, as_of=START + 41 * DAY, incremental=True, config=CONFIG).run()
    rows = EmbeddingStore(store).read_embeddings(report.generation).to_pylist()
    assert {row["user_id"] for row in rows if row["as_of"] == report.as_of} == who
    full = RefreshJob(model, later, tmp_path / "full", as_of=START + 41 * DAY, config=CONFIG).run()
    assert (full.embedded, report.embedded) == (40, len(who))
    assert 1 < len(who) < 40
    expected = {row["user_id"]: row for row in EmbeddingStore(tmp_path / "full").read_embeddings().to_pylist()}
    for row in rows:
        if row["user_id"] in who:
            np.testing.assert_allclose(row["embedding"], expected[row["user_id"]]["embedding"], atol=2e-6)


def test_incremental_over_many_countries_and_a_user_who_moves(tmp_path: Path) -> None:
    """Units hold one country, parts of two, or several whole ones."""
    table = random_table(countries=("AR", "BR", "CL", "DE", "ES", "FR", "GB"))
    events = make_events(tmp_path, table, name="events")
    model, user = save_model(tmp_path / "model", events), table["user_id"][7].as_py()
    moved = [{**row, "country": "ZZ"} if row["user_id"] == user else row for row in table.to_pylist()]
    later = make_events(tmp_path, moved, name="later")
    for unit_users in (3, 16, 100):
        config, store = CONFIG.model_copy(update={"unit_users": unit_users}), tmp_path / f"{unit_users}"
        first = RefreshJob(model, events, store, config=config).run()
        report = RefreshJob(model, later, store, as_of=START + 40 * DAY, incremental=True, config=config).run()
        assert (report.users, report.embedded, report.carried) == (40, 1, 39)
        opened = EmbeddingStore(store)
        opened.check_integrity()
        before, after = (
            {row["user_id"]: row for row in opened.read_embeddings(generation).to_pylist()}
            for generation in (first.generation, report.generation)
        )
        assert after[user]["country"] == "ZZ"
        assert {u for u in after if after[u]["embedding"] != before[u]["embedding"]} <= {user}
        assert {u for u in after if after[u]["country"] != before[u]["country"]} == {user}


def test_a_store_of_a_version_before_goes_on(tmp_path: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows have no fingerprint: they are read as ever, and carried forward only where a time limit says so."""
    events = make_events(tmp_path, table, name="events")
    model, path = save_model(tmp_path / "model", events), tmp_path / "store"

    def schema_before(ids: pa.DataType, dtype: Any = "float32") -> pa.Schema:
        schema = embedding_schema(ids, dtype)
        return schema.remove(schema.get_field_index(FINGERPRINT))

    monkeypatch.setattr("alure.engine.store.embedding_store.embedding_schema", schema_before)
    RefreshJob(model, events, path, config=CONFIG).run()
    monkeypatch.undo()
    store = EmbeddingStore(path)
    assert FINGERPRINT not in store.embeddings.schema().names
    before = store.read_embeddings()
    assert before.schema.names == EMBEDDING_COLUMNS
    limited = CONFIG.model_copy(update={"max_minutes": 1e-9, "unit_users": 7})
    straight = shutil.copytree(path, tmp_path / "straight")  # no row has the column yet
    old = RefreshJob(model, events, straight, as_of=START + 35 * DAY, incremental=True, config=limited).run()
    assert (old.embedded, old.carried) == (0, 40)
    RefreshJob(model, events, path, as_of=START + 40 * DAY, config=CONFIG.model_copy(update={"unit_users": 7})).run()
    assert EmbeddingStore(path).read_embeddings(before["generation"][0].as_py()).equals(before)
    limited = CONFIG.model_copy(update={"max_minutes": 1e-9})
    old = RefreshJob(model, events, path, as_of=START + 35 * DAY, incremental=True, config=limited).run()
    assert (old.embedded, old.carried) == (0, 40)
    report = RefreshJob(model, events, path, as_of=START + 36 * DAY, incremental=True, config=CONFIG).run()
    assert (report.base, report.embedded) == (old.generation, 40)
    report = RefreshJob(model, events, path, as_of=START + 37 * DAY, incremental=True, config=CONFIG).run()
    assert (report.embedded, report.carried) == (0, 40)
    EmbeddingStore(path).check_integrity()


def test_a_column_is_added_once(tmp_path: Path) -> None:
    """By two writers that both found it missing, beside one that knows nothing of it."""
    stores = [EmbeddingStore(tmp_path, create=True) for _ in range(2)]
    plain = embedding_schema(pa.int64())
    stores[0].embeddings.ensure(plain.remove(plain.get_field_index(FINGERPRINT)))
    tables = [store.embeddings.open() for store in stores]
    missing = [plain.field(FINGERPRINT)]
    for store, found in zip(stores, tables):
        assert FINGERPRINT in store.embeddings._add(found, missing).schema().to_arrow().names
    assert stores[1].write_unit("g", "0-1", unit([1]))
    stores[0].publish(generation(1))
    assert stores[0].read_embeddings()["user_id"].to_pylist() == [1]
