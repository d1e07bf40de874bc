"""The application transactions of a Delta table, all of them in one pass over its log.

delta-rs tells one at a time, for which it reads every commit since the checkpoint: on S3 up to a hundred requests.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as fs
import pyarrow.parquet as pq

CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")
READERS = 8  # commits that are read at once


def read_transactions(folder: fs.FileSystem, version: int) -> dict[str, int]:
    """{application: version} in a version of the table in `folder`, from its newest checkpoint before and the commits
    after that (Delta protocol, "Checkpoints" and "Transaction Identifiers").
    """
    log = fs.SubTreeFileSystem("_delta_log", folder)
    names = [CHECKPOINT.fullmatch(file.base_name) for file in log.get_file_info(fs.FileSelector(""))]
    checkpoint = max((int(name[1]) for name in names if name and int(name[1]) <= version), default=-1)
    found = dict(_of_checkpoint(log, checkpoint)) if checkpoint >= 0 else {}
    with ThreadPoolExecutor(READERS) as pool:
        for commit in pool.map(lambda number: _read(log, number), range(checkpoint + 1, version + 1)):
            found |= dict(_of_commit(commit))
    return found


def _of_checkpoint(log: fs.FileSystem, number: int) -> Iterator[tuple[str, int]]:
    rows = pq.read_table(f"{number:020}.checkpoint.parquet", columns=["txn"], filesystem=log)["txn"]
    return ((row["appId"], row["version"]) for row in rows.to_pylist() if row and row["appId"] is not None)


def _read(log: fs.FileSystem, number: int) -> bytes:
    with log.open_input_stream(f"{number:020}.json") as file:
        return file.read()


def _of_commit(commit: bytes) -> Iterator[tuple[str, int]]:
    """Each line is one action."""
    for line in commit.splitlines():
        if b'"txn"' in line and "txn" in (action := json.loads(line)):
            yield action["txn"]["appId"], action["txn"]["version"]
