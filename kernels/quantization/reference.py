"""Residual quantisation in eager PyTorch: the oracle of the kernel."""

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 22  # rows × codes scored at once: 16 MB of float32


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int64 [n, levels], residual [n, d]); see `alure.kernels.quantization.ops.residual_quantize`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    residual, books = x.to(compute, copy=True), codebooks.to(compute)
    codes = torch.zeros(x.shape[0], books.shape[0], dtype=torch.int64, device=x.device)
    for level, book in enumerate(books):
        minus_half_norms = book.square().sum(1) / -2
        step = max(1, BLOCK_SCORES // book.shape[0])
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            # ‖r − c‖² is smallest where r·c − ‖c‖²/2 is largest
            codes[rows, level] = torch.addmm(minus_half_norms, residual[rows], book.T).max(1).indices
        residual -= book[codes[:, level]]
    return codes, residual.to(x.dtype)
