"""Checksums of the files of what is published, so that a flipped bit is found before somebody reads it."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs

from alure.engine.store.delta import DataTable
from alure.engine.store.location import Location, filesystem

COLUMNS = ["table", "file", "size_bytes", "sha256"]
TEXTS = ("generation", "write", "table", "file", "sha256")
SCHEMA = pa.schema([*((name, pa.string()) for name in TEXTS), ("size_bytes", pa.int64())])
EMBEDDINGS = "embeddings"  # as the name of a write: a generation's embeddings are one
READERS = 8  # files that are read at once


@dataclass(frozen=True)
class Checked:
    """A publication's files, and what is wrong with them."""

    files: int
    size_bytes: int
    problems: list[str]


class Checksums:
    """Recorded before a publication, so what is published has them."""

    def __init__(self, path: Location) -> None:
        self.path = path
        self.table = DataTable(path / "checksums", ["generation", "write"])

    def record(self, data: DataTable, generation: str, write: str = EMBEDDINGS) -> None:
        """Read through the files that `data` has of this write, once."""
        files = files_of(data, generation, write)
        digests = [digest for _, digest in self._digests(data.path, files)]
        count = len(files)
        rows = pa.table(
            [
                pa.repeat(generation, count), pa.repeat(write, count), pa.repeat(data.path.name, count),
                pa.array(list(files), pa.string()), pa.array(digests, pa.string()),
                pa.array(list(files.values()), pa.int64()),
            ],
            schema=SCHEMA,
        )  # fmt: skip
        self.table.append_once(rows, f"{generation}/{write}", "files")

    def forget(self, generation: str, write: str) -> None:
        if self.table.exists():
            self.table.remove(f"{generation}/{write}", generation=generation, write=write)

    def check(self, data: DataTable, generation: str, write: str = EMBEDDINGS) -> Checked:
        """Read the files again."""
        of_write = (ds.field("generation") == generation) & (ds.field("write") == write)
        recorded = {row["file"]: row for row in self.table.table(of_write, COLUMNS).to_pylist()}
        present = files_of(data, generation, write)
        problems = [f"{file}: is not among the checksums" for file in present.keys() - recorded.keys()]
        problems += [f"{file}: is not in the table any more" for file in recorded.keys() - present.keys()]
        for file, found in self._digests(data.path, recorded):
            if found != recorded[file]["sha256"]:
                problems.append(f"{file}: expected SHA-256 {recorded[file]['sha256'][:16]}…, got {found[:16]}")
        return Checked(len(recorded), sum(row["size_bytes"] for row in recorded.values()), sorted(problems))

    def _digests(self, folder: Location, files: Iterable[str]) -> Iterator[tuple[str, str]]:
        where = filesystem(folder)
        with ThreadPoolExecutor(READERS) as pool:
            yield from zip(files, pool.map(lambda file: digest_of(where, file), files))


def files_of(data: DataTable, generation: str, write: str) -> dict[str, int]:
    """path in the table's folder: bytes."""
    part = {"generation": generation} if write == EMBEDDINGS else {"generation": generation, "write_id": write}
    return {file.path: file.size_bytes for file in data.files(**part)}


def digest_of(where: fs.FileSystem, path: str) -> str:
    """SHA-256 of a file; "none" where it is gone."""
    try:
        with where.open_input_stream(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "none"
