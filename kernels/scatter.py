"""Sums of rows by index, the same bits every time."""

import torch
from torch import Tensor


def sum_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """[num_rows, d]: row i is the sum of the rows of x [n, d] whose `index` (int64 [n], in 0..num_rows − 1) is i.

    The gradient of an embedding, which sorts on CUDA and walks in order on a CPU: deterministic, unlike index_add_.
    """
    if num_rows == 0 or x.shape[0] == 0:
        return x.new_zeros(num_rows, x.shape[1])
    return torch.ops.aten.embedding_dense_backward(x, index, num_rows, -1, False)
