"""Which ads may be shown at all, and where: the inventory of the day, from a table item_id[, country]."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alure.engine.errors import InputError
from alure.engine.events import Events
from alure.engine.tables import ids_as, read_columns


@dataclass(frozen=True)
class Eligibility:
    """items[i] may be shown in the country names[countries[i]], everywhere where that is −1."""

    items: np.ndarray  # int64 [rows], item index
    countries: np.ndarray  # int64 [rows]
    names: list[str]
    num_items: int
    counts: dict[str, int]

    def mask(self, country: str) -> np.ndarray:
        """bool [num_items]: what may be shown in `country`."""
        mask = np.zeros(self.num_items, bool)
        code = self.names.index(country) if country in self.names else -1
        mask[self.items[(self.countries == code) | (self.countries == -1)]] = True
        return mask

    @property
    def digest(self) -> str:
        """Tells one inventory from another."""
        parts = [self.items.tobytes(), self.countries.tobytes(), "\n".join(self.names).encode()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def read_eligibility(path: Path, events: Events) -> Eligibility:
    """From Parquet or Delta: item_id, and country where what may be shown differs (null: everywhere).

    Items that the log does not know cannot be retrieved, and are counted. Raises InputError for what cannot be read,
    ids of another type, and where no item of the log is left.
    """
    table = read_columns(path, "eligible", ["item_id"], ["country"])
    ids = ids_as(table, "item_id", events.items.item_ids.type, f"eligible: {path}", "the items of the log")
    found = events.item_indices(ids)
    country = table["country"] if "country" in table.column_names else pa.nulls(len(table))
    country = country.cast(pa.string())
    names = pc.unique(country.drop_null())
    countries = pc.fill_null(pc.index_in(country, value_set=names), -1).to_numpy().astype(np.int64)
    known = found >= 0
    if not known.any():
        raise InputError(
            f"eligible: {path}: none of its {len(table):,} items is among the {len(events.items):,} of the log; "
            "nothing could be retrieved. Give item_id as the event log has it"
        )
    counts = {"rows": len(table), "unknown_items": int((~known).sum()), "items": len(np.unique(found[known]))}
    return Eligibility(found[known], countries[known], names.to_pylist(), len(events.items), counts)
