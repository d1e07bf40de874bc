"""From content vectors to semantic ids: an encoder (none for residual k-means), then one codebook a level."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from alure.engine.config import Section
from alure.kernels import residual_quantize


class QuantizerShape(Section):
    """What decides the sizes of a quantizer's tensors."""

    method: Literal["rqvae", "kmeans"]
    width: int  # of the content vectors
    levels: int
    codebook: int  # codes a level
    hidden: tuple[int, ...] = ()  # widths between the vectors and the latents
    latent: int  # width that is quantised; that of the vectors for kmeans


class Quantizer(nn.Module):
    """RQ-VAE (Lee et al. 2022; for semantic ids Rajput et al. 2023, TIGER), or residual k-means, which has no network.

    Vectors x [n, width] float32 are centred and divided by one number, so distances keep their proportions.
    """

    mean: Tensor  # [width]
    scale: Tensor  # []

    def __init__(self, shape: QuantizerShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape.width))
        self.register_buffer("scale", torch.ones(()))
        widths = [shape.width, *shape.hidden, shape.latent]
        networked = shape.method == "rqvae"
        self.encoder = perceptron(widths) if networked else nn.Identity()
        self.decoder = perceptron(widths[::-1]) if networked else nn.Identity()
        self.codebooks = nn.Parameter(torch.zeros(shape.levels, shape.codebook, shape.latent), requires_grad=networked)

    def standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def latents(self, x: Tensor) -> Tensor:
        """[n, latent]."""
        return self.encoder(self.standardise(x))

    def codes(self, x: Tensor) -> Tensor:
        """int64 [n, levels], each in 0 … codebook − 1."""
        return residual_quantize(self.latents(x), self.codebooks)[0]

    def reconstruct(self, x: Tensor) -> Tensor:
        """[n, width]: what the codes of x still say of it."""
        latents = self.latents(x)
        _, left = residual_quantize(latents, self.codebooks)
        return self.decoder(latents - left) * self.scale + self.mean


def perceptron(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
