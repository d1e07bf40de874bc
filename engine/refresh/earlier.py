"""What an earlier generation knows of a unit's users: who may keep their embedding, and who needs another most."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.events import Events
from alure.engine.refresh.planner import Unit
from alure.engine.store import EmbeddingStore, Generation
from alure.engine.store.rows import FINGERPRINT


@dataclass(frozen=True)
class Earlier:
    """Of n users: `place` is the user's row in `rows`, −1 where there is none; `num_before` how many events the log has
    by now up to the time that the user's embedding was made for; `same` whether they are those that it has seen, and
    all there are.
    """

    place: np.ndarray  # int64 [n]
    rows: pa.Table
    num_before: np.ndarray  # int64 [n]
    same: np.ndarray  # bool [n]

    def keep(self, kept: np.ndarray) -> pa.Table:
        """The rows of the users `kept` (bool [n]) that have one."""
        return self.rows.take(pa.array(self.place[kept & (self.place >= 0)]))

    def unseen_share(self, num_events: np.ndarray) -> np.ndarray:
        """float64 [n], 0 to 1: the share of the history that the embedding has not seen; 1 where there is none.

        Events that came late or were deleted count too, also where as many are new; of a history that changed without
        that, one.
        """
        unseen = num_events - self.num_before + np.abs(self.num_before - column(self.rows, "num_events", self.place))
        unseen = np.maximum(unseen, ~self.same)
        return np.minimum(unseen / np.maximum(num_events, 1), 1.0)

    def older_than(self, moment: float) -> np.ndarray:
        """bool [n]: whether the embedding was made for a time before."""
        return column(self.rows, "as_of", self.place) < moment


def column(rows: pa.Table, name: str, place: np.ndarray) -> np.ndarray:
    """int64 [n], 0 where `place` is −1."""
    values: np.ndarray = np.append(rows[name].to_numpy(), 0)  # −1 takes the last
    return values[place]


def earlier_rows(
    store: EmbeddingStore,
    base: str | Generation | None,
    events: Events,
    unit: Unit,
    num_events: np.ndarray,
    columns: list[str] | None = None,
) -> Earlier:
    """`columns` (default: all, embeddings as they are stored) of the base generation for the unit's users, by whose
    (country, user_id) the log is sorted. num_events: int64 [n], what each has by now.
    """
    known = events.users.slice(unit.first, unit.last - unit.first)
    nobody = Earlier(
        place=np.full(len(known), -1),
        rows=pa.table({"num_events": pa.array([], pa.int64()), "as_of": pa.array([], pa.int64())}),
        num_before=np.zeros(len(known), np.int64),
        same=np.zeros(len(known), bool),
    )
    if base is None:
        return nobody
    chosen, countries = store.published(base, "embeddings"), pc.unique(known["country"]).to_pylist()
    rows = []
    if len(countries) > 2:  # those between are whole in the unit: one read, however many
        rows.append(store.read_countries(chosen, countries[1:-1], columns))
    for country in dict.fromkeys((countries[0], countries[-1])):
        ids = known.filter(pc.equal(known["country"], country))["user_id"]
        rows.append(store.read_range(chosen, country, (ids[0], ids[-1]), columns))
    found = pa.concat_tables(rows)
    if found["user_id"].type != known["user_id"].type or not len(found):
        return nobody
    if FINGERPRINT not in found.schema.names:  # of a version before
        found = found.append_column(FINGERPRINT, pa.nulls(len(found), pa.int64()))
    index = pc.fill_null(pc.index_in(known["user_id"], value_set=found["user_id"].combine_chunks()), -1)
    place = index.to_numpy().astype(np.int64)
    as_of = column(found, "as_of", place)
    num_before = events.num_events(as_of, unit.users)
    same = (place >= 0) & (num_before == column(found, "num_events", place)) & (num_before == num_events)
    places = np.flatnonzero(same)  # the fingerprints of whoever has another number of events say nothing more
    now = pa.array(events.fingerprints(as_of[places], places + unit.first))
    then = found[FINGERPRINT].take(pa.array(place[places])).combine_chunks()
    same[places] = pc.fill_null(pc.equal(now, then), False).to_numpy(zero_copy_only=False)
    return Earlier(place, found, num_before, same)
