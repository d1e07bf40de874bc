"""How many clusters a country gets, and how many of them a user searches, where the configuration leaves it open.

n users are compared with n·nlist centroids and n²·nprobe / nlist others, and k-means, of 256 points a cluster, compares
2,560·nlist² pairs. More clusters make lists shorter, but spread neighbours over more of them, so that nprobe grows
nearly as fast. With √n clusters a search for a given recall is the fastest or close to it (bench/NOTES.md). nprobe is
measured: at 50,000 users, .95 of the neighbours are in 1 to 89 of 224 clusters, depending on the data.
"""

import numpy as np
import torch

from alure.engine.clusters import Clusters
from alure.engine.config import GraphConfig
from alure.engine.graph.engines import ExactSearch
from alure.kernels import assign_clusters

RECALL_TARGET = 0.95
SAMPLE = 1000  # users whose neighbours decide about nprobe: 0.95 ± 0.005


def auto_nlist(users: int) -> int:
    return round(users**0.5)


def auto_nprobe(vectors: np.ndarray, clusters: Clusters, config: GraphConfig, seed: int) -> int:
    """The fewest clusters a user must search to find config.recall_target of the true config.k nearest, on a sample.

    A neighbour is found where its cluster is among the user's nprobe nearest. So the ranks of the neighbours' clusters
    give the recall of every nprobe at once, and that asked for is their quantile.
    """
    rng = np.random.default_rng([seed, 1])  # others than those whose recall is reported
    rows = np.sort(rng.choice(len(vectors), min(SAMPLE, len(vectors)), replace=False))
    exact = ExactSearch(vectors, config.k)
    _, found = exact.search(rows)
    neighbors = torch.from_numpy(found).to(exact.x.device)
    _, nearest_first = assign_clusters(exact.x[torch.from_numpy(rows)], clusters.centroids, clusters.nlist)
    _, own = assign_clusters(exact.x[neighbors.clamp(min=0).flatten()], clusters.centroids)
    ranks = nearest_first.argsort(dim=1).gather(1, own.view_as(neighbors))[neighbors >= 0]
    target = config.recall_target or RECALL_TARGET
    return int(np.quantile(ranks.cpu().numpy(), target, method="inverted_cdf")) + 1
