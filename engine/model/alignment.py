"""Orthogonal Procrustes: the space of one model turned onto that of another. No cosine moves.

The k embeddings of a user lie in k spaces of their own, as every product of users, or of a user and an ad, is slot by
slot. So each slot has its own orthogonal matrix (a reflection is as good as a rotation).
"""

import torch
from torch import Tensor


def procrustes(new: Tensor, old: Tensor) -> Tensor:
    """Orthogonal R, float64 [k, d, d]: new[:, s] @ R[s] is as close to old[:, s] as any orthogonal matrix brings it.

    new, old: [n, k, d] of the same n users. Least squares, hence for unit vectors the largest mean cosine: R = U Vᵀ of
    the SVD of newᵀ·old (Schönemann 1966, Psychometrika 31). Directions that no user has are turned arbitrarily.
    Raises ValueError on other shapes and on values that are not finite.
    """
    if new.dim() != 3 or new.shape != old.shape or not new.shape[0]:
        raise ValueError(f"expected two equal shapes [n, k, d] with n > 0, got {list(new.shape)} and {list(old.shape)}")
    products = torch.einsum("nki,nkj->kij", new.double(), old.double())
    if not products.isfinite().all():
        raise ValueError("expected finite embeddings, got NaN or infinity")
    u, _, vt = torch.linalg.svd(products)
    return u @ vt


def turn(embeddings: Tensor, rotations: Tensor | None) -> Tensor:
    """Each slot of embeddings [B, k, d] by its matrix of rotations [k, d, d], in the wider of their types."""
    if rotations is None:
        return embeddings
    wide = torch.promote_types(embeddings.dtype, rotations.dtype)
    return torch.einsum("bki,kij->bkj", embeddings.to(wide), rotations.to(wide))
