"""Cached keys and values: embeddings as of a whole history, whatever happened to the log or to the cache's files."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model import DAY, START, LogParts, SourceRows, tiny_model, write_log
from support.refresh import jagged_log, name_countries, rename_log, save_model

from alure.engine.config import RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import EventBatch, Events, EventSequence
from alure.engine.events.reader import indices_of
from alure.engine.model import EventSchema, UserModel
from alure.engine.model.flops import ForwardFlops
from alure.engine.model.key_values import EventHashes, KeyValues, extend, key_value_width
from alure.engine.refresh import RefreshJob, embedder
from alure.engine.refresh.report import RefreshReport
from alure.engine.store import EmbeddingStore
from alure.engine.store.kv_cache import KvCache, Segments, SegmentWriter, schema_of
from alure.engine.store.upkeep import rollback, vacuum

CAUSAL: dict[str, Any] = {"causal": True, "encoders": ["frequency", "gap", "cyclic"]}
KEEPING = RefreshConfig(kv_cache=True, precision="float32", unit_users=25, token_budget=120)
WHOLE = RefreshConfig(precision="float32")


def causal_model(events: Events, **changes: Any) -> UserModel:
    """Untrained, with biases and gates that say something."""
    torch.manual_seed(1)
    config = tiny_model(**{**CAUSAL, **changes})
    model = UserModel(config, EventSchema.of(events.manifest)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "bias" in name or "gate" in name or not parameter.any():
            parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    return jagged_log(tmp_path_factory.mktemp("kv") / "events")


def nothing_known(model: UserModel, batch: EventBatch) -> dict[str, KeyValues]:
    return {
        stack.source: KeyValues(
            torch.zeros(len(batch), dtype=torch.int64),
            torch.full(
                (batch.sequences[stack.source].total, key_value_width(stack, model.config.width)),
                torch.nan,
                dtype=model.dtype,
            ),
        )
        for stack in model.sources()
    }


def cut(known: dict[str, KeyValues], batch: EventBatch, cached: dict[str, torch.Tensor]) -> dict[str, KeyValues]:
    """Only the first events of each user; the others' rows are poison."""
    left = {}
    for source, kv in known.items():
        sequence = batch.sequences[source]
        places = torch.arange(sequence.total) - sequence.offsets[:-1].repeat_interleave(sequence.lengths)
        lost = places >= cached[source].repeat_interleave(sequence.lengths)
        left[source] = KeyValues(cached[source], kv.values.masked_fill(lost[:, None], torch.nan))
    return left


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"window": 3}, {"time_bias": False}, {"position_bias": False}, {"compression": "interaction"},
        {"taps": [(1, "click"), (2, "view")]}, {"sources": {"view": {"heads": 4, "window": 5}}}, {"encoders": []},
    ],
    ids=str,
)  # fmt: skip
def test_any_part_of_a_history_may_be_cached(events: Events, changes: dict[str, Any]) -> None:
    model = causal_model(events, **changes)
    catalog, batch = model.catalog(events), events.batch(range(60), events.manifest.last_timestamp)
    expected, known = model.pool(batch, catalog), nothing_known(model, batch)
    torch.testing.assert_close(extend(model, batch, catalog, known), expected, atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(3)
    for share in (torch.rand(60, generator=generator), torch.ones(60), torch.rand(60, generator=generator).round()):
        cached = {name: (s.lengths * share).long() for name, s in batch.sequences.items()}
        part = cut(known, batch, cached)
        torch.testing.assert_close(extend(model, batch, catalog, part), expected, atol=1e-5, rtol=1e-5)
        for source, kv in part.items():  # what was lost is there again
            torch.testing.assert_close(kv.values, known[source].values, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_it_errs_no_more_than_a_whole_pass(events: Events) -> None:
    exact = causal_model(events)
    catalog, batch = exact.catalog(events), events.batch(range(60), events.manifest.last_timestamp)
    expected = exact.pool(batch, catalog)
    model = causal_model(events).to(dtype=torch.bfloat16)
    known = nothing_known(model, batch)
    extend(model, batch, catalog, known)
    part = cut(known, batch, {name: s.lengths // 2 for name, s in batch.sequences.items()})
    error = (extend(model, batch, catalog, part).float() - expected).norm()
    assert error <= 1.5 * (model.pool(batch, catalog).float() - expected).norm()


def test_flops_saved_are_those_of_a_history_without_its_taps(events: Events) -> None:
    model = causal_model(events, window=4)
    flops, lengths = ForwardFlops(model), {"click": np.array([9, 0, 3]), "view": np.array([2, 5, 0])}
    none = {name: np.zeros(3, int) for name in lengths}
    assert flops.saved(none) == 0
    of_taps = sum(source.pooled * lengths[name].sum() for name, source in flops.sources.items())
    of_users = sum(source.user * np.count_nonzero(lengths[name]) for name, source in flops.sources.items())
    assert flops(lengths) - flops.saved(lengths) == of_taps + of_users + 3 * flops.user


# ---- fingerprints


def hashes_of(events: Events, sequence: EventSequence) -> EventHashes:
    return EventHashes(causal_model(events).catalog(events), "click", sequence)


def test_a_fingerprint_is_of_the_first_events_alone(events: Events) -> None:
    early, late = (events.batch(range(60), START + day * DAY).sequences["click"] for day in (4, 9))
    assert int(late.lengths.sum()) > int(early.lengths.sum())
    assert torch.equal(
        hashes_of(events, late).of_first(early.lengths), hashes_of(events, early).of_first(early.lengths)
    )


@given(st.data())
@settings(max_examples=60)
def test_a_fingerprint_sees_every_change(events: Events, data: st.DataObject) -> None:
    sequence = events.batch(range(60), events.manifest.last_timestamp).sequences["click"]
    extras = {"utc_offsets": torch.zeros_like(sequence.items), "dense": torch.rand(sequence.total, 3)}
    sequence = replace(sequence, **extras)
    catalog = causal_model(events).catalog(events)
    catalog = replace(catalog, schema=catalog.schema.model_copy(update={"event_dense_dims": {"click": 3}}))
    before = EventHashes(catalog, "click", sequence).of_first(sequence.lengths)
    row = data.draw(st.integers(0, sequence.total - 1))
    column = data.draw(st.sampled_from(["timestamps", "counts", "items", "accounts", *extras]))
    changed = getattr(sequence, column).clone()
    if column == "dense":
        changed[row, data.draw(st.integers(0, 2))] += 1
    else:
        changed[row] = (changed[row] + 1) % 10 if column in ("items", "accounts") else changed[row] + 1
    after = EventHashes(catalog, "click", replace(sequence, **{column: changed})).of_first(sequence.lengths)
    user = int(torch.searchsorted(sequence.offsets, row, right=True)) - 1
    assert ((after != before).nonzero().flatten().tolist()) == [user]


def test_a_fingerprint_sees_order(events: Events) -> None:
    sequence = events.batch([5], events.manifest.last_timestamp).sequences["view"]
    rows = torch.arange(sequence.total)
    rows[[3, 9]] = rows[[9, 3]]
    swapped = replace(sequence, items=sequence.items[rows])
    assert int(sequence.items[3]) != int(sequence.items[9])
    found = [hashes_of(events, s).of_first(s.lengths) for s in (sequence, swapped)]
    assert not torch.equal(*found)


# ---- jobs


class Days:
    """A store that is refreshed day after day, beside whole refreshes for the same days."""

    def __init__(self, folder: Path, num_users: int = 60, **changes: Any) -> None:
        self.folder, self.store = folder, folder / "store"
        self.events = jagged_log(folder / "events", num_users=num_users)
        self.model = save_model(folder / "model", self.events, **{**CAUSAL, **changes})

    def refresh(self, day: int, config: RefreshConfig = KEEPING, workers: int = 1, **options: Any) -> RefreshReport:
        options = {"incremental": True, "as_of": START + day * DAY, **options}
        job = RefreshJob(self.model, self.folder / "events", self.store, config=config, workers=workers, **options)
        return job.run()

    def check(self, report: RefreshReport, config: RefreshConfig = WHOLE) -> None:
        """Whoever was embedded has the embedding of a whole refresh."""
        whole = RefreshJob(self.model, self.folder / "events", self.folder / "whole", as_of=report.as_of, config=config)
        everyone = EmbeddingStore(self.folder / "whole").read_matrix(whole.run().generation)
        found = EmbeddingStore(self.store).read_embeddings(report.generation)
        new = np.flatnonzero(found["as_of"].to_numpy() == report.as_of)
        assert len(new) == report.embedded
        users = found["user_id"].to_numpy()
        assert users.tolist() == everyone.user_ids.to_pylist()
        values = np.stack(found["embedding"].to_numpy())
        np.testing.assert_allclose(values[new], everyone.values[new], atol=1e-5)

    def events_of(self, report: RefreshReport, day: int) -> int:
        """Events up to `day` of the users that were embedded."""
        rows = EmbeddingStore(self.store).read_embeddings(report.generation)
        embedded = rows.filter(np.asarray(rows["as_of"]) == report.as_of)["user_id"]
        events = Events.open(self.folder / "events")
        return int(events.num_events(START + day * DAY, events.user_indices(embedded)).sum())


@pytest.fixture
def days(tmp_path: Path) -> Days:
    return Days(tmp_path)


def test_day_after_day_only_new_events_run(days: Days) -> None:
    first = days.refresh(4)
    assert first.tokens_reused == 0
    for before, day, workers in ((4, 6, 1), (6, 8, 2)):
        report = days.refresh(day, workers=workers)
        days.check(report)
        assert report.tokens_reused == days.events_of(report, before) > 0
        assert report.flops < 0.6 * first.flops * report.tokens / first.tokens


def test_a_longer_way_back(days: Days) -> None:
    """Users without news on a day are carried on; their segments lie generations back."""
    for day in range(3, 9):
        report = days.refresh(day)
    days.check(report)
    assert report.tokens_reused == days.events_of(report, 7)
    days.check(days.refresh(9, RefreshConfig(kv_cache=True, precision="float32", unit_users=25, max_age=DAY // 2)))


def test_int8_embeddings(days: Days) -> None:
    config = KEEPING.model_copy(update={"output_dtype": "int8"})
    days.refresh(4, config)
    report = days.refresh(8, config)
    assert report.tokens_reused > 0
    whole = days.folder / "whole"
    as_of = {"as_of": report.as_of}
    RefreshJob(days.model, days.events, whole, config=WHOLE.model_copy(update={"output_dtype": "int8"}), **as_of).run()
    found, expected = (EmbeddingStore(s).read_matrix() for s in (days.store, whole))
    carried = report.carried
    assert (np.abs(found.values - expected.values).max(axis=1) > 0.02).sum() <= carried


def test_a_log_with_more_users_and_other_indices(days: Days) -> None:
    """Users are known by their ids, items by what the model reads of them."""
    days.refresh(4)
    shutil.rmtree(days.folder / "events")
    rng = np.random.default_rng(5)
    old = jagged_log(days.folder / "old")
    more = {"click": rng.integers(0, 90, 300), "view": rng.integers(0, 90, 300)}
    sources = {}
    for name, users in more.items():
        columns = old.source(name)
        of_old = np.repeat(np.arange(60), np.diff(columns.offsets))
        new = users[users >= 60]
        times = START + rng.integers(0, 8 * DAY, len(new))
        user, time = np.concatenate([of_old, new]), np.concatenate([columns.timestamp, times])
        sources[name] = SourceRows(user, time, np.concatenate([columns.item, new % 40]))
    write_log(days.folder / "events", LogParts(90, 40, sources, item_accounts=np.arange(40) // 4))
    name_countries(days.folder / "events", {"AR": 0.2, "BR": 0.8})  # units begin elsewhere
    rename_log(days.folder / "events", "another")
    report = days.refresh(8)
    days.check(report)
    rows = EmbeddingStore(days.store).read_embeddings()
    embedded = rows["user_id"].to_numpy()[rows["as_of"].to_numpy() == report.as_of]
    events = Events.open(days.folder / "events")
    known = events.user_indices(embedded[embedded < 60].tolist())
    assert report.tokens_reused == events.num_events(START + 4 * DAY, known).sum() > 0


def test_a_history_that_was_corrected_is_computed_again(days: Days) -> None:
    days.refresh(4)
    for name in ("click", "view"):
        path = days.folder / "events" / "sources" / name / "item.npy"
        items = np.load(path)
        items[::7] = (items[::7] + 1) % 40
        np.save(path, items)
    rename_log(days.folder / "events", "corrected")
    report = days.refresh(8)
    assert 0 < report.tokens_reused < days.events_of(report, 4)
    days.check(report)


def test_histories_that_max_events_cuts_are_embedded_whole(days: Days) -> None:
    config = KEEPING.model_copy(update={"max_events": 6})
    days.refresh(4, config)
    report = days.refresh(8, config)
    events = Events.open(days.folder / "events")
    reused = 0
    for name in ("click", "view"):
        columns = events.source(name)
        user = np.repeat(np.arange(60), np.diff(columns.offsets))
        early, late = (
            np.bincount(user[columns.timestamp <= START + d * DAY], minlength=60) for d in (4, 8)
        )  # users are in one source each
        reused += early[(late < 6) & (late > early)].sum()
    assert report.tokens_reused == reused > 0
    whole = days.folder / "whole"
    RefreshJob(
        days.model, days.events, whole, as_of=report.as_of, config=WHOLE.model_copy(update={"max_events": 6})
    ).run()
    found, expected = EmbeddingStore(days.store).read_embeddings(), EmbeddingStore(whole).read_matrix()
    new = np.flatnonzero(found["as_of"].to_numpy() == report.as_of)
    np.testing.assert_allclose(np.stack(found["embedding"].to_numpy())[new], expected.values[new], atol=1e-5)


# ---- the cache's files


def files(store: Path) -> list[Path]:
    return sorted((store / "kv_cache").rglob("*.arrow"))


def halves(data: bytes) -> bytes:
    return data[: len(data) // 2]


def other_table(data: bytes) -> bytes:
    return b"ARROW1\0\0" + data[:100]


@pytest.mark.parametrize("damage", [halves, other_table, lambda data: b""], ids=["halved", "foreign", "empty"])
def test_files_that_are_not_whole_are_left_out(days: Days, damage: Callable[[bytes], bytes]) -> None:
    days.refresh(4)
    for path in files(days.store):
        path.write_bytes(damage(path.read_bytes()))
    report = days.refresh(8)
    assert report.tokens_reused == 0
    days.check(report)
    days.check(days.refresh(9, KEEPING.model_copy(update={"max_age": 0})))


def test_a_flipped_bit_anywhere_changes_no_embedding(tmp_path: Path) -> None:
    days = Days(tmp_path, num_users=20)
    days.refresh(4)
    seed, random = tmp_path / "seed", np.random.default_rng(0)
    shutil.copytree(days.store, seed)
    reused = []
    for _ in range(20):
        path = files(days.store)[0]
        data = bytearray(path.read_bytes())
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(data))
        report = days.refresh(8)
        days.check(report)
        reused.append(report.tokens_reused)
        shutil.rmtree(days.store)
        shutil.copytree(seed, days.store)
    assert len(set(reused)) > 1  # some of it was found damaged


def test_a_generation_whose_files_are_gone(days: Days) -> None:
    days.refresh(4)
    middle = days.refresh(6)
    shutil.rmtree(days.store / "kv_cache" / middle.generation)
    report = days.refresh(8)
    days.check(report)
    days.check(days.refresh(9, KEEPING.model_copy(update={"max_age": 0})))


@pytest.mark.parametrize("depth", [0, 2])
def test_users_that_do_not_fit_in_memory_are_kept_once(days: Days, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    compress = UserModel.compress

    def crowded(self: UserModel, pooled: torch.Tensor, plan: object = None) -> torch.Tensor:
        if len(pooled) > 2:
            raise torch.OutOfMemoryError
        return compress(self, pooled, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(embedder, "overlap_depth", lambda device: depth)
    monkeypatch.setattr(UserModel, "compress", crowded)
    first = days.refresh(4)
    kept = [pa.ipc.open_file(path).read_all().num_rows for path in files(days.store)]
    assert sum(kept) == first.embedded  # users are in one source each
    report = days.refresh(6)
    assert report.tokens_reused == days.events_of(report, 4) > 0
    days.check(report)


def test_a_full_disk_publishes_nothing_and_leaves_nothing(days: Days, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alure.engine.store.kv_cache.publish", refuse)
        with pytest.raises(AlureError, match=r"0-25\.arrow: cannot be written .*No space left"):
            days.refresh(4)
    assert not [path for path in days.store.rglob("*") if "arrow" in path.name]
    assert not EmbeddingStore(days.store).generations("embeddings")
    days.check(days.refresh(4))


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, days: Days) -> None:
    ids = days.events.users.schema.field("user_id").type
    with pytest.raises(KeyError), SegmentWriter(tmp_path / "kv" / "0-9.arrow", ids):
        raise KeyError
    assert not list((tmp_path / "kv").iterdir())


def test_vacuum_keeps_what_the_kept_were_carried_forward_from(days: Days) -> None:
    generations = [days.refresh(day).generation for day in (4, 6, 8)]
    torn = days.store / "kv_cache" / generations[2] / "0-25.arrow#12345678"
    torn.write_bytes(b"half")
    vacuum(EmbeddingStore(days.store), keep=1, grace_hours=0, dry_run=True)
    assert torn.exists()
    vacuum(EmbeddingStore(days.store), keep=1, grace_hours=0)
    assert not torn.exists()
    assert {path.parent.name for path in files(days.store)} == set(generations)
    following = days.refresh(9, KEEPING.model_copy(update={"max_age": 0}))
    assert following.tokens_reused == days.events_of(following, 8)
    days.check(following)
    fresh = days.refresh(9, incremental=False)
    report = vacuum(EmbeddingStore(days.store), keep=1, grace_hours=0)
    assert {path.parent.name for path in files(days.store)} == {fresh.generation}
    assert {f"kv_cache/{generation}" for generation in generations} < set(report.removed)
    assert vacuum(EmbeddingStore(days.store), keep=1).removed == []


def test_vacuum_removes_what_a_rollback_left_once_it_is_old(days: Days) -> None:
    kept, withdrawn = (days.refresh(day).generation for day in (4, 6))
    store = EmbeddingStore(days.store)
    folder = days.store / "kv_cache" / withdrawn
    (folder / "0-25.arrow#12345678").write_bytes(b"half")
    (days.store / "kv_cache" / "notes.txt").write_text("of somebody")
    rollback(store)
    assert not [name for name in vacuum(store).removed if "kv_cache" in name]
    size = sum(path.stat().st_size for path in folder.iterdir())
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, 0))
    report = vacuum(store, dry_run=True)
    assert (report.files, report.size_bytes) == (4, size)
    assert f"kv_cache/{withdrawn}" in report.removed
    assert vacuum(store).removed == report.removed
    assert {path.parent.name for path in files(days.store)} == {kept}
    assert not folder.exists()


def test_a_generation_that_kept_nothing_is_where_reuse_begins_again(days: Days) -> None:
    days.refresh(4)
    days.refresh(6, WHOLE)
    report = days.refresh(8)
    assert report.tokens_reused == 0
    days.check(report)


def test_models_whose_keys_change_are_refused(tmp_path: Path) -> None:
    events = jagged_log(tmp_path / "events")
    model = save_model(tmp_path / "model", events)
    with pytest.raises(InputError, match=r"refresh.kv_cache.*\n.*causal: expected true.*\n.*neither position nor age"):
        RefreshJob(model, events, tmp_path / "store", config=KEEPING)
    model = save_model(tmp_path / "model", events, causal=True)
    with pytest.raises(InputError, match="got position, age"):
        RefreshJob(model, events, tmp_path / "store", config=KEEPING)


# ---- what the files say is not trusted

USERS, ROW = 6, 16  # of them, bytes an event
INT64 = pa.int64()


def open_cache(*folders: Path, ids: pa.DataType = INT64) -> KvCache:
    def of_users(given: pa.ChunkedArray) -> np.ndarray:
        return indices_of(given, pa.chunked_array([pa.array(range(USERS)).cast(ids)]))

    return KvCache(folders, {"click": ROW}, ids, USERS, of_users)


def write_segments(folder: Path, first: int = 0, last: int = 3, follows: int = 0, fingerprint: int = 7) -> pa.Table:
    """A segment of each user; what was written."""
    full = lambda x: np.full(USERS, x)  # noqa: E731
    values = np.full((USERS * (last - first), ROW), fingerprint % 251, np.uint8)
    with SegmentWriter(folder / "0-6.arrow", pa.int64()) as writer:
        ends = full(first), full(last), full(follows), full(fingerprint)
        writer.add(Segments("click", pa.array(range(USERS)), *ends, values))
    return pa.ipc.open_file(folder / "0-6.arrow").read_all()


def overwrite(folder: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(folder / "0-6.arrow", table.schema) as stream:
        stream.write_table(table)


def test_a_segment_is_of_use_beside_those_that_it_was_computed_from(tmp_path: Path) -> None:
    first, corrected, third = (tmp_path / name for name in "abc")
    write_segments(first, 0, 3, 0, fingerprint=7)
    write_segments(corrected, 0, 3, 0, fingerprint=8)
    write_segments(third, 3, 5, follows=8, fingerprint=9)
    everyone, rows = np.arange(USERS), np.zeros((USERS * 5, ROW), np.uint8)
    cache = open_cache(first, corrected, third)
    assert [x.tolist() for x in cache.cached("click", everyone)] == [[5] * USERS, [9] * USERS]
    assert cache.read("click", everyone, rows, everyone * 5).all()
    assert rows[:, 0].tolist() == [8, 8, 8, 9, 9] * USERS
    without = open_cache(first, third)  # as many events, but others
    assert without.cached("click", everyone)[0].tolist() == [0] * USERS


HUGE = 1 << 60  # events; times bytes an event it is 0 in int64


@pytest.mark.parametrize(
    ("first", "last", "size"),
    [
        (0, HUGE, 0), (0, -HUGE, 0), (0, 0, 0), (-3, 0, 3), (HUGE, HUGE + 3, 3), (3, 0, 3), (1, 4, 3), (0, 3, 2),
        (-(1 << 63), -(1 << 63) + 3, 3), (0, -(1 << 63), 0), (1, -(1 << 63), 0), ((1 << 63) - 1, -(1 << 63) + 2, 3),
    ],
)  # fmt: skip
def test_impossible_segments_are_left_out(tmp_path: Path, first: int, last: int, size: int) -> None:
    table = write_segments(tmp_path)
    user = 2
    changed = {"first": first, "last": last, "last_fingerprint": 0, "key_values": bytes(size * ROW)}
    rows = table.to_pylist()
    rows[user] |= changed
    overwrite(tmp_path, pa.Table.from_pylist(rows, table.schema))
    cache = open_cache(tmp_path)
    events, fingerprints = cache.cached("click", np.arange(USERS))
    assert events.tolist() == [3, 3, 0, 3, 3, 3]
    assert fingerprints[user] == 0
    into = np.zeros((9, ROW), np.uint8)
    assert cache.read("click", np.array([0, user, 1]), into, np.array([0, 3, 6])).all()


@pytest.mark.parametrize("column", schema_of(pa.int64()).names)
def test_files_with_nulls_are_left_out(tmp_path: Path, column: str) -> None:
    table = write_segments(tmp_path)
    rows = table.to_pylist()
    rows[4][column] = None
    overwrite(tmp_path, pa.Table.from_pylist(rows, table.schema))
    assert open_cache(tmp_path).cached("click", np.arange(USERS))[0].tolist() == [0] * USERS


def test_files_of_other_ids_are_left_out(tmp_path: Path) -> None:
    write_segments(tmp_path)
    assert open_cache(tmp_path, ids=pa.string()).cached("click", np.arange(USERS))[0].tolist() == [0] * USERS


def test_whatever_is_flipped_in_a_file_it_is_read_or_left_out(tmp_path: Path) -> None:
    write_segments(tmp_path)
    path, random = tmp_path / "0-6.arrow", np.random.default_rng(0)
    whole, everyone, found = path.read_bytes(), np.arange(USERS), []
    for _ in range(400):
        data = bytearray(whole)
        for at in random.integers(len(data), size=2):
            data[at] ^= int(random.integers(1, 256))
        path.unlink()
        path.write_bytes(data)
        cache = open_cache(tmp_path)
        known = np.flatnonzero(cache.cached("click", everyone)[0] == 3)
        into = np.zeros((3 * USERS, ROW), np.uint8)
        sound = cache.read("click", known, into, 3 * np.arange(len(known)))
        for i in np.flatnonzero(sound):
            assert (into[3 * i : 3 * i + 3] == 7).all()
        found.append(len(known))
    assert {0, USERS} < set(found)
