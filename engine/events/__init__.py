"""Event logs: ingested once from Parquet or Delta, then read through memory maps as batches of users."""

from alure.engine.events.batch import EventBatch, EventSequence
from alure.engine.events.ingestion import ingest
from alure.engine.events.items import ItemTable
from alure.engine.events.keys import stable_keys
from alure.engine.events.manifest import Country, Manifest
from alure.engine.events.reader import Events, History, SourceColumns
from alure.engine.events.recent import RecentEvents
from alure.engine.events.report import IngestReport

__all__ = [
    "Country",
    "EventBatch",
    "EventSequence",
    "Events",
    "History",
    "IngestReport",
    "ItemTable",
    "Manifest",
    "RecentEvents",
    "SourceColumns",
    "ingest",
    "stable_keys",
]
