"""The follow graph: who follows whom, read from Parquet and matched with the users of the store."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from alure.engine.tables import ids_as, read_columns

COLUMNS = ("user_id", "followed_id")


@dataclass(frozen=True)
class Follows:
    """adjacency: [n, n] CSR of ones, row u holds whom user u follows, columns ascending. The rest counts input rows."""

    adjacency: csr_array
    rows: int
    nulls: int = 0
    unknown_users: int = 0  # rows that name a user the store does not have
    self_follows: int = 0
    duplicates: int = 0

    @property
    def kept(self) -> int:
        return int(self.adjacency.nnz)


def read_follows(path: str | Path, user_ids: pa.Array) -> Follows:
    """Read user_id and followed_id from Parquet (a file or folder) or a Delta table; users become rows of `user_ids`.

    Raises InputError for a missing or unreadable file, a missing column (naming the nearest), and ids of another type.
    """
    what = f"social: {path}"
    table = read_columns(Path(path), "social", COLUMNS)
    columns = [ids_as(table, name, user_ids.type, what, "the users of the store") for name in COLUMNS]
    nulls = pc.or_(pc.is_null(columns[0]), pc.is_null(columns[1])).to_numpy(zero_copy_only=False)
    rows = [pc.fill_null(pc.index_in(column, value_set=user_ids), -1).to_numpy() for column in columns]
    return follows_of(rows[0][~nulls], rows[1][~nulls], len(user_ids), nulls=int(nulls.sum()))


def follows_of(users: np.ndarray, followed: np.ndarray, num_users: int, *, nulls: int = 0) -> Follows:
    """From rows of users, −1 for one who is unknown: unknown, self-follows and repetitions are dropped and counted."""
    known = (users >= 0) & (followed >= 0)
    other = known & (users != followed)
    edges = np.sort(users[other].astype(np.int64) * num_users + followed[other])  # np.unique hashes: 20 times slower
    edges = edges[np.diff(edges, prepend=-1) != 0]
    source, target = np.divmod(edges, max(num_users, 1))
    offsets = np.zeros(num_users + 1, dtype=np.int64)
    np.cumsum(np.bincount(source, minlength=num_users), out=offsets[1:])
    adjacency = csr_array((np.ones(len(edges)), target, offsets), shape=(num_users, num_users))
    return Follows(
        adjacency=adjacency,
        rows=len(users) + nulls,
        nulls=nulls,
        unknown_users=int((~known).sum()),
        self_follows=int((known & ~other).sum()),
        duplicates=int(other.sum()) - len(edges),
    )
