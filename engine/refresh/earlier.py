"""What an earlier generation knows of a unit's users: who may keep their embedding, and who needs another most."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.events import Events
from alure.engine.refresh.planner import Unit
from alure.engine.store import EmbeddingStore, Generation


@dataclass(frozen=True)
class Earlier:
    """Of n users: `place` is the user's row in `rows`, −1 where there is none."""

    place: np.ndarray  # int64 [n]
    rows: pa.Table

    def keep(self, kept: np.ndarray) -> pa.Table:
        """The rows of the users `kept` (bool [n]) that have one."""
        return self.rows.take(pa.array(self.place[kept & (self.place >= 0)]))

    def unseen_share(self, num_events: np.ndarray) -> np.ndarray:
        """float64 [n], 0 to 1: the share of the history that the embedding has not seen; 1 where there is none.

        Events that came late or were deleted count too.
        """
        return np.minimum(np.abs(num_events - self._column("num_events", 0)) / np.maximum(num_events, 1), 1.0)

    def older_than(self, moment: float) -> np.ndarray:
        """bool [n]: whether the embedding was made for a time before."""
        return self._column("as_of", 0) < moment

    def _column(self, name: str, missing: int) -> np.ndarray:
        values = np.append(self.rows[name].to_numpy(), missing)  # −1 takes the last
        return values[self.place]


def earlier_rows(
    store: EmbeddingStore, base: str | Generation | None, events: Events, unit: Unit, columns: list[str] | None = None
) -> Earlier:
    """`columns` (default: all, embeddings as they are stored) of the base generation for the unit's users, by whose
    (country, user_id) the log is sorted.
    """
    known = events.users.slice(unit.first, unit.last - unit.first)
    nobody = Earlier(
        np.full(len(known), -1), pa.table({"num_events": pa.array([], pa.int64()), "as_of": pa.array([], pa.int64())})
    )
    if base is None:
        return nobody
    rows, chosen = [], store.published(base, "embeddings")
    for country in pc.unique(known["country"]).to_pylist():
        ids = known.filter(pc.equal(known["country"], country))["user_id"]
        rows.append(store.read_range(chosen, country, (ids[0], ids[-1]), columns))
    found = pa.concat_tables(rows)
    if found["user_id"].type != known["user_id"].type or not len(found):
        return nobody
    place = pc.fill_null(pc.index_in(known["user_id"], value_set=found["user_id"].combine_chunks()), -1)
    return Earlier(place.to_numpy().astype(np.int64), found)
