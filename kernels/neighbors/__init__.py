"""Nearest neighbours: assignment to centroids, search inside probed lists, and the k-means that makes the lists."""

from alure.kernels.neighbors.kmeans import train_kmeans
from alure.kernels.neighbors.ops import assign_clusters, grouped_topk

__all__ = ["assign_clusters", "grouped_topk", "train_kmeans"]
