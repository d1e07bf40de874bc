"""Graphs between users: similarity of their embeddings, follows, and Personalized PageRank over follows."""

from alure.engine.graph.follows import Follows, read_follows
from alure.engine.graph.job import GraphReport, build_graphs
from alure.engine.graph.ppr import ppr_graph
from alure.engine.graph.similar import CountryReport, build_similarity_graph
from alure.engine.graph.similarity import SimilarityGraph
from alure.engine.graph.social import social_graph

__all__ = [
    "CountryReport",
    "Follows",
    "GraphReport",
    "SimilarityGraph",
    "build_graphs",
    "build_similarity_graph",
    "ppr_graph",
    "read_follows",
    "social_graph",
]
