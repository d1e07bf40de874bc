"""The CPU, float32: hands tensors to the C++ of kernels/native, which groups the queries of a list into products.

A product only nominates rows, with a bound on its rounding: of bytes with AMX, AVX-512 and AVX2, else of float32. Each
nominee is scored exactly. So the result does not depend on threads, instruction set or batch. Extra memory: the
database once more in what the products take (a quarter of it as bytes), and some 15 MB a thread.
"""

import torch
from torch import Tensor

from alure.kernels import _native
from alure.kernels.neighbors.scores import Search

INSTRUCTION_SET: str = _native.instruction_set()


def search(task: Search) -> Tensor:
    """The k best keys of every query, best first, [nq, k] int64 (MISSING where fewer were found)."""
    keys = torch.empty((task.queries.shape[0], task.k), dtype=torch.int64)
    sound = _native.search_neighbors(
        task.queries.numpy(),
        task.database.numpy(),
        task.list_offsets.contiguous().numpy(),
        task.probes.contiguous().numpy(),
        task.rank.contiguous().numpy(),
        task.exclude_row.contiguous().numpy(),
        keys.numpy(),
        task.metric,
        INSTRUCTION_SET,
        torch.get_num_threads(),
    )
    if not sound:
        raise ValueError("list_offsets, probes, rank: expected offsets of the database, its lists, and ranks < 2³¹")
    return keys


def assign(x: Tensor, centroids: Tensor, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """(D, I) of the nprobe best centroids of every row. Of one the score is exact, rounded once; of more those of one
    float32 matrix product.
    """
    D = torch.empty((x.shape[0], nprobe), dtype=torch.float32)
    I = torch.empty((x.shape[0], nprobe), dtype=torch.int64)
    threads = torch.get_num_threads()
    _native.assign_clusters(x.numpy(), centroids.numpy(), D.numpy(), I.numpy(), metric, INSTRUCTION_SET, threads)
    return D, I


class ClusterPoints:
    """Rows x [n, d] for k-means. They are packed once: a quarter of their memory as bytes, the whole in float32.

    An iteration goes on from the last one, which makes it faster: most rows stay where they are. What is nearest does
    not depend on it; sums, in float64, do by roundings.
    """

    def __init__(self, x: Tensor, metric: str) -> None:
        self.x = x.contiguous().numpy()
        self.points = _native.ClusterPoints(self.x, metric, INSTRUCTION_SET, torch.get_num_threads())
        self.last: Tensor | None = None  # nearest [n], whose sums are
        self.sums = torch.empty(0)

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """(the nearest centroid of every row, by exact scores, of equal ones the first; their sums [nlist, d])."""
        rows, threads = centroids.contiguous().numpy(), torch.get_num_threads()
        if self.last is None or self.sums.shape != centroids.shape:
            nearest = torch.empty(self.x.shape[0], dtype=torch.int64)
            self.points.assign(rows, nearest.numpy(), threads)
            before, self.sums = None, torch.zeros(centroids.shape, dtype=torch.float64)
        else:
            nearest, before = self.last.clone(), self.last.numpy()
            self.points.reassign(rows, nearest.numpy(), threads)
        _native.add_to_clusters(self.x, before, nearest.numpy(), self.sums.numpy(), INSTRUCTION_SET, threads)
        self.last = nearest
        return nearest, self.sums
