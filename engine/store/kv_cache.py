"""The keys and values that a refresh keeps beside the store's tables, so that the next one runs new events only.

STORE/kv_cache/GENERATION/UNIT.arrow   Arrow's file format, read in place; appears whole, by a rename

A row is a segment: events `first` to `last` − 1 of one user in one source. A history's segments are spread over the
generations that embedded the user anew, each of which adds what the ones before did not have. It is a cache: what is
missing or damaged is computed again.
"""

import itertools
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import AlureError
from alure.engine.files import publish
from alure.engine.progress import say
from alure.engine.store.generations import GenerationLog

INTEGERS = ("first", "last", "first_fingerprint", "last_fingerprint", "checksum")


def kv_cache_folder(store: Path, generation: str) -> Path:
    return store / "kv_cache" / generation


def kept_by(log: GenerationLog, newest: str | None) -> list[str]:
    """Generations that kept keys and values, from `newest` on back along what each was carried forward from.

    Those withdrawn by a vacuum count: their segments are kept for as long as one that is carried on from them.
    """
    known = {p.generation: p for p in (*log.withdrawn(), *log.published("embeddings")) if p.table == "embeddings"}
    kept: list[str] = []
    while newest in known and known[newest].properties.get("kv_cache"):
        kept.append(newest)
        newest = known[newest].properties["base"]
    return kept


def schema_of(ids: pa.DataType) -> pa.Schema:
    return pa.schema(
        {"user_id": ids, "source": pa.string(), **dict.fromkeys(INTEGERS, pa.int64()), "key_values": pa.large_binary()}
    )


@dataclass(frozen=True)
class Segments:
    """Of one source: events first[i] to last[i] − 1 of users[i], int64 [n] each.

    first_fingerprints, last_fingerprints: int64 [n], of each user's events before first[i], and before last[i]. values:
    uint8 [sum of last − first, bytes an event].
    """

    source: str
    users: pa.Array
    first: np.ndarray
    last: np.ndarray
    first_fingerprints: np.ndarray
    last_fingerprints: np.ndarray
    values: np.ndarray

    def batch(self, schema: pa.Schema) -> pa.RecordBatch:
        offsets = np.concatenate([[0], np.cumsum(self.last - self.first)]) * self.values.shape[1]
        data = pa.py_buffer(np.ascontiguousarray(self.values).reshape(-1))
        checksums = [zlib.crc32(data[start:end]) for start, end in itertools.pairwise(offsets)]
        buffers = [None, pa.py_buffer(offsets), data]
        key_values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.users), buffers)
        columns = [
            self.users,
            pa.repeat(self.source, len(self.users)),
            *map(pa.array, (self.first, self.last, self.first_fingerprints, self.last_fingerprints)),
            pa.array(checksums, pa.int64()),
            key_values,
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)


class SegmentWriter:
    """`with SegmentWriter(path, ids) as writer: writer.add(…)`: the file is there once the block ends without error.

    Raises AlureError where the disk refuses.
    """

    def __init__(self, path: Path, ids: pa.DataType) -> None:
        self.path, self.schema = path, schema_of(ids)
        self.temporary = path.with_name(f"{path.name}#{secrets.token_hex(4)}")

    def __enter__(self) -> "SegmentWriter":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.temporary.open("xb")
            self.stream = pa.ipc.new_file(self.file, self.schema)
        except OSError as error:
            raise self._refused(error) from error
        return self

    def add(self, segments: Segments) -> None:
        if not len(segments.users):
            return
        try:
            self.stream.write_batch(segments.batch(self.schema))
        except OSError as error:
            raise self._refused(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            try:
                self.stream.close()
            finally:
                self.file.close()
            if kind is None:
                publish(self.temporary, self.path)
        except OSError as refused:
            if kind is None:
                raise self._refused(refused) from refused
        finally:
            self.temporary.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> AlureError:
        return AlureError(
            f"{self.path}: cannot be written ({error}); free space, or refresh without kv_cache, and run again"
        )


class KvCache:
    """The segments of a chain of generations, oldest first, by the users of a log, read in place.

    ids: their type; user_indices: int64 [n] of ids, −1 where the log does not know one. row_bytes: {source: bytes an
    event}. A segment is of use where all before it is there, by its fingerprint too; what is not is left out. Nothing
    that the files say is trusted.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        row_bytes: Mapping[str, int],
        ids: pa.DataType,
        num_users: int,
        user_indices: Callable[[pa.Array], np.ndarray],
    ) -> None:
        self.row_bytes, self.schema, self.user_indices = row_bytes, schema_of(ids), user_indices
        self.batches: list[pa.RecordBatch] = []
        self.columns = {name: np.zeros(1, np.int64) for name in (*INTEGERS, "earlier", "batch", "row")}
        self.newest = {source: np.zeros(num_users, np.int64) for source in row_bytes}  # segments; 0: nothing
        for folder in folders:
            self._add(folder)

    def cached(self, source: str, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(events, fingerprint of these), int64 [n] each, that there is something of; 0 events where there is none."""
        newest = self.newest[source][users]
        return self.columns["last"][newest], self.columns["last_fingerprint"][newest]

    def read(self, source: str, users: np.ndarray, into: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """bool [n]: whose events are sound; those of users[i] are copied to the rows from starts[i] on of `into`.

        into: uint8 [rows, bytes an event].
        """
        sound = np.ones(len(users), bool)
        for i, (segment, start) in enumerate(zip(self.newest[source][users], starts)):
            while segment:
                first, last, _, _, checksum, earlier, batch, row = (int(x[segment]) for x in self.columns.values())
                data = self.batches[batch]["key_values"][row].as_buffer()
                sound[i] &= zlib.crc32(data) == checksum
                into[start + first : start + last] = np.frombuffer(data, np.uint8).reshape(last - first, -1)
                segment = earlier
        if not sound.all():
            say(f"refresh: kv_cache: what there is of {np.count_nonzero(~sound):,} users is damaged; computed again")
        return sound

    def _add(self, folder: Path) -> None:
        """The segments of a generation; the last where it has several of a user and source."""
        batches = [batch for path in sorted(folder.glob("*.arrow")) for batch in _batches(path, self.schema)]
        if not batches:
            return
        rows = pa.Table.from_batches(batches).select(["user_id", "source", *INTEGERS])
        found = {name: rows[name].to_numpy() for name in INTEGERS}
        first, last = found["first"], found["last"]
        sizes = np.concatenate([pc.binary_length(batch["key_values"]).to_numpy() for batch in batches])
        users, found["earlier"] = self.user_indices(rows["user_id"]), np.zeros(len(rows), np.int64)
        some = (users >= 0) & (first >= 0) & (last > first)
        for source, newest in self.newest.items():
            events, odd = np.divmod(sizes, self.row_bytes[source])
            whole = (last - first == events) & (odd == 0) & pc.equal(rows["source"], source).to_numpy()
            own = np.flatnonzero(some & whole)
            earlier = np.where(first[own] == 0, 0, newest[users[own]])
            fits = self.columns["last"][earlier] == first[own]
            fits &= self.columns["last_fingerprint"][earlier] == found["first_fingerprint"][own]
            found["earlier"][own] = earlier
            newest[users[own]] = np.where(fits, len(self.columns["first"]) + own, 0)
        counts = [len(batch) for batch in batches]
        found["batch"] = np.repeat(len(self.batches) + np.arange(len(batches)), counts)
        found["row"] = np.concatenate([np.arange(count) for count in counts])
        self.columns = {name: np.concatenate([column, found[name]]) for name, column in self.columns.items()}
        self.batches += batches


def _batches(path: Path, schema: pa.Schema) -> list[pa.RecordBatch]:
    """What `SegmentWriter` wrote, in place; nothing where that is damaged."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != schema:
            raise pa.ArrowInvalid("it has other columns")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                raise pa.ArrowInvalid("it has nulls")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        say(f"refresh: {path}: cannot be read ({error}); what it had is computed again")
        return []
    return batches
