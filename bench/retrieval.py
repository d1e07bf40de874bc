"""The retrieval join beside DuckDB's and Polars': 15 neighbours × 50 engaged ads → the best 1500 a user."""

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import torch

from alure.bench.race import Contest, Entry, LeftOut
from alure.kernels import join_candidates
from alure.kernels.candidates import Candidates, Engagements, NeighborLists

K, ADS, CAP = 15, 50, 1500
GRID = 1024  # numbers are multiples of 1/GRID: sums are exact in any order, and all outputs the same to the bit

JOIN = """
    SELECT e.row, n.item, SUM(e.similarity::DOUBLE * n.weight)::FLOAT AS score,
           row_number() OVER (PARTITION BY e.row ORDER BY score DESC, n.item) AS rank
    FROM edges e JOIN engagements n ON e.neighbor = n.list
    GROUP BY e.row, n.item
    QUALIFY rank <= ?
"""


class Case:
    """`asked` of `num_users` users; every one of them engaged with ADS ads, few of which are very popular."""

    def __init__(self, asked: int, num_users: int, num_items: int) -> None:
        rng = np.random.default_rng(0)
        edges, ads = asked * K, num_users * ADS
        of = "" if asked == num_users else f"{asked:,} of "
        self.name = f"{of}{num_users:,} users × {K} neighbours × {ADS} ads"
        self.neighbors = NeighborLists(
            torch.arange(asked + 1) * K,
            torch.from_numpy(rng.integers(0, num_users, edges, dtype=np.int32)),
            torch.from_numpy(_on_grid(rng, edges)),
        )
        popular = (num_items * rng.random(ads) ** 3).astype(np.int32)
        self.engagements = Engagements(
            torch.arange(num_users + 1) * ADS,
            torch.from_numpy(popular),
            torch.from_numpy(_on_grid(rng, ads)),
            torch.zeros(ads, dtype=torch.uint8),
        )
        rows = np.repeat(np.arange(asked, dtype=np.int32), K)
        lists = np.repeat(np.arange(num_users, dtype=np.int32), ADS)
        tables = {
            "edges": {"row": rows, "neighbor": self.neighbors.ids, "similarity": self.neighbors.similarities},
            "engagements": {"list": lists, "item": self.engagements.items, "weight": self.engagements.weights},
        }
        self.tables = {
            name: pa.table({column: np.asarray(values) for column, values in columns.items()})
            for name, columns in tables.items()
        }

    def ours(self, backend: str) -> Candidates:
        return join_candidates(self.neighbors, self.engagements, CAP, backend=backend)

    def duckdb(self) -> Callable[[], pa.Table]:
        database = duckdb.connect()
        database.execute(f"SET threads = {torch.get_num_threads()}")
        for name, table in self.tables.items():
            database.register("input", table)
            database.execute(f"CREATE TABLE {name} AS SELECT * FROM input")
        return lambda: database.sql(JOIN, params=[CAP]).to_arrow_table()

    def polars(self) -> Callable[[], pa.Table]:
        if not find_spec("polars"):
            raise LeftOut("needs the package polars (pip install polars)")
        os.environ["POLARS_MAX_THREADS"] = str(torch.get_num_threads())  # read when it is imported
        import polars as pl

        edges, engagements = (pl.from_arrow(table).lazy() for table in self.tables.values())
        product = pl.col("similarity").cast(pl.Float64) * pl.col("weight")
        joined = edges.join(engagements, left_on="neighbor", right_on="list")
        scored = joined.group_by("row", "item").agg(product.sum().cast(pl.Float32).alias("score"))
        ranked = scored.sort("row", "score", "item", descending=[False, True, False])
        best = ranked.filter(pl.int_range(pl.len()).over("row") < CAP)
        return lambda: best.collect(engine="streaming").to_arrow()


def _on_grid(rng: np.random.Generator, count: int) -> np.ndarray:
    return (rng.integers(1, GRID + 1, count) / np.float32(GRID)).astype(np.float32)


@pytest.fixture(scope="module")
def case(quick: bool) -> Case:
    return Case(*((5_000, 5_000, 2_000) if quick else (50_000, 300_000, 20_000)))


def bench_join(race: Callable[[Contest], None], case: Case, quick: bool) -> None:
    ours = case.ours("auto")

    def same_rows(found: pa.Table) -> str:
        found = found.sort_by([("row", "ascending"), ("score", "descending"), ("item", "ascending")])
        counts = np.bincount(found["row"].to_numpy(), minlength=len(ours.offsets) - 1)
        if not np.array_equal(counts, np.diff(ours.offsets.numpy())):
            return "users have another number of candidates"
        items = np.array_equal(found["item"].to_numpy(), ours.items.numpy())
        return "" if items and np.array_equal(found["score"].to_numpy(), ours.scores.numpy()) else "other candidates"

    def same_lists(found: Candidates) -> str:
        return "" if all(torch.equal(a, b) for a, b in zip(found, ours)) else "other candidates"

    def in_tables(prepare: Callable[[], Any]) -> tuple[Callable[[], pa.Table], Callable[[pa.Table], str]]:
        return prepare(), same_rows

    def reference() -> tuple[Callable[[], Candidates], Callable[[Candidates], str]]:
        if not quick:
            raise LeftOut("minutes; timed with --quick")
        return (lambda: case.ours("reference")), same_lists

    entries = [
        Entry("alure", lambda: ((lambda: case.ours("auto")), same_lists)),
        Entry("alure reference", reference),
        Entry("DuckDB", partial(in_tables, case.duckdb)),
        Entry("Polars", partial(in_tables, case.polars)),
    ]
    race(Contest("retrieval", case.name, entries))
