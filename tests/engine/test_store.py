"""The store: units once, publications all at once, whole tables replaced at one stroke."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from support.store import generation, graph, unit

from alure.engine.errors import AlureError, InputError, Interrupted
from alure.engine.signals import stop_flag
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.delta import DataTable


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", create=True)


@pytest.fixture
def published(store: EmbeddingStore) -> EmbeddingStore:
    store.write_unit("g", "0-3", unit([1, 2, 3]))
    store.publish(generation(3))
    return store


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an embedding store"):
        EmbeddingStore(tmp_path)


def test_a_unit_is_written_once(store: EmbeddingStore) -> None:
    assert store.written_units("g", ["0-2"]) == set()
    assert store.write_unit("g", "0-2", unit([1, 2]))
    assert not store.write_unit("g", "0-2", unit([8, 9]))
    assert store.written_units("h", ["0-2"]) == set()
    assert store.written_units("g", ["0-2", "2-4"]) == {"0-2"}
    store.publish(generation(2))
    assert store.read_embeddings()["user_id"].to_pylist() == [1, 2]


def test_units_are_remembered_past_a_checkpoint_of_the_log(store: EmbeddingStore) -> None:
    store.write_unit("g", "0-1", unit([1]))
    store.embeddings.open().create_checkpoint()
    store.write_unit("g", "1-2", unit([2]))
    assert store.written_units("g", ["0-1", "1-2", "2-3"]) == {"0-1", "1-2"}


def test_the_log_is_read_as_delta_reads_it(tmp_path: Path) -> None:
    """Of every version: parts of two groups, one of them removed, before a checkpoint and after."""
    data = DataTable(tmp_path, ["letter"])
    names = [f"{group}/{part}" for group in "ab" for part in ("0", "1", '"txn"', "removed")] + ["never/0"]
    for group, part in (("a", "0"), ("b", "0"), ("a", '"txn"'), ("", ""), ("a", "1"), ("b", '"txn"'), ("a", "0")):
        if group:
            data.append_once(pa.table({"letter": [group], "x": [1]}), group, part)
        else:
            data.remove("a", letter="a")
            data.open().create_checkpoint()
    for version in range(data.open().version() + 1):
        snapshot = DeltaTable(tmp_path, version=version)
        expected = {name: snapshot.transaction_version(name) for name in names}
        assert data.transactions(snapshot) == {name: found for name, found in expected.items() if found is not None}
    assert expected["a/0"] == 2
    assert data.written("a", ["0", "1", '"txn"']) == {"0", "1"}


def test_first_writers_at_once_make_one_table(tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def ensure(folder: Path) -> int:
        start.wait()
        return DataTable(folder, []).ensure(pa.schema([("x", pa.int64())])).version()

    with ThreadPoolExecutor(4) as pool:
        for round_number in range(8):
            assert list(pool.map(ensure, [tmp_path / f"{round_number}"] * 4)) == [0] * 4


def test_writers_of_one_unit_at_once_add_it_once(store: EmbeddingStore) -> None:
    def write(worker: int) -> int:
        other = EmbeddingStore(store.path)
        return sum(other.write_unit("g", f"{u}", unit([u])) for u in range(6))

    with ThreadPoolExecutor(4) as pool:
        written = sum(pool.map(write, range(4)))
    assert written == 6
    store.publish(generation(6))
    store.check_integrity()


def test_an_empty_unit_is_done_too(store: EmbeddingStore) -> None:
    assert store.write_unit("g", "0-5", unit(pa.array([], pa.int64())))
    assert store.written_units("g", ["0-5"]) == {"0-5"}
    assert store.count_written("g") == 0


def test_what_is_not_published_is_never_read(published: EmbeddingStore) -> None:
    published.write_unit("h", "0-1", unit([4]))
    for read in (published.read_embeddings, published.read_matrix, published.read_users, published.check_integrity):
        with pytest.raises(InputError, match=r"generation 'h' of embeddings to be published; published: g"):
            read("h")
    with pytest.raises(InputError, match="published: g"):
        published.read_user(4, "h")
    assert published.read_embeddings()["user_id"].to_pylist() == [1, 2, 3]
    assert [g.generation for g in published.generations()] == ["g"]
    with pytest.raises(InputError, match="nothing of this table is published"):
        published.read_graph()


def test_the_newest_publication_is_read_by_default(published: EmbeddingStore) -> None:
    published.write_unit("older", "0-1", unit([4], as_of=3))
    published.publish(Generation("older", "embeddings", "", 1, 3, "m", {"k": 2, "d": 2}))
    assert published.latest("embeddings").generation == "older"  # published last, whatever time it is of
    assert published.read_embeddings("g").num_rows == 3


def test_publishing_the_same_again_changes_nothing(published: EmbeddingStore) -> None:
    first = published.latest("embeddings")
    assert published.publish(generation(3)) == first
    assert published.log.log.open().version() == 1
    with pytest.raises(InputError, match="published already, with 3 rows"):
        published.publish(generation(4))


def test_rows_are_counted_before_publishing(store: EmbeddingStore) -> None:
    store.write_unit("g", "0-3", unit([1, 2, 3]))
    with pytest.raises(AlureError, match="expected 4 rows before publishing, found 3"):
        store.publish(generation(4))
    assert store.generations() == []


def test_models_are_never_mixed(store: EmbeddingStore) -> None:
    store.write_unit("g", "0-1", unit([1]))
    store.write_unit("g", "1-2", unit([2], model="other"))
    with pytest.raises(InputError, match="never mixed"):
        store.publish(generation(2))
    with pytest.raises(ValueError, match="one model"):
        store.write_unit("g", "x", pa.concat_tables([unit([1]), unit([2], model="other")]))
    with pytest.raises(ValueError, match="one width"):
        store.write_unit("g", "x", pa.concat_tables([unit([1]), unit([2], width=8)]))


def test_a_row_later_than_its_generation_is_refused(store: EmbeddingStore) -> None:
    store.write_unit("g", "0-1", unit([1], as_of=8))
    with pytest.raises(InputError, match="no row later than its as_of 7, found 8"):
        store.publish(generation(1))


@pytest.mark.parametrize("same", [True, False])
def test_of_two_publishers_one_wins(published: EmbeddingStore, same: bool) -> None:
    """The other one commits between the first one's look at the log and its append."""
    log, other = published.log, EmbeddingStore(published.path).log
    mine = Generation("g", "graph", "alure", 3, 7, "m", {}, "mine")
    theirs = Generation("g", "graph", "alure", 3, 7, "m", {} if same else {"k": 9}, "theirs")
    calls = []

    def may_replace(present: Generation | None) -> bool:
        if not calls:
            other.publish(theirs, lambda present: present is None)
        calls.append(present)
        return present is None

    if same:
        assert log.publish(mine, may_replace).write_id == "theirs"
    else:
        with pytest.raises(AlureError, match="published meanwhile by another process"):
            log.publish(mine, may_replace)
    assert len(calls) == 2
    assert [g.write_id for g in log.published("graph")] == ["theirs"]


def test_many_writers_of_one_graph_never_mix(published: EmbeddingStore) -> None:
    def write(worker: int) -> str:
        try:
            rows = [graph([1, 2, 3], similarity=worker)] * 2
            return EmbeddingStore(published.path).write_graph("g", "alure", rows, {"worker": worker}).write_id
        except AlureError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(write, range(4)))
    visible = published.latest("graph", "alure")
    assert visible.write_id in outcomes
    table = published.read_graph()
    assert table.num_rows == visible.rows == 6
    assert set(table["similarities"].combine_chunks().flatten().to_pylist()) == {visible.properties["worker"]}


def test_a_row_later_than_its_generation_is_not_published(store: EmbeddingStore) -> None:
    store.write_unit("g", "0-1", unit([1], as_of=8))
    with pytest.raises(InputError, match="no row later than its as_of 7, found 8"):
        store.publish(generation(1))


def test_a_graph_is_replaced_whole(published: EmbeddingStore) -> None:
    first = published.write_graph("g", "alure", [graph([1, 2, 3])], {"k": 15})
    second = published.write_graph("g", "alure", [graph([1, 2], 0.25)], {"k": 3})
    assert second.sequence == first.sequence + 1
    assert published.read_graph()["similarities"].to_pylist() == [[0.25], [0.25]]
    assert published.read_graph(users=[2])["user_id"].to_pylist() == [2]
    assert published.read_graph(users=[]).num_rows == 0
    assert [g.properties for g in published.generations("graph")] == [{"k": 3}]
    writes = {p["write_id"] for p in published.whole["graph"].data.open().partitions()}
    assert writes == {second.write_id}  # the replaced rows are gone from the table


def test_a_write_that_fails_half_way_leaves_what_was(published: EmbeddingStore) -> None:
    published.write_graph("g", "alure", [graph([1, 2, 3])], {})
    version = published.whole["graph"].data.open().version()

    def failing() -> Iterator[pa.Table]:
        yield graph([1, 2], 0.25)
        raise KeyError("the builder failed")

    with pytest.raises(KeyError, match="the builder failed"):
        published.write_graph("g", "alure", failing(), {})
    assert published.whole["graph"].data.open().version() == version
    assert published.read_graph().num_rows == 3


def test_a_signal_stops_a_streamed_write(published: EmbeddingStore) -> None:
    def stopped() -> Iterator[pa.Table]:
        with stop_flag("graph") as flag:
            yield graph([1, 2])
            os.kill(os.getpid(), signal.SIGTERM)
            flag.check()

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        published.write_graph("g", "alure", stopped(), {})
    with pytest.raises(InputError):
        published.read_graph()


KILLED = """
import os, signal, sys, pyarrow as pa
from alure.engine.store import EmbeddingStore
def rows():
    for i in range(4):
        yield pa.table({"user_id": [1, 2], "country": ["BR"] * 2, "neighbor_ids": [[2], [1]],
                        "similarities": pa.array([[9.0], [9.0]], pa.list_(pa.float32()))})
    os.kill(os.getpid(), signal.SIGKILL)
EmbeddingStore(sys.argv[1]).write_graph("g", "alure", rows(), {})
"""


def test_a_write_that_is_killed_leaves_what_was(published: EmbeddingStore, tmp_path: Path) -> None:
    published.write_graph("g", "alure", [graph([1, 2, 3])], {})
    died = subprocess.run([sys.executable, "-c", KILLED, str(published.path)], check=False, cwd=tmp_path)
    assert died.returncode == -signal.SIGKILL
    assert published.read_graph()["similarities"].to_pylist() == [[0.5]] * 3
    published.write_graph("g", "alure", [graph([1, 2], 0.25)], {})
    assert published.read_graph().num_rows == 2


def test_tables_need_a_published_generation(published: EmbeddingStore) -> None:
    with pytest.raises(InputError, match="generation 'h' of embeddings"):
        published.write_graph("h", "alure", [graph([1])], {})
    with pytest.raises(ValueError, match="expected a column neighbor_ids"):
        published.write_graph("g", "alure", [pa.table({"user_id": [1], "country": ["BR"]})], {})
    with pytest.raises(ValueError, match="at least one batch"):
        published.write_graph("g", "alure", [], {})


def candidates(items: Any) -> pa.Table:
    count = len(items)
    return pa.table(
        {
            "user_id": list(range(count)),
            "country": ["BR"] * count,
            "item_ids": items,
            "scores": [[1.0] * len(row.as_py() or []) for row in items],
            "reasons": pa.array([["exact"] * len(row.as_py() or []) for row in items], pa.list_(pa.string())),
            "graphs": pa.array([["alure"] * len(row.as_py() or []) for row in items], pa.list_(pa.string())),
        }
    )


def test_candidates_go_to_another_store_by_their_generation(published: EmbeddingStore, tmp_path: Path) -> None:
    source, out = published.latest("embeddings"), EmbeddingStore(tmp_path / "out", create=True)
    rows = candidates(pa.array([[5, 6], []], pa.list_(pa.int64())))
    written = out.write_candidates(source, "alure+social", [rows], {})
    assert (written.generation, written.as_of, written.model, written.rows) == ("g", 7, "m", 2)
    assert out.read_candidates(name="alure+social")["item_ids"].to_pylist() == [[5, 6], []]
    assert sum(batch.num_rows for batch in out.iter_candidates(name="alure+social")) == 2
    assert out.read_candidates("g", "alure+social", users=["1"])["user_id"].to_pylist() == [1]
    with pytest.raises(InputError, match="column item_ids: the store has list"):
        out.write_candidates(source, "social", [candidates(pa.array([["a"]], pa.list_(pa.string())))], {})


def test_popularity(published: EmbeddingStore) -> None:
    rows = pa.table({"country": ["BR", "AR"], "item_ids": [[3, 1], [2]], "scores": [[2.0, 1.0], [1.0]]})
    published.write_popularity("g", rows, {})
    assert published.read_popularity()["item_ids"].to_pylist() == [[2], [3, 1]]


def test_rows_come_sorted_whatever_the_order_of_units(store: EmbeddingStore) -> None:
    store.write_unit("g", "2", unit([20, 3], country=["B/ü =x", "A"]))
    store.write_unit("g", "1", unit([11, 2], country=["B/ü =x", "A"]))
    store.publish(generation(4))
    table, matrix = store.read_embeddings(), store.read_matrix()
    assert table["user_id"].to_pylist() == matrix.user_ids.to_pylist() == [2, 3, 11, 20]
    assert table["country"].to_pylist() == matrix.countries.to_pylist() == ["A", "A", "B/ü =x", "B/ü =x"]
    assert matrix.values.tolist() == table["embedding"].to_pylist()
    assert store.read_matrix(country="A").user_ids.to_pylist() == [2, 3]
    assert store.countries() == ["A", "B/ü =x"]
    assert store.read_users()["user_id"].to_pylist() == [2, 3, 11, 20]
    assert store.read_users(users=["20", "2", "20"])["user_id"].to_pylist() == [2, 20]
    with pytest.raises(InputError, match="users 5, 4: not among the 4 users"):
        store.read_users(users=[5, 4, 2])
    assert store.read_range("g", "A", (3, 9))["user_id"].to_pylist() == [3]


def test_one_user_is_read_alone(published: EmbeddingStore) -> None:
    assert published.read_user(2)["embedding"] == [4.0, 5.0, 6.0, 7.0]
    assert published.read_user("2")["user_id"] == 2  # as typed at a command line
    with pytest.raises(InputError, match="not among the 3 users"):
        published.read_user(9)
    with pytest.raises(InputError, match="ids of type int64, got 'ana'"):
        published.read_user("ana")


def test_ids_may_be_strings(store: EmbeddingStore) -> None:
    store.write_unit("g", "0-2", unit(["ana", "bo"]))
    store.publish(generation(2))
    store.write_graph("g", "alure", [graph(["ana", "bo"])], {})
    assert store.read_user("bo")["embedding"] == [4.0, 5.0, 6.0, 7.0]
    assert store.read_graph(users=["ana"])["neighbor_ids"].to_pylist() == [["bo"]]
    with pytest.raises(InputError, match="the store has string, this write has int64"):
        store.write_unit("h", "0-1", unit([1]))


def test_units_are_checked(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match="each user once"):
        store.write_unit("g", "u", unit([1, 1]))
    with pytest.raises(ValueError, match="a country"):
        store.write_unit("g", "u", unit([1], country=""))
    with pytest.raises(ValueError, match="no nulls in country"):
        store.write_unit("g", "u", unit([1], country=[None]))
    with pytest.raises(ValueError, match="int64 or string, got double"):
        store.write_unit("g", "u", unit(pa.array([1.5])))


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (unit([3, 1]), "1 users are there more than once"),
        (unit([3, 4], width=6), "expected embeddings of 4 values"),
        (
            unit([3, 4]).set_column(2, "embedding", [pa.array([[0.0] * 4, [0.0, float("nan"), 0, 0]])]),
            "of user 4 is not",
        ),
    ],
)
def test_integrity(store: EmbeddingStore, second: pa.Table, complaint: str) -> None:
    store.write_unit("g", "0-2", unit([1, 2]))
    store.write_unit("g", "2-4", second)
    store.publish(generation(4))
    with pytest.raises(AlureError, match=complaint):
        store.check_integrity()


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [(unit([4]), "3 rows were published, 4 are there"), (unit([4], model="n"), r"expected model m, found \['n'\]")],
)
def test_integrity_of_what_came_after_the_publication(
    published: EmbeddingStore, rows: pa.Table, complaint: str
) -> None:
    published.check_integrity()
    published.write_unit("g", "3-4", rows)
    with pytest.raises(AlureError, match=complaint):
        published.check_integrity()


def test_quarantine(store: EmbeddingStore) -> None:
    assert store.read_quarantine().num_rows == 0
    for _ in range(2):
        store.write_quarantine("refresh", "0-9", ['{"user_id": 3}'], "the embedding is not finite")
    assert (store.count_quarantined("refresh"), store.count_quarantined("ingest")) == (1, 0)
    assert store.read_quarantine().to_pylist() == [
        {"origin": "refresh", "row": '{"user_id": 3}', "reason": "the embedding is not finite"}
    ]


def test_a_reader_sees_what_another_store_object_publishes_at_once(tmp_path: Path) -> None:
    """Also where the folder is another store by then, with as many commits."""
    writer = EmbeddingStore(tmp_path / "store", create=True)
    reader = EmbeddingStore(tmp_path / "store")
    for number in (1, 2, 3):
        assert len(reader.generations()) == number - 1
        writer.write_unit(f"g{number}", "0-2", unit([1, 2]))
        writer.publish(generation(2, f"g{number}"))
        assert [p.generation for p in reader.generations()][-1] == f"g{number}"
    other = EmbeddingStore(tmp_path / "other", create=True)
    for number in (4, 5, 6):
        other.write_unit(f"g{number}", "0-2", unit([1, 2]))
        other.publish(generation(2, f"g{number}"))
    (tmp_path / "store").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "store")
    assert [p.generation for p in reader.generations()] == ["g4", "g5", "g6"]
