"""The store: Delta tables of embeddings, graphs and candidates, and the log that says which generations are visible."""

from alure.engine.store.embedding_store import EmbeddingMatrix, EmbeddingStore
from alure.engine.store.generations import Generation

__all__ = ["EmbeddingMatrix", "EmbeddingStore", "Generation"]
