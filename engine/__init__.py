"""The system around the kernels: from event logs to user embeddings, similarity graphs and ad candidates.

from alure.engine import Config, Events, UserModel, RefreshJob, EmbeddingStore, SimilarityGraph, CandidateRetriever
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alure.engine.config import Config as Config
    from alure.engine.events import Events as Events
    from alure.engine.graph import SimilarityGraph as SimilarityGraph
    from alure.engine.model import UserModel as UserModel
    from alure.engine.refresh import RefreshJob as RefreshJob
    from alure.engine.retrieval import CandidateRetriever as CandidateRetriever
    from alure.engine.retrieval import OnlineRetriever as OnlineRetriever
    from alure.engine.store import EmbeddingStore as EmbeddingStore

_HOMES = {
    "Config": "config",
    "Events": "events",
    "UserModel": "model",
    "RefreshJob": "refresh",
    "EmbeddingStore": "store",
    "SimilarityGraph": "graph",
    "CandidateRetriever": "retrieval",
    "OnlineRetriever": "retrieval",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import on first use, so that `alure --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"alure.engine.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
