"""Personalized PageRank from many nodes of a graph, the best k of each."""

from alure.kernels.pagerank.ops import PageRanks, personalized_pagerank

__all__ = ["PageRanks", "personalized_pagerank"]
