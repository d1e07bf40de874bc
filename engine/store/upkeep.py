"""Upkeep of a store: verify what is published, roll it back, vacuum what nobody reads any more."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from alure.engine.errors import AlureError, InputError
from alure.engine.store.checksums import EMBEDDINGS
from alure.engine.store.delta import DataTable
from alure.engine.store.embedding_store import EmbeddingStore
from alure.engine.store.generations import Generation
from alure.engine.store.kv_cache import kept_by, kv_cache_folder
from alure.engine.store.location import half_written, remove, size_of

GRACE_HOURS = 168.0  # a week: readers that began before, and a job that may still be resumed


@dataclass(frozen=True)
class VerifyReport:
    generations: list[str]
    publications: int
    files: int
    size_bytes: int


def verify(store: EmbeddingStore, generation: str | None = None) -> VerifyReport:
    """Read every file of what is published (of one generation, where given) and compare it with its checksum; then the
    embeddings row by row: their number, users once, one model, finite. Raises AlureError that names what is damaged.
    """
    published = [p for p in store.generations() if generation in (None, p.generation)]
    if not published:
        store.published(generation, "embeddings")  # says what there is
    files, size, problems = 0, 0, []
    for publication in published:
        data, write = _place(store, publication)
        checked = store.checksums.check(data, publication.generation, write)
        files, size = files + checked.files, size + checked.size_bytes
        problems += [f"{data.path.name}/{problem}" for problem in checked.problems]
        if publication.table == "embeddings" and not checked.problems:
            store.check_integrity(publication.generation)
    if problems:
        listed = "\n  ".join(problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise AlureError(
            f"{store.path}: {len(problems)} of {files} files are damaged; roll back to a sound generation "
            f"(`alure rollback`) or restore them from a copy:\n  {listed}"
        )
    return VerifyReport(list(dict.fromkeys(p.generation for p in published)), len(published), files, size)


@dataclass(frozen=True)
class RollbackReport:
    newest: str
    withdrawn: list[str]
    restored: bool  # `newest` had been withdrawn itself


def rollback(store: EmbeddingStore, to: str | None = None) -> RollbackReport:
    """Make generation `to` (default: the one before the newest) the newest, in one commit: what was published after it
    is withdrawn with everything derived from it, and readers see it no more. Its rows stay until a vacuum, so a later
    `rollback` to a withdrawn generation brings it back.
    """
    done: list[RollbackReport] = []

    def decide(newest: list[Generation]) -> list[Generation]:
        embeddings = [p for p in newest if p.table == "embeddings"]
        target = _target(store, embeddings, to)
        later = {p.generation for p in embeddings if p.sequence > target.sequence and not p.withdrawn}
        done[:] = [RollbackReport(target.generation, sorted(later), target.withdrawn)]
        withdrawn = [replace(p, withdrawn=True) for p in newest if p.generation in later and not p.withdrawn]
        restored = [replace(p, withdrawn=False) for p in newest if p.generation == target.generation and p.withdrawn]
        return withdrawn + restored

    store.log.append(decide)
    return done[0]


def _target(store: EmbeddingStore, embeddings: list[Generation], to: str | None) -> Generation:
    visible = [p for p in embeddings if not p.withdrawn]
    if to is None:
        if len(visible) < 2:
            raise InputError(f"rollback: {store.path} has {len(visible)} published generations; there is none before")
        return visible[-2]
    found = next((p for p in embeddings if p.generation == to), None)
    if found is None:
        store.published(to, "embeddings")  # says what there is
        raise AssertionError
    if found.withdrawn and store.count_written(to) != found.rows:
        raise InputError(f"rollback: generation {to} was withdrawn, and a vacuum has removed its rows; refresh again")
    return found


@dataclass(frozen=True)
class VacuumReport:
    dry_run: bool
    kept: list[str]
    removed: list[str]  # generations, or single writes of a generation that is kept
    files: int
    size_bytes: int


def vacuum(
    store: EmbeddingStore, *, keep: int | None = None, grace_hours: float = GRACE_HOURS, dry_run: bool = False
) -> VacuumReport:
    """Delete what no reader can ask for: of all but the newest `keep` generations (None: keep all published), of
    generations withdrawn or never finished, of writes that died; none of it younger than `grace_hours`. Keys and values
    stay for as long as a kept generation was carried forward from theirs.

    A file goes `grace_hours` after the last snapshot that held it, so a reader that is under way is not disturbed; of
    what is removed now, the files go with the first vacuum after that.
    """
    if grace_hours < 0 or (keep is not None and keep < 1):
        raise InputError(f"vacuum: expected grace_hours >= 0 and keep >= 1, got {grace_hours} and {keep}")
    found = list(dict.fromkeys(p.generation for p in store.generations()))
    kept = found[-keep if keep else 0 :]
    unwanted = set(found) - set(kept)  # what is published meanwhile is in neither and stays
    before = time.time() - 3600 * grace_hours
    wanted = {_key(store, p) for p in store.log.withdrawn() if p.published_at and p.published_at.timestamp() > before}
    if not dry_run:  # seen by readers before it happens
        store.log.append(
            lambda newest: [replace(p, withdrawn=True) for p in newest if not p.withdrawn and p.generation in unwanted]
        )
    wanted |= {_key(store, p) for p in store.generations() if p.generation not in unwanted}
    removed: dict[str, None] = {}
    for data in (store.embeddings, *(table.data for table in store.whole.values())):
        for (generation, write), written_at in _writes(data).items():
            if (data.path.name, generation, write) in wanted or written_at > before:
                continue
            removed[f"{data.path.name}/{generation}" + (f"/{write}" if write != EMBEDDINGS else "")] = None
            if not dry_run:
                _remove(store, data, generation, write)
    files, size = _vacuum_kv_cache(store, kept, before, removed, dry_run)
    for data in store.tables():
        unread = data.vacuum(grace_hours, dry_run=True)
        files, size = files + len(unread), size + size_of(data.path, unread)
        if not dry_run:
            data.vacuum(grace_hours, dry_run=False)
    return VacuumReport(dry_run, kept, list(removed), files, size)


def _vacuum_kv_cache(
    store: EmbeddingStore, kept: list[str], before: float, removed: dict[str, None], dry_run: bool
) -> tuple[int, int]:
    """(files, bytes) of keys and values that no incremental refresh on top of a kept generation would read."""
    if not isinstance(store.path, Path):
        return 0, 0
    everything = kv_cache_folder(store.path, "")
    wanted = {name for generation in kept for name in kept_by(store.log, generation)}
    unwanted = sorted(
        folder.name
        for folder in everything.glob("*")
        if folder.is_dir() and folder.name not in wanted and folder.stat().st_mtime <= before
    )
    files = [path for path in half_written(everything, before) if Path(path).parent.name not in unwanted]
    files += [f"{name}/{file.name}" for name in unwanted for file in (everything / name).iterdir()]
    removed.update((f"kv_cache/{name}", None) for name in unwanted)
    size = size_of(everything, files)
    if not dry_run:
        for path in files:
            (everything / path).unlink(missing_ok=True)
        for name in unwanted:
            remove(everything / name)
    return len(files), size


def _place(store: EmbeddingStore, publication: Generation) -> tuple[DataTable, str]:
    """The table that holds a publication's rows, and the name of the write that made them."""
    if publication.table == "embeddings":
        return store.embeddings, EMBEDDINGS
    return store.whole[publication.table].data, publication.write_id


def _key(store: EmbeddingStore, publication: Generation) -> tuple[str, str, str]:
    data, write = _place(store, publication)
    return data.path.name, publication.generation, write


def _writes(data: DataTable) -> dict[tuple[str, str], float]:
    """(generation, write) of a table: when its newest file was written."""
    newest: dict[tuple[str, str], float] = {}
    for file in data.files():
        key = (file.partition["generation"], file.partition.get("write_id", EMBEDDINGS))
        newest[key] = max(newest.get(key, 0.0), file.written_at)
    return newest


def _remove(store: EmbeddingStore, data: DataTable, generation: str, write: str) -> None:
    if write == EMBEDDINGS:
        data.remove(generation, generation=generation)
        remove(store.path / "leases" / generation)
    else:
        data.delete(write_id=write)
    store.checksums.forget(generation, write)
