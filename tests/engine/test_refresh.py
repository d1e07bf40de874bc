"""The refresh: batches by token budget, resuming, incremental, interruption; results that depend on none of them."""

import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.events import random_events
from support.model import DAY, START, LogParts, SourceRows, planted_log, write_log
from support.refresh import jagged_log, name_countries, rename_log, rows_of, save_model

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.events import Events, Manifest
from alure.engine.model import UserModel
from alure.engine.model.catalog import Catalog
from alure.engine.model.prepared import PreparedBatch
from alure.engine.refresh import RefreshJob, RefreshReport, embedder
from alure.engine.refresh.embedder import Embedder, Snapshot, Work, token_budget
from alure.engine.refresh.planner import Unit, count_events, pack, plan_units
from alure.engine.store import EmbeddingStore
from alure.engine.store.rows import FINGERPRINT
from alure.engine.store.upkeep import rollback, vacuum, verify
from alure.engine.store.vectors import Vectors

SMALL = RefreshConfig(unit_users=16, token_budget=150, precision="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a checkpoint, and a store that an undisturbed job filled."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events"))
    RefreshJob(folder / "model", folder / "events", folder / "store", config=SMALL).run()
    return folder


def refresh(world: Path, store: Path, config: RefreshConfig = SMALL, **options: Any) -> RefreshReport:
    return RefreshJob(world / "model", world / "events", store, config=config, **options).run()


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 100))
def test_batches_share_out_all_users_within_the_budget(tokens: list[int], budget: int) -> None:
    sizes = np.array(tokens, np.int64)
    batches = pack(sizes, budget)
    assert sorted(np.concatenate([*batches, np.empty(0, int)]).tolist()) == list(range(len(tokens)))
    for batch in batches:
        assert len(batch)
        assert sizes[batch].sum() <= budget or len(batch) == 1
    for batch, following in pairwise(batches):
        assert sizes[batch].sum() + sizes[following[0]] > budget  # no batch is cut short
        assert sizes[batch].min() >= sizes[following].max()  # users of like length share a batch


def test_units_tile_the_users() -> None:
    assert [u.name for u in plan_units(10, 4)] == ["0-4", "4-8", "8-10"]
    assert plan_units(0, 4) == []


@pytest.mark.parametrize("max_events", [None, 3])
def test_events_are_counted_up_to_as_of(world: Path, max_events: int | None) -> None:
    events, unit = Events.open(world / "events"), Unit(2, 40)
    for as_of in (START - 1, START + 2 * DAY, START + 20 * DAY):
        found, tokens = count_events(events, unit, as_of, max_events)
        batch = events.batch(unit.users, as_of)
        limited = events.batch(unit.users, as_of, max_events)
        assert (found == sum(s.lengths.numpy() for s in batch.sequences.values())).all()
        assert (tokens == sum(s.lengths.numpy() for s in limited.sequences.values())).all()


def test_every_user_with_events_has_a_row(world: Path) -> None:
    store, events = EmbeddingStore(world / "store"), Events.open(world / "events")
    store.check_integrity()
    table = store.read_embeddings()
    expected = np.flatnonzero(events.num_events() > 0)
    assert table["user_id"].to_pylist() == expected.tolist()
    assert table["num_events"].to_pylist() == events.num_events()[expected].tolist()
    assert table["country"].to_pylist() == events.users["country"].take(pa.array(expected)).to_pylist()
    published = store.latest("embeddings")
    assert {"k": 2, "d": 16}.items() <= published.properties.items()


@pytest.mark.parametrize("config", [{"token_budget": 1}, {"token_budget": 10**6}, {"unit_users": 7}])
def test_embeddings_do_not_depend_on_units_or_batches(world: Path, tmp_path: Path, config: dict[str, int]) -> None:
    refresh(world, tmp_path, SMALL.model_copy(update=config))
    expected, found = EmbeddingStore(world / "store").read_matrix(), EmbeddingStore(tmp_path).read_matrix()
    assert found.user_ids.equals(expected.user_ids)
    np.testing.assert_allclose(found.values, expected.values, atol=2e-6)


def test_a_batch_is_of_the_size_that_the_workers_device_wants(world: Path, tmp_path: Path) -> None:
    """A cluster's workers may have GPUs where who starts the job has none."""
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    job = RefreshJob(world / "model", world / "events", tmp_path)
    assert [token_budget(job.config, device) for device in devices] == [32_768, 262_144]
    job = RefreshJob(world / "model", world / "events", tmp_path, config=RefreshConfig(token_budget=50))
    assert [token_budget(job.config, device) for device in devices] == [50, 50]


def test_a_user_alone_is_the_user_in_a_batch(world: Path) -> None:
    model, events = UserModel.load(world / "model"), Events.open(world / "events")
    catalog = model.catalog(events)
    with torch.inference_mode():
        for row in EmbeddingStore(world / "store").read_embeddings().to_pylist()[::9]:
            user = events.user_indices([row["user_id"]])
            alone = model(events.batch(user, row["as_of"]), catalog).reshape(-1)
            np.testing.assert_allclose(row["embedding"], alone.numpy(), atol=2e-6)


def test_changing_one_user_leaves_the_others_bit_identical(world: Path, tmp_path: Path) -> None:
    """User 9 clicks other items at the same times, so batches are the same."""
    events = jagged_log(tmp_path / "events")
    columns = events.source("view")
    items = np.array(columns.item)
    mine = slice(columns.offsets[9], columns.offsets[10])
    items[mine] = (items[mine] + 1) % 40
    assert items[mine].size
    np.save(tmp_path / "events" / "sources" / "view" / "item.npy", items)
    RefreshJob(world / "model", tmp_path / "events", tmp_path / "store", config=SMALL).run()
    before, after = rows_of(EmbeddingStore(world / "store")), rows_of(EmbeddingStore(tmp_path / "store"))
    assert [user for user in before if before[user] != after[user]] == [9]


def test_as_of_hides_what_comes_later(world: Path, tmp_path: Path) -> None:
    as_of = START + 3 * DAY
    report = refresh(world, tmp_path, as_of=as_of)
    events = Events.open(world / "events")
    assert report.users == (events.num_events(as_of) > 0).sum() < 58
    assert report.skipped == events.num_users - report.users
    assert report.tokens == events.num_events(as_of).sum()


def test_a_finished_generation_is_left_alone(world: Path) -> None:
    store = EmbeddingStore(world / "store")
    versions = [store.embeddings.open().version(), store.log.log.open().version()]
    report = refresh(world, world / "store", SMALL.model_copy(update={"token_budget": 9}))
    assert report.already_published
    assert (report.embedded_now, report.users, report.units_reused) == (0, 58, 4)
    assert versions == [store.embeddings.open().version(), store.log.log.open().version()]


class Crash(Exception):
    pass


@pytest.mark.parametrize("last", [1, 3])
def test_a_job_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    job = RefreshJob(world / "model", world / "events", tmp_path, config=SMALL)
    write, calls = job.store.write_unit, []

    def crash(*arguments: Any) -> bool:
        if len(calls) == last:
            raise Crash
        calls.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(job.store, "write_unit", crash)
    with pytest.raises(Crash):
        job.run()
    with pytest.raises(InputError, match="nothing of this table is published"):
        EmbeddingStore(tmp_path).read_embeddings()
    report = refresh(world, tmp_path)
    assert (report.units, report.units_reused, report.already_published) == (4, last, False)
    assert rows_of(EmbeddingStore(tmp_path)) == rows_of(EmbeddingStore(world / "store"))


def test_a_job_stopped_before_publishing_publishes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = RefreshJob(world / "model", world / "events", tmp_path, config=SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(job.store, "publish", lambda new: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            job.run()
    report = refresh(world, tmp_path)
    assert (report.units_reused, report.embedded_now, report.already_published) == (4, 0, False)
    assert rows_of(EmbeddingStore(tmp_path)) == rows_of(EmbeddingStore(world / "store"))


def test_a_signal_stops_between_batches(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = RefreshJob(world / "model", world / "events", tmp_path, config=SMALL)
    batch, calls = job.events.batch, []

    def stop_at_third(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(*arguments)

    monkeypatch.setattr(job.events, "batch", stop_at_third)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM; run the same command again"):
        job.run()
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    refresh(world, tmp_path)
    assert rows_of(EmbeddingStore(tmp_path)) == rows_of(EmbeddingStore(world / "store"))


def test_incremental_embeds_who_has_news_and_carries_the_rest(world: Path, tmp_path: Path) -> None:
    """Users 3 (new), 11, 30 and 59 have an event after the first generation's as_of."""
    refresh(world, tmp_path / "store", as_of=START + 8 * DAY)
    before = EmbeddingStore(tmp_path / "store").read_embeddings()
    jagged_log(tmp_path / "events", late=np.array([3, 11, 30, 59]))
    rename_log(tmp_path / "events", "the next day's")
    inputs = (world / "model", tmp_path / "events")
    report = RefreshJob(*inputs, tmp_path / "store", incremental=True, config=SMALL).run()
    full = RefreshJob(*inputs, tmp_path / "full", config=SMALL).run()
    assert (report.users, report.embedded, report.carried, full.embedded) == (59, 4, 55, 59)
    assert report.base == before["generation"][0].as_py()
    assert report.generation != full.generation
    store = EmbeddingStore(tmp_path / "store")
    store.check_integrity()
    old = {row["user_id"]: row for row in before.to_pylist()}
    expected = {row["user_id"]: row for row in EmbeddingStore(tmp_path / "full").read_embeddings().to_pylist()}
    for row in store.read_embeddings(report.generation).to_pylist():
        user = row["user_id"]
        if user in (3, 11, 30, 59):
            np.testing.assert_allclose(row["embedding"], expected[user]["embedding"], atol=2e-6)
            assert row["as_of"] == START + 9 * DAY
        else:
            assert {**row, "generation": None} == {**old[user], "generation": None}
    again = RefreshJob(*inputs, tmp_path / "store", incremental=True, config=SMALL).run()
    assert again.already_published


def test_incremental_sees_events_that_come_late(world: Path, tmp_path: Path) -> None:
    """User 59's event of day 9 was not in the log when day 9's generation was made."""
    refresh(world, tmp_path / "store", as_of=START + 9 * DAY)
    jagged_log(tmp_path / "events", late=np.array([59]))
    job = RefreshJob(
        world / "model", tmp_path / "events", tmp_path / "store", as_of=START + 10 * DAY, incremental=True, config=SMALL
    )
    assert job.run().embedded == 1


def test_incremental_sees_a_deleted_event_beside_a_new_one(world: Path, tmp_path: Path) -> None:
    """The log has as many events of user 59 as before, but not the same; user 30 lost one and user 11 nothing."""
    refresh(world, tmp_path / "store", as_of=START + 8 * DAY)
    events = jagged_log(tmp_path / "events", late=np.array([59]))
    parts = {}
    for name in ("click", "view"):
        columns = events.source(name)
        user = np.repeat(np.arange(60), np.diff(columns.offsets))
        kept = ~np.isin(
            np.arange(len(user)), [columns.offsets[u] for u in (30, 59) if (u % 2 == 0) == (name == "click")]
        )
        parts[name] = SourceRows(user[kept], columns.timestamp[kept], columns.item[kept])
    shutil.rmtree(tmp_path / "events")
    write_log(tmp_path / "events", LogParts(60, 40, parts, item_accounts=np.arange(40) // 4))
    name_countries(tmp_path / "events", {"AR": 0.4, "BR": 0.6})
    rename_log(tmp_path / "events", "corrected")
    inputs = (world / "model", tmp_path / "events")
    report = RefreshJob(*inputs, tmp_path / "store", incremental=True, config=SMALL).run()
    full = RefreshJob(*inputs, tmp_path / "full", config=SMALL).run()
    store = EmbeddingStore(tmp_path / "store")
    made_for = made_for_of(store)
    assert {user for user, as_of in made_for.items() if as_of == report.as_of} == {30, 59}
    expected, found = EmbeddingStore(tmp_path / "full").read_user(59, full.generation), store.read_user(59)
    np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=2e-6)


def made_for_of(store: EmbeddingStore) -> dict[int, int]:
    return {row["user_id"]: row["as_of"] for row in store.read_embeddings().to_pylist()}


def test_incremental_embeds_anew_what_is_too_old(world: Path, tmp_path: Path) -> None:
    """On day 20 nobody has news; embeddings of day 6 and 9 are there."""
    for day in (6, 9):
        refresh(world, tmp_path, as_of=START + day * DAY, incremental=True)
    kept = SMALL.model_copy(update={"max_age": 11 * DAY})
    before = made_for_of(EmbeddingStore(tmp_path))
    old = [user for user, made_for in before.items() if made_for == START + 6 * DAY]
    assert 0 < len(old) < len(before)
    report = refresh(world, tmp_path, kept, as_of=START + 20 * DAY, incremental=True)
    assert report.embedded == len(old)
    assert report.freshness == {"now": len(old), "up to 28 days": len(before) - len(old)}
    everyone = refresh(
        world, tmp_path, SMALL.model_copy(update={"max_age": 0}), as_of=START + 21 * DAY, incremental=True
    )
    assert (everyone.embedded, everyone.carried) == (58, 0)


def test_every_row_is_that_of_a_full_refresh_at_its_time(world: Path, tmp_path: Path) -> None:
    for day in (4, 6, 8):
        refresh(world, tmp_path / "store", as_of=START + day * DAY, incremental=True)
        refresh(world, tmp_path / f"{day}", as_of=START + day * DAY)
    full = {START + d * DAY: EmbeddingStore(tmp_path / f"{d}").read_embeddings().to_pylist() for d in (4, 6, 8)}
    expected = {(row["user_id"], as_of): row for as_of, rows in full.items() for row in rows}
    rows = EmbeddingStore(tmp_path / "store").read_embeddings().to_pylist()
    assert {row["user_id"] for row in rows} == {user for user, as_of in expected if as_of == START + 8 * DAY}
    assert len({row["as_of"] for row in rows}) == 3
    for row in rows:
        want = expected[row["user_id"], row["as_of"]]
        np.testing.assert_allclose(row["embedding"], want["embedding"], atol=2e-6)
        assert row["num_events"] == want["num_events"]


def test_a_time_limit_takes_who_changed_most_first(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh(world, tmp_path, as_of=START + 5 * DAY)
    limited = SMALL.model_copy(update={"max_minutes": 1.0})
    with pytest.raises(InputError, match="needs --incremental and an earlier generation"):
        refresh(world, tmp_path, limited, as_of=START + 9 * DAY)
    events = Events.open(world / "events")
    before, now = events.num_events(START + 5 * DAY), events.num_events(START + 9 * DAY)
    unseen = (now - before) / np.maximum(now, 1)
    monkeypatch.setattr("alure.engine.refresh.job.seconds_a_token", lambda e, o: 60 * 0.9 / (0.5 * o.tokens))
    report = refresh(world, tmp_path, limited, as_of=START + 9 * DAY, incremental=True)
    fresh = {user for user, made_for in made_for_of(EmbeddingStore(tmp_path)).items() if made_for == report.as_of}
    left_over = set(np.flatnonzero(unseen > 0)) - fresh
    assert left_over
    assert min(unseen[list(fresh)]) >= max(unseen[list(left_over)]) - 1e-3
    assert now[list(fresh)].sum() <= 0.5 * now[unseen > 0].sum()
    assert refresh(world, tmp_path, limited, as_of=START + 9 * DAY, incremental=True).already_published
    rest = refresh(world, tmp_path, as_of=START + 9 * DAY, incremental=True)  # without the limit it goes on from there
    assert rest.base == report.generation
    assert rest.embedded_now == len(left_over)
    assert made_for_of(EmbeddingStore(tmp_path)).keys() == set(np.flatnonzero(now))


def test_after_the_deadline_all_are_carried_forward(world: Path, tmp_path: Path) -> None:
    first = refresh(world, tmp_path, as_of=START + 1 * DAY)
    over = SMALL.model_copy(update={"max_minutes": 1e-9})
    report = refresh(world, tmp_path, over, as_of=START + 9 * DAY, incremental=True)
    between = refresh(world, tmp_path, as_of=START + 5 * DAY, incremental=True)
    assert between.base == first.generation  # not what is of a later time, though it was cut short
    known = int((Events.open(world / "events").num_events(START + 1 * DAY) > 0).sum())
    assert (report.embedded, report.carried, report.users) == (0, known, known)
    assert known < 58  # who had no embedding has none yet, and is the first of the next run


def test_a_rolled_back_generation_is_not_published_again(world: Path, tmp_path: Path) -> None:
    for day in (5, 9):
        generation = refresh(world, tmp_path, as_of=START + day * DAY).generation
    store = EmbeddingStore(tmp_path)
    rollback(store)
    with pytest.raises(InputError, match=f"{generation} was rolled back"):
        refresh(world, tmp_path, as_of=START + 9 * DAY)
    vacuum(store, grace_hours=0)
    assert refresh(world, tmp_path, as_of=START + 9 * DAY).embedded_now == 58
    verify(store)


def test_incremental_without_an_earlier_generation_embeds_all(world: Path, tmp_path: Path) -> None:
    report = refresh(world, tmp_path, incremental=True)
    assert (report.embedded, report.carried, report.base) == (58, 0, None)
    assert report.generation == EmbeddingStore(world / "store").latest("embeddings").generation


def test_incremental_never_mixes_models_or_history_lengths(world: Path, tmp_path: Path) -> None:
    refresh(world, tmp_path / "store", as_of=START + 5 * DAY)
    other = save_model(tmp_path / "model", Events.open(world / "events"), seed=1)
    with pytest.raises(InputError, match="embeddings of two models are never mixed"):
        RefreshJob(other, world / "events", tmp_path / "store", incremental=True, config=SMALL).run()
    with pytest.raises(InputError, match="has max_events = None, got 3"):
        refresh(world, tmp_path / "store", SMALL.model_copy(update={"max_events": 3}), incremental=True)
    with pytest.raises(InputError, match="has precision = float32, got bfloat16"):
        refresh(world, tmp_path / "store", SMALL.model_copy(update={"precision": "bfloat16"}), incremental=True)
    RefreshJob(other, world / "events", tmp_path / "store", config=SMALL).run()  # in full it stands beside the other
    assert len(EmbeddingStore(tmp_path / "store").generations("embeddings")) == 2


def test_embeddings_that_are_not_finite_stop_the_job_and_name_users(world: Path, tmp_path: Path) -> None:
    model = UserModel.load(world / "model")
    with torch.no_grad():
        for parameter in model.compression.parameters():
            parameter.fill_(float("nan"))
    job = RefreshJob(model, world / "events", tmp_path, config=SMALL)
    with pytest.raises(AlureError, match=r"embeddings of .* users are not finite, among them 0"):
        job.run()
    assert job.store.generations() == []


@pytest.mark.parametrize("depth", [0, 2])  # 2: rows are made and refused beside the next unit
@pytest.mark.parametrize("config", [{}, {"token_budget": 1}, {"unit_users": 7}])
def test_poison_users_are_left_out_and_kept_apart(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, int], depth: int
) -> None:
    """Users 5 and 23 have a vector whose square is infinite; who is refused does not depend on batches or units."""
    monkeypatch.setattr(embedder, "overlap_depth", lambda device: depth)
    events, poisoned = jagged_log(tmp_path / "events"), [5, 23]
    for name in ("click", "view"):
        offsets = events.source(name).offsets
        dense = np.zeros((int(offsets[-1]), 2), np.float32)
        for user in poisoned:
            dense[offsets[user] : offsets[user + 1]] = 3e38
        np.save(tmp_path / "events" / "sources" / name / "dense.npy", dense)
    manifest = Manifest.read(tmp_path / "events")
    manifest.model_copy(update={"event_dense_dims": {"click": 2, "view": 2}}).write(tmp_path / "events")
    save_model(tmp_path / "model", Events.open(tmp_path / "events"))
    inputs = (tmp_path / "model", tmp_path / "events", tmp_path / "store")
    with pytest.raises(AlureError, match="among them 5"):
        RefreshJob(*inputs, config=SMALL).run()
    assert EmbeddingStore(tmp_path / "store").read_quarantine().num_rows == 0
    lenient = SMALL.model_copy(update={"max_quarantine_share": 0.05, **config})
    report = RefreshJob(*inputs, config=lenient).run()
    assert (report.quarantined, report.users) == (2, 56)
    store = EmbeddingStore(tmp_path / "store")
    assert not set(poisoned) & set(store.read_embeddings()["user_id"].to_pylist())
    store.check_integrity()
    refused = store.read_quarantine().to_pylist()
    assert sorted(row["row"] for row in refused) == ['{"user_id": 23}', '{"user_id": 5}']
    assert {row["origin"] for row in refused} == {f"refresh {report.generation}"}


def test_who_was_left_out_before_an_interruption_counts(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finite = Vectors.finite
    monkeypatch.setattr(Vectors, "finite", lambda self: finite(self) & (np.arange(len(self.values)) > 0))
    lenient = SMALL.model_copy(update={"max_quarantine_share": 0.1})
    stopped = mock.patch.object(RefreshJob, "_check_drift", side_effect=Interrupted("refresh: stopped"))
    with stopped, pytest.raises(Interrupted):
        refresh(world, tmp_path, lenient)
    strict = SMALL.model_copy(update={"max_quarantine_share": 0.05})
    with pytest.raises(AlureError, match=r"4 users have no finite embedding, more than max_quarantine_share .*\(2\)"):
        refresh(world, tmp_path, strict)
    assert EmbeddingStore(tmp_path).generations() == []
    assert refresh(world, tmp_path, lenient).quarantined == 4


@pytest.mark.parametrize("change", [-1, 1])
def test_nothing_is_published_unless_rows_are_as_many_as_users(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    write = EmbeddingStore.write_unit

    def changed(self: EmbeddingStore, generation: str, unit: str, rows: pa.Table) -> bool:
        if unit == "0-16":
            other = rows.slice(0, 1).set_column(0, "user_id", pa.array([999]))
            rows = rows.slice(1) if change < 0 else pa.concat_tables([rows, other])
        return write(self, generation, unit, rows)

    monkeypatch.setattr(EmbeddingStore, "write_unit", changed)
    with pytest.raises(AlureError, match=f"expected 58 rows, one a user with an event, found {58 + change}; nothing"):
        refresh(world, tmp_path)
    assert EmbeddingStore(tmp_path).generations() == []


def test_users_that_do_not_fit_in_memory_together_go_in_halves(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = UserModel.pool

    def small(self: UserModel, batch: Any, catalog: Any) -> torch.Tensor:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(self, batch, catalog)

    monkeypatch.setattr(UserModel, "pool", small)
    refresh(world, tmp_path)
    expected, found = EmbeddingStore(world / "store").read_matrix(), EmbeddingStore(tmp_path).read_matrix()
    np.testing.assert_allclose(found.values, expected.values, atol=2e-6)
    monkeypatch.setattr(UserModel, "pool", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(AlureError, match="events of one user do not fit in the memory"):
        refresh(world, tmp_path / "none")


def test_bfloat16_is_another_generation_near_the_float32_one(world: Path, tmp_path: Path) -> None:
    model = UserModel.load(world / "model")
    in_half = SMALL.model_copy(update={"precision": "bfloat16"})
    report = RefreshJob(model, world / "events", tmp_path, config=in_half).run()
    assert report.precision == "bfloat16"
    assert model.dtype == torch.float32  # the caller's own model stays as it is
    exact = EmbeddingStore(world / "store").read_embeddings()
    half = EmbeddingStore(tmp_path).read_embeddings()
    assert half["generation"][0] != exact["generation"][0]
    assert half["user_id"].equals(exact["user_id"])
    a, b = (torch.tensor(t["embedding"].to_pylist()).unflatten(1, (report.k, report.d)) for t in (exact, half))
    assert not torch.equal(a, b)
    assert torch.cosine_similarity(a, b, dim=-1).min() > 0.999
    torch.testing.assert_close(b.norm(dim=-1), torch.ones(b.shape[:2]), rtol=0, atol=1e-2)


def test_a_model_in_memory_is_not_the_checkpoint(world: Path, tmp_path: Path) -> None:
    report = RefreshJob(UserModel.load(world / "model"), world / "events", tmp_path, config=SMALL).run()
    assert report.model != EmbeddingStore(world / "store").latest("embeddings").model
    with pytest.raises(InputError, match="need the model as a path"):
        RefreshJob(UserModel.load(world / "model"), world / "events", tmp_path, workers=2)


def test_bad_times_and_workers_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no user has an event up to as_of"):
        refresh(world, tmp_path, as_of=START - 1)
    with pytest.raises(InputError, match="as_of: expected unix seconds as an int, got '2026-11-01'"):
        refresh(world, tmp_path, as_of="2026-11-01")
    with pytest.raises(InputError, match="milliseconds"):
        refresh(world, tmp_path, as_of=START * 1000)
    with pytest.raises(InputError, match="workers: expected at least 1"):
        refresh(world, tmp_path, workers=0)
    with pytest.raises(InputError, match="expected one of local, ray, spark, got 'dask'"):
        refresh(world, tmp_path, engine="dask")
    assert EmbeddingStore(tmp_path).generations() == []


def test_a_log_that_is_replaced_meanwhile_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nightly ingest puts another log into the place of the one that a refresh reads."""
    model = save_model(tmp_path / "model", random_events(tmp_path))
    RefreshJob(model, tmp_path / "events", tmp_path / "undisturbed", config=SMALL).run()
    late = RefreshJob(model, tmp_path / "events", tmp_path / "late", config=SMALL)
    begin, begun = Embedder.begin, []

    def and_replace(self: Embedder, unit: Unit, store: EmbeddingStore) -> Any:
        if not begun:
            random_events(tmp_path, seed=1, num_users=30)
        begun.append(unit)
        return begin(self, unit, store)

    monkeypatch.setattr(Embedder, "begin", and_replace)
    RefreshJob(model, tmp_path / "events", tmp_path / "store", config=SMALL).run()
    stores = [EmbeddingStore(tmp_path / name) for name in ("undisturbed", "store")]
    assert rows_of(stores[0]) == rows_of(stores[1])
    users, columns = range(1_000, 1_040), ["user_id", FINGERPRINT]
    found = [store.read_written(store.latest("embeddings").generation, users, columns) for store in stores]
    assert found[0].sort_by("user_id").equals(found[1].sort_by("user_id"))
    with pytest.raises(InputError, match="another one has taken the place of"):
        late.run()


def test_a_long_job_is_estimated_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted_log(tmp_path / "events", num_users=60)
    events = name_countries(tmp_path / "events", {"BR": 1.0})
    save_model(tmp_path / "model", events, layers=1)
    config = RefreshConfig(token_budget=40)
    report = RefreshJob(tmp_path / "model", events, tmp_path / "store", config=config).run()
    said = capsys.readouterr().err
    assert f"60 users with {report.tokens:,} events in 1 units" in said
    assert "s with --workers 1" in said


def test_a_batch_keeps_to_the_budget(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = UserModel.load(world / "model"), Events.open(world / "events")
    snapshot = Snapshot("g", START + 20 * DAY, "m", None, RefreshConfig(token_budget=50, precision="float32"))
    embedder = Embedder(model, events, snapshot, torch.device("cpu"))
    totals: list[tuple[int, int]] = []
    pool = model.pool

    def counted(batch: PreparedBatch, catalog: Catalog) -> torch.Tensor:
        totals.append((sum(len(s.events.timestamps) for s in batch.sources.values()), len(batch)))
        return pool(batch, catalog)

    monkeypatch.setattr(model, "pool", counted)
    users = np.array([40, 5, 8, 1, 22, 30, 31])
    tokens = events.num_events(users=users)
    vectors, work = embedder.embed(users, tokens, Work().add)
    assert max(total for total, _ in totals) == tokens[1] == 200  # user 5: a longer history is a batch of its own
    assert all(total <= 50 or size == 1 for total, size in totals)
    assert work.batches == len(totals)
    order = embedder.embed(users[::-1].copy(), tokens[::-1].copy(), Work().add)[0]
    np.testing.assert_allclose(vectors.values[::-1], order.values, atol=2e-6)
