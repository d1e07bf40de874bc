"""events.json: what an event log holds, and the shapes of its columns."""

import json
import time
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alure.engine.errors import InputError

FORMAT_VERSION = 1
MANIFEST_FILE = "events.json"

IdType = Literal["int64", "string"]


class Country(BaseModel):
    """One partition: users are ordered by (country, user_id), so a country is a range of user indices."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    first_user: int
    num_users: int

    @property
    def users(self) -> range:
        return range(self.first_user, self.first_user + self.num_users)


class Manifest(BaseModel):
    """The whole log at a glance. Indices of sources and event types are positions in `sources` and `event_types`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    sources: list[str]
    ad_sources: list[str] = Field(description="sources whose items are ads")
    event_types: list[str] = Field(description="sorted; [] where the log has none")
    num_users: int
    num_items: int
    num_accounts: int
    num_categories: int
    num_events: int
    first_timestamp: int
    last_timestamp: int
    dense_dim: int = Field(0, description="width of the items' dense vectors; 0 = none")
    semantic_levels: int = Field(0, description="levels of the items' semantic ids; 0 = none")
    semantic_codes: int = Field(0, description="largest semantic id of items and events + 1")
    event_dense_dims: dict[str, int] = Field(default_factory=dict, description="source: width of its own dense column")
    event_semantic_levels: dict[str, int] = Field(default_factory=dict, description="source: levels of its own column")
    countries: list[Country]
    source_counts: dict[str, int] = Field(description="source: events")
    quarantine: dict[str, int] = Field(default_factory=dict, description="reason: rows left out")
    user_id_type: IdType
    item_id_type: IdType
    account_id_type: IdType | None = None
    category_id_type: IdType | None = None
    fingerprint: str = Field(
        description="of the inputs' paths, sizes and times, of the options and of how many rows were of the future"
    )
    next_timestamp: int | None = Field(
        None, description="the earliest of these, where the future began with the ingest"
    )

    def is_due(self) -> bool:
        """Whether rows that were of the future are good ones by now, so that the inputs are worth another look."""
        return self.next_timestamp is not None and self.next_timestamp <= time.time()

    def country(self, name: str) -> Country:
        for country in self.countries:
            if country.name == name:
                return country
        known = ", ".join(c.name for c in self.countries[:20])
        raise InputError(f"country: {name!r} is not in the log; it has {known}")

    def write(self, folder: Path) -> None:
        (folder / MANIFEST_FILE).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        path = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise InputError(f"event log: {folder} does not exist; make it with `alure ingest INPUT --out {folder}`")
        if not path.is_file():
            raise InputError(f"event log: {folder} has no {MANIFEST_FILE}, so it is not an event log of `alure ingest`")
        try:
            data = json.loads(path.read_text())
            version = data.get("format_version") if isinstance(data, dict) else None
            if version != FORMAT_VERSION:
                raise InputError(
                    f"event log: {path} has format version {version}, expected {FORMAT_VERSION}; "
                    "run `alure ingest` again"
                )
            return cls.model_validate(data)
        except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise InputError(f"event log: {path} is damaged ({error}); run `alure ingest` again") from None


def folder_name(source: str) -> str:
    """A source's folder: its name, with what a path cannot hold percent-encoded."""
    safe = quote(source, safe=" ")
    return {"": "%", ".": "%2E", "..": "%2E%2E"}.get(safe, safe)
