"""The retrieval join beside the same join in SQL (DuckDB): 15 neighbours × 50 engaged ads → the best 1500 a user."""

from collections.abc import Callable

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch

from alure.bench.race import Contest, Entry, LeftOut
from alure.kernels import join_candidates
from alure.kernels.candidates import Candidates, Engagements, NeighborLists

K, ADS, CAP = 15, 50, 1500

JOIN = """
    SELECT n.row, e.item, SUM(n.similarity::DOUBLE * e.weight) AS score
    FROM edges n JOIN engagements e ON n.neighbor = e.list
    GROUP BY n.row, e.item
    QUALIFY row_number() OVER (PARTITION BY n.row ORDER BY score::FLOAT DESC, e.item) <= ?
"""


class Case:
    def __init__(self, num_users: int, num_items: int) -> None:
        rng = np.random.default_rng(0)
        edges, ads = num_users * K, num_users * ADS
        self.name = f"{num_users:,} users × {K} neighbours × {ADS} ads"
        self.neighbors = NeighborLists(
            torch.arange(num_users + 1) * K,
            torch.from_numpy(rng.integers(0, num_users, edges, dtype=np.int32)),
            torch.from_numpy(rng.random(edges, dtype=np.float32)),
        )
        popular = (num_items * rng.random(ads) ** 3).astype(np.int32)
        self.engagements = Engagements(
            torch.arange(num_users + 1) * ADS,
            torch.from_numpy(popular),
            torch.from_numpy(rng.random(ads, dtype=np.float32)),
            torch.zeros(ads, dtype=torch.uint8),
        )
        self.database = duckdb.connect()
        self.database.execute(f"SET threads = {torch.get_num_threads()}")
        rows = np.repeat(np.arange(num_users, dtype=np.int32), K)
        lists = np.repeat(np.arange(num_users, dtype=np.int32), ADS)
        tables = {
            "edges": {"row": rows, "neighbor": self.neighbors.ids, "similarity": self.neighbors.similarities},
            "engagements": {"list": lists, "item": self.engagements.items, "weight": self.engagements.weights},
        }
        for name, columns in tables.items():
            self.database.register("input", pa.table({c: np.asarray(v) for c, v in columns.items()}))
            self.database.execute(f"CREATE TABLE {name} AS SELECT * FROM input")

    def ours(self, backend: str) -> Candidates:
        return join_candidates(self.neighbors, self.engagements, CAP, backend=backend)

    def duckdb(self) -> pa.Table:
        return self.database.sql(JOIN, params=[CAP]).to_arrow_table()


@pytest.fixture(scope="module")
def case(quick: bool) -> Case:
    return Case(*((5_000, 2_000) if quick else (50_000, 20_000)))


def bench_join(race: Callable[[Contest], None], case: Case, quick: bool) -> None:
    ours = case.ours("auto")

    def same_rows(found: pa.Table) -> str:
        found = found.sort_by([("row", "ascending")])
        counts = np.bincount(found["row"].to_numpy(), minlength=len(ours.offsets) - 1)
        if not np.array_equal(counts, np.diff(ours.offsets.numpy())):
            return "users have another number of candidates"
        first = set(found["item"].to_numpy()[: counts[0]]) == set(ours.items[: counts[0]].tolist())
        return "" if first else "the first user has other candidates"

    def same_items(found: Candidates) -> str:
        return "" if torch.equal(found.items, ours.items) else "other candidates"

    def reference() -> tuple[Callable[[], Candidates], Callable[[Candidates], str]]:
        if not quick:
            raise LeftOut("minutes; timed with --quick")
        return (lambda: case.ours("reference")), same_items

    entries = [
        Entry("alure", lambda: ((lambda: case.ours("auto")), same_items)),
        Entry("alure reference", reference),
        Entry("DuckDB", lambda: (case.duckdb, same_rows)),
    ]
    race(Contest("retrieval", case.name, entries))
