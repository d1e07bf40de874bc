"""Retrieval: the ads that similar users engaged with, and other ads of the same accounts, for every user."""

from alure.engine.retrieval.online import OnlineRetriever
from alure.engine.retrieval.report import RetrievalReport
from alure.engine.retrieval.retriever import CandidateRetriever, retrieve

__all__ = ["CandidateRetriever", "OnlineRetriever", "RetrievalReport", "retrieve"]
