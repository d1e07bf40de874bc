"""Codebooks for residual quantisation: k-means on the residuals, level by level."""

from typing import NamedTuple

import torch
from torch import Tensor

from alure.kernels.quantization.ops import residual_quantize
from alure.kernels.scatter import sum_rows


class ResidualCodebooks(NamedTuple):
    codebooks: Tensor  # [levels, codes, d]
    perplexity: Tensor  # float64 [levels]: how many codes are in effective use, 1 to `codes`


def train_residual_codebooks(
    x: Tensor, levels: int, codes: int, seed: int = 0, *, niter: int = 20, max_points_per_code: int = 256
) -> ResidualCodebooks:
    """Fit codebooks to x [n, d] (finite, float32 or float64) by Lloyd's algorithm on each level's residuals.

    Every level starts from random residuals, distinct rows where there are enough; after each step a code that no
    vector chose is set to a random residual. At most codes · max_points_per_code sampled rows are used. The same seed,
    input and device give the same codebooks.
    """
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: expected shape [n >= 1, d], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}; call .to(torch.float32)")
    for name, value in {"levels": levels, "codes": codes, "max_points_per_code": max_points_per_code}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if niter < 0:
        raise ValueError(f"niter: expected at least 0, got {niter}")
    generator = torch.Generator().manual_seed(seed)
    residual = x.detach()
    if residual.shape[0] > codes * max_points_per_code:
        chosen = torch.randperm(residual.shape[0], generator=generator)[: codes * max_points_per_code]
        residual = residual[chosen.sort().values.to(x.device)]
    books, perplexities = [], []
    for _ in range(levels):
        book = _kmeans(residual, codes, niter, generator)
        chosen, residual = residual_quantize(residual, book[None])
        books.append(book)
        perplexities.append(perplexity(chosen[:, 0], codes))
    return ResidualCodebooks(torch.stack(books), torch.stack(perplexities))


def perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """exp(−Σ p log p) of the codes' shares, float64: how many codes are in effective use."""
    counts = torch.bincount(codes, minlength=num_codes).to(torch.float64)
    share = counts / counts.sum().clamp_min(1)
    return torch.special.entr(share).sum().exp()


def _kmeans(x: Tensor, codes: int, niter: int, generator: torch.Generator) -> Tensor:
    book = x[_random_rows(x.shape[0], codes, generator).to(x.device)].clone()
    for _ in range(niter):
        chosen = residual_quantize(x, book[None])[0][:, 0]
        counts = torch.bincount(chosen, minlength=codes)
        means = sum_rows(x, chosen, codes) / counts.clamp_min(1)[:, None].to(x.dtype)
        replacements = x[_random_rows(x.shape[0], codes, generator).to(x.device)]
        book = torch.where((counts == 0)[:, None], replacements, means)
    return book


def _random_rows(n: int, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count] in 0..n − 1, without repeats where count <= n."""
    repeats = -(-count // n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(repeats)])[:count]
