"""Embeddings stored as float16 or int8: how far off, who may read them, carried forward to the bit, never mixed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.model import DAY, START, planted_log
from support.refresh import jagged_log, name_countries, rename_log, rows_of, save_model
from support.store import generation, unit

from alure.engine.config import GraphConfig, OutputDtype, RefreshConfig
from alure.engine.errors import AlureError, InputError
from alure.engine.events import Events
from alure.engine.export import export_store
from alure.engine.graph import SimilarityGraph, build_graphs
from alure.engine.model import UserModel
from alure.engine.refresh import RefreshJob, RefreshReport
from alure.engine.store import EmbeddingStore
from alure.engine.store.rows import EMBEDDING_COLUMNS, in_order
from alure.engine.store.upkeep import rollback, vacuum, verify
from alure.engine.store.vectors import Vectors, table_to_float32

SMALLER: list[OutputDtype] = ["float16", "int8"]
SMALL = RefreshConfig(unit_users=16, token_budget=150, precision="float32")


def config(dtype: str, **changes: Any) -> RefreshConfig:
    return SMALL.model_copy(update={"output_dtype": dtype, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a checkpoint, and a store of each type."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", jagged_log(folder / "events"))
    for dtype in ("float32", *SMALLER):
        refresh(folder, folder / dtype, dtype)
    return folder


def refresh(world: Path, store: Path, dtype: str, **options: Any) -> RefreshReport:
    return RefreshJob(world / "model", world / "events", store, config=config(dtype), **options).run()


@pytest.mark.parametrize("dtype", SMALLER)
def test_values_are_off_by_half_a_step_at_most(world: Path, dtype: str) -> None:
    exact, found = EmbeddingStore(world / "float32").read_matrix(), EmbeddingStore(world / dtype).read_matrix()
    assert found.values.dtype == np.float32
    assert found.user_ids.equals(exact.user_ids)
    each = exact.values.reshape(len(exact.values), 2, 16)
    largest = np.abs(each).max(axis=2, keepdims=True)
    step = largest / 127 if dtype == "int8" else np.maximum(np.abs(each) * 2.0**-10, 2.0**-24)
    off = np.abs(found.values.reshape(each.shape) - each)
    assert (off <= step / 2 * 1.001 + 1e-7).all()
    assert off.max() > 0


@pytest.mark.parametrize("dtype", ["float32", *SMALLER])
def test_readers_get_float32_and_the_same_values(world: Path, tmp_path: Path, dtype: str) -> None:
    store = EmbeddingStore(world / dtype)
    table, matrix = store.read_embeddings(), store.read_matrix()
    assert table.schema.names == EMBEDDING_COLUMNS
    assert table.schema.field("embedding").type == pa.list_(pa.float32())
    values = np.array(table["embedding"].to_pylist(), np.float32)
    assert (values == matrix.values).all()
    batches = in_order(pa.Table.from_batches(store.iter_embeddings()))
    assert batches.select(EMBEDDING_COLUMNS).equals(table.combine_chunks())
    assert store.read_user(7)["embedding"] == values[table["user_id"].to_pylist().index(7)].tolist()
    history = store.read_history([7, 11]).to_pylist()
    assert history[0]["embeddings"] == [store.read_user(7)["embedding"]]
    assert verify(store).publications == 1
    assert store.latest("embeddings").properties["output_dtype"] == dtype
    for to in ("npy", "parquet", "faiss"):
        export_store(world / dtype, to, tmp_path / to)
    assert (np.load(tmp_path / "npy" / "embeddings.npy") == values).all()
    exported = pq.read_table(tmp_path / "parquet" / "embeddings.parquet")
    assert exported["embedding"].to_pylist() == table["embedding"].to_pylist()


def encoded(values: np.ndarray, dtype: str) -> dict[str, pa.Array]:
    """The columns of embeddings [n, 2 · d] as a refresh hands them over."""
    if dtype != "int8":
        return Vectors(values.astype(dtype)).columns(np.ones(len(values), bool))
    each = values.reshape(len(values), 2, -1)
    scales = np.abs(each).max(axis=2) / np.float32(127)
    codes = np.round(each / scales[:, :, None]).astype(np.int8)
    return Vectors(codes.reshape(values.shape), scales).columns(np.ones(len(values), bool))


def typed_unit(ids: Any, values: np.ndarray, dtype: str) -> pa.Table:
    rows = unit(ids).drop_columns("embedding")
    for name, column in encoded(values, dtype).items():
        rows = rows.append_column(name, column)
    return rows


@pytest.mark.parametrize("compression", ["dot_linear", "interaction"])
def test_a_model_gives_bytes_with_either_compression(world: Path, tmp_path: Path, compression: str) -> None:
    events = Events.open(world / "events")
    model = UserModel.load(save_model(tmp_path, events, compression=compression))
    batch, catalog = events.batch(range(4, 9), START + 20 * DAY), model.catalog(events)
    exact, (codes, scales) = model(batch, catalog), model.forward_int8(batch, catalog)
    assert (codes.shape, scales.shape) == ((5, 2, 16), (5, 2))
    off = (codes * scales[:, :, None] - exact).abs()
    assert (off <= scales[:, :, None] / 2 + 1e-6).all()


def test_smaller_types_take_less_of_the_disk(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4_096, 64)).astype(np.float32)
    sizes = {}
    for dtype in ("float32", *SMALLER):
        store = EmbeddingStore(tmp_path / dtype, create=True)
        store.write_unit("g", "0", typed_unit(np.arange(4_096), values, dtype))
        sizes[dtype] = sum(file.size_bytes for file in store.embeddings.files())
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.35 * sizes["float32"]


@given(st.data(), st.integers(0, 12), st.integers(1, 3), st.integers(1, 4))
def test_decoding_is_code_times_scale_whatever_the_slices(data: st.DataObject, n: int, k: int, d: int) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = generator.integers(-127, 128, (n, k * d)).astype(np.int8)
    scales = generator.random((n, k), np.float32)
    scales[generator.random((n, k)) < 0.2] = 0
    table = pa.table({"user_id": np.arange(n), **Vectors(codes, scales).columns(np.ones(n, bool))})
    first = data.draw(st.integers(0, n))
    rows = pa.concat_tables([table.slice(first), table.slice(0, first)])
    order = np.concatenate([np.arange(first, n), np.arange(first)])
    expected = (codes.reshape(n, k, d) * scales[:, :, None]).reshape(n, k * d)[order]
    assert table_to_float32(rows).schema.names == ["user_id", "embedding"]
    assert table_to_float32(rows)["embedding"].to_pylist() == expected.tolist()


@pytest.mark.parametrize("dtype", SMALLER)
def test_carried_users_keep_their_bits_for_generations(world: Path, tmp_path: Path, dtype: str) -> None:
    """Users 3, 11, 30 and 59 have news on day 9; the others are carried from day 8 to 9 to 10."""
    late = [3, 11, 30, 59]
    jagged_log(tmp_path / "events", late=np.array(late))
    inputs = (world / "model", tmp_path / "events", tmp_path / "store")
    for day in (8, 9, 10):
        rename_log(tmp_path / "events", f"day {day}")
        options: dict[str, Any] = {"as_of": START + day * DAY, "incremental": day > 8}
        RefreshJob(*inputs, config=config(dtype), **options).run()
    store = EmbeddingStore(tmp_path / "store")
    first, _, last = (stored_rows(store, g.generation) for g in store.generations("embeddings"))
    assert sorted(user for user in last if first.get(user) != last[user]) == late
    RefreshJob(*inputs[:2], tmp_path / "full", config=config(dtype), as_of=START + 9 * DAY).run()
    full = stored_rows(EmbeddingStore(tmp_path / "full"))
    middle = stored_rows(store, store.generations("embeddings")[1].generation)
    for user in late:
        np.testing.assert_allclose(middle[user][0], full[user][0], atol=1 if dtype == "int8" else 1e-3)
        np.testing.assert_allclose(middle[user][1] or 0, full[user][1] or 0, rtol=1e-5)
    history = store.read_history([8, 30]).to_pylist()
    assert [len(user["embeddings"]) for user in history] == [1, 2]  # what was carried is there once
    graph = build_graphs(store, GraphConfig(k=4), generation=store.generations("embeddings")[1].generation)
    again = build_graphs(store, GraphConfig(k=4), incremental=True)
    assert (again.base, again.searched) == (graph.generation, 0)  # equal to the bit, so nobody is searched
    assert len(verify(store).generations) == 3


def stored_rows(store: EmbeddingStore, generation: str | None = None) -> dict[int, tuple[list[float], Any]]:
    chosen = store.published(generation, "embeddings").generation
    rows = store.embeddings.dataset().to_table(filter=pc.field("generation") == chosen).to_pylist()
    return {row["user_id"]: (row["embedding"], row.get("scales")) for row in rows}


class Crash(Exception):
    pass


@pytest.mark.parametrize("dtype", SMALLER)
def test_a_job_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    job = RefreshJob(world / "model", world / "events", tmp_path, config=config(dtype))
    write, calls = job.store.write_unit, []

    def crash(*arguments: Any) -> bool:
        if len(calls) == 2:
            raise Crash
        calls.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(job.store, "write_unit", crash)
    with pytest.raises(Crash):
        job.run()
    with pytest.raises(InputError, match=f"keeps embeddings as {dtype}, got output_dtype float32"):
        refresh(world, tmp_path, "float32")
    report = refresh(world, tmp_path, dtype)
    assert (report.units, report.units_reused, report.output_dtype) == (4, 2, dtype)
    assert rows_of(EmbeddingStore(tmp_path)) == rows_of(EmbeddingStore(world / dtype))
    assert stored_rows(EmbeddingStore(tmp_path)) == stored_rows(EmbeddingStore(world / dtype))


@pytest.mark.parametrize("have", ["float32", *SMALLER])
@pytest.mark.parametrize("got", ["float32", *SMALLER])
def test_types_are_not_mixed(tmp_path: Path, have: str, got: str) -> None:
    store, values = EmbeddingStore(tmp_path, create=True), np.ones((1, 4), np.float32)
    store.write_unit("g", "0", typed_unit([1], values, have))
    if have == got:
        assert store.write_unit("g", "1", typed_unit([2], values, got))
        return
    version = store.embeddings.open().version()
    remedy = f"keeps embeddings as {have}, got output_dtype {got}.*Give --output-dtype {have}.*or another store"
    with pytest.raises(InputError, match=remedy):
        store.write_unit("g", "1", typed_unit([2], values, got))
    assert store.embeddings.open().version() == version


def test_two_first_writers_of_two_types_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's table appears after this one looked."""
    store, values = EmbeddingStore(tmp_path, create=True), np.ones((1, 4), np.float32)
    for got in SMALLER:
        with monkeypatch.context() as patch:
            patch.setattr(store, "check_dtype", lambda dtype: EmbeddingStore(tmp_path).write_unit(
                "g", "0", typed_unit([1], values, "float32")))  # fmt: skip
            with pytest.raises(InputError, match="column embedding: the store has list"):
                store.write_unit("g", "1", typed_unit([2], values, got))
    store.publish(generation(1))
    assert store.read_embeddings()["user_id"].to_pylist() == [1]


def test_upkeep(world: Path, tmp_path: Path) -> None:
    first = refresh(world, tmp_path, "int8", as_of=START + 5 * DAY).generation
    refresh(world, tmp_path, "int8")
    store = EmbeddingStore(tmp_path)
    assert rollback(store).newest == first
    assert store.latest("embeddings").generation == first
    vacuum(store, grace_hours=0)
    assert store.read_matrix().values.shape == (store.latest("embeddings").rows, 32)
    assert verify(store).generations == [first]


def test_what_is_not_finite_is_found(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, create=True)
    vectors = Vectors(np.ones((2, 4), np.int8), np.array([[1, 1], [1, np.nan]], np.float32))
    assert vectors.finite().tolist() == [True, False]
    rows = unit([3, 4]).drop_columns("embedding")
    for name, column in vectors.columns(np.ones(2, bool)).items():
        rows = rows.append_column(name, column)
    store.write_unit("g", "0", rows)
    store.publish(generation(2))
    with pytest.raises(AlureError, match="the embedding of user 4 is not finite"):
        store.check_integrity()


@pytest.mark.parametrize(
    ("scales", "complaint"),
    [([[1.0, 1.0], [1.0]], "as many scales"), ([[1.0] * 3] * 2, "as many scales"), ([[], []], "as many scales"),
     ([[1.0], None], "no nulls in scales")],
)  # fmt: skip
def test_scales_are_checked(tmp_path: Path, scales: Any, complaint: str) -> None:
    rows = unit([1, 2]).set_column(2, "embedding", pa.array([[1, 2, 3, 4]] * 2, pa.list_(pa.int8())))
    with pytest.raises(ValueError, match="of int8 beside scales"):
        EmbeddingStore(tmp_path, create=True).write_unit("g", "u", rows)
    rows = rows.append_column("scales", pa.array(scales, pa.list_(pa.float32())))
    with pytest.raises(ValueError, match=complaint):
        EmbeddingStore(tmp_path).write_unit("g", "u", rows)


def test_neighbours_are_as_good(tmp_path: Path) -> None:
    """Four planted interests: neighbours share one as often, and are nearly the same users."""
    planted_log(tmp_path / "events", num_users=200)
    save_model(tmp_path / "model", name_countries(tmp_path / "events", {"BR": 1.0}))
    interest = np.random.default_rng(0).integers(0, 4, 200)
    neighbors, share = {}, {}
    for dtype in ("float32", *SMALLER):
        settings = RefreshConfig.model_validate({"output_dtype": dtype, "precision": "float32"})
        RefreshJob(tmp_path / "model", tmp_path / "events", tmp_path / dtype, config=settings).run()
        build_graphs(EmbeddingStore(tmp_path / dtype), GraphConfig(k=10))
        neighbors[dtype] = SimilarityGraph.load(EmbeddingStore(tmp_path / dtype)).neighbors.reshape(200, 10)
        share[dtype] = (interest[neighbors[dtype]] == interest[:, None]).mean()
    for dtype, least in (("float16", 0.995), ("int8", 0.98)):
        same = [len(np.intersect1d(a, b)) / 10 for a, b in zip(neighbors[dtype], neighbors["float32"])]
        assert np.mean(same) > least
        assert share[dtype] == pytest.approx(share["float32"], abs=0.005)
