"""Where a store is: a folder of this machine or of an S3-compatible bucket, and all that the two do differently."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import pyarrow.fs as fs

from alure.engine.errors import refuse_s3
from alure.engine.store.s3 import S3Location, S3Settings

Location: TypeAlias = Path | S3Location
READ_ATTEMPTS = 5


def locate(store: str | Location) -> Location:
    """A path, or the folder of s3://bucket/prefix. Raises InputError where that is no such URL."""
    if isinstance(store, S3Location):
        return store
    if isinstance(store, str) and store.startswith("s3:"):
        return S3Location.parse(store)
    refuse_s3(Path(store), "store: a pathlib.Path drops a slash of the URL, give it as text")
    return Path(store)


def reach(location: Location) -> None:
    """Raise an error that says why where the location's server cannot be used."""
    if isinstance(location, S3Location):
        location.reach()


def make(location: Location) -> None:
    """The folder of a new store. Raises InputError where commits there would not exclude each other."""
    if isinstance(location, S3Location):
        location.check_conditional_writes()
    else:
        location.mkdir(parents=True, exist_ok=True)


def storage_options(location: Location) -> dict[str, str] | None:
    """What delta-rs needs besides the location's text."""
    return S3Settings.from_environment().storage_options() if isinstance(location, S3Location) else None


def filesystem(location: Location) -> fs.FileSystem:
    """Arrow's file system, whose paths begin in the folder."""
    if isinstance(location, S3Location):
        return fs.SubTreeFileSystem(f"{location.bucket}/{location.key}", _client(S3Settings.from_environment()))
    return fs.SubTreeFileSystem(str(location.resolve()), fs.LocalFileSystem())


@lru_cache(maxsize=2)
def _client(settings: S3Settings) -> fs.S3FileSystem:
    server = urlsplit(settings.endpoint)
    return fs.S3FileSystem(
        access_key=settings.access_key,
        secret_key=settings.secret_key,
        session_token=settings.session_token,
        region=settings.region,
        scheme=server.scheme,
        endpoint_override=server.netloc,
        connect_timeout=10,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=READ_ATTEMPTS),
    )


def size_of(location: Location, files: Iterable[str] | None = None) -> int:
    """Bytes of these files (default: all), those that are gone left out."""
    wanted = fs.FileSelector("", allow_not_found=True, recursive=True) if files is None else list(files)
    return sum(found.size for found in filesystem(location).get_file_info(wanted) if found.type == fs.FileType.File)


def half_written(location: Location, before: float) -> list[str]:
    """Files that a writer left when it died before a time. S3 shows no object before it is whole."""
    if isinstance(location, S3Location):
        return []
    found = []
    for path in location.rglob("*#*"):
        with suppress(FileNotFoundError):  # its writer lives, and has given it its name
            if path.stat().st_mtime < before:
                found.append(str(path.relative_to(location)))
    return found


def remove(location: Location) -> None:
    """A folder with all that is in it, where it is there."""
    if not isinstance(location, S3Location):
        return shutil.rmtree(location, ignore_errors=True)
    everything = fs.FileSelector("", allow_not_found=True, recursive=True)
    for found in filesystem(location).get_file_info(everything):
        if found.type == fs.FileType.File:
            (location / found.path).delete()
