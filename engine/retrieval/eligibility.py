"""Which ads may be shown at all, and where: the inventory of the day, from a table item_id[, country]."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.tables import ids_as, read_columns, texts_as


@dataclass(frozen=True)
class Eligibility:
    """items[i] may be shown in the country that `names` gives the number countries[i], everywhere where that is −1."""

    items: np.ndarray  # int64 [rows], item index
    countries: np.ndarray  # int64 [rows], ascending
    names: dict[str, int]
    num_items: int
    counts: dict[str, int]

    def group(self, country: str) -> int:
        """Countries of one group may be shown the same: each that the inventory names is one, all others are −1."""
        return self.names.get(country, -1)

    def mask(self, country: str) -> np.ndarray:
        """bool [num_items]: what may be shown in `country`."""
        mask = np.zeros(self.num_items, bool)
        for group in {-1, self.group(country)}:
            first, last = np.searchsorted(self.countries, [group, group + 1])
            mask[self.items[first:last]] = True
        return mask

    @property
    def digest(self) -> str:
        """Tells one inventory from another."""
        parts = [self.items.tobytes(), self.countries.tobytes(), "\n".join(self.names).encode()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def read_eligibility(path: Path, events: Events) -> Eligibility:
    """From Parquet or Delta: item_id, and country where what may be shown differs (null: everywhere).

    Items and countries that the log does not know bring nothing, and their rows are counted. Raises InputError for what
    cannot be read, ids of another type, and where no item or no country of the log is left.
    """
    table = read_columns(path, "eligible", ["item_id"], ["country"])
    ids = ids_as(table, "item_id", events.items.item_ids.type, f"eligible: {path}", "the items of the log")
    found = events.item_indices(ids)
    country = pa.chunked_array([pa.nulls(len(table), pa.string())])
    if "country" in table.column_names:
        country = texts_as(table, "country", f"eligible: {path}")
        country = pc.if_else(pc.equal(country, ""), None, country)  # none, as in ingest
    names = pc.unique(country.drop_null())
    countries = pc.fill_null(pc.index_in(country, value_set=names), -1).to_numpy().astype(np.int64)
    known = found >= 0
    if not known.any():
        raise InputError(
            f"eligible: {path}: none of its {len(table):,} items is among the {len(events.items):,} of the log; "
            "nothing could be retrieved. Give item_id as the event log has it"
        )
    here = [each.name for each in events.manifest.countries]
    elsewhere = pc.and_(pc.is_valid(country), pc.invert(pc.is_in(country, value_set=pa.array(here, pa.string()))))
    counts = {
        "rows": len(table),
        "unknown_items": int((~known).sum()),
        "unknown_countries": pc.sum(elsewhere).as_py() or 0,
        "items": len(np.unique(found[known])),
    }
    if counts["unknown_countries"] == len(table):
        raise InputError(
            f"eligible: {path}: column country: none of {', '.join(names.to_pylist()[:3])}, … is a country of the "
            f"log, which has {', '.join(here[:3])}, …; nothing could be retrieved. Give country as the event log has it"
        )
    found, countries = found[known], countries[known]
    order = np.argsort(countries, kind="stable")
    numbers = {name: number for number, name in enumerate(names.to_pylist())}
    return Eligibility(found[order], countries[order], numbers, len(events.items), counts)
