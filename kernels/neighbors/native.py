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


def cluster_sums(x: Tensor, errors: Tensor, nearest: Tensor, nlist: int) -> tuple[Tensor, Tensor]:
    """Sums [nlist, d] of the rows x [n, d] of each cluster, and of their errors [nlist]; float64, in order."""
    sums = torch.empty((nlist, x.shape[1]), dtype=torch.float64)
    totals = torch.empty(nlist, dtype=torch.float64)
    rows, row_errors, clusters = (array.contiguous().numpy() for array in (x, errors, nearest))
    threads = torch.get_num_threads()
    if not _native.cluster_sums(rows, row_errors, clusters, sums.numpy(), totals.numpy(), INSTRUCTION_SET, threads):
        raise ValueError(f"nearest: expected clusters 0 … {nlist - 1}")
    return sums, totals
