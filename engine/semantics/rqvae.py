"""Training of an RQ-VAE: reconstruction, codebook and commitment losses, straight-through gradients, no rare codes.

‖x − decoder(z + sg(q − z))‖² + Σ_level ‖sg(r) − e‖² + β ‖r − sg(e)‖², with z = encoder(x), r what the levels before
have left of z, e the nearest code to r, q the sum of the codes, and sg without gradient (van den Oord et al. 2017; Lee
et al. 2022). The encoder first learns without codes; then each level starts by k-means.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from alure.engine.config import SemanticsConfig
from alure.engine.errors import AlureError
from alure.engine.progress import track
from alure.engine.semantics.quantizer import Quantizer
from alure.kernels import residual_quantize, train_residual_codebooks
from alure.kernels.quantization import split_most_used

PLAIN = 0.25  # share of the steps without codes: 67 % of the variance of held-out news vectors kept, 62 % without them
RESEATS = 20  # times that rare codes are moved. Perplexity ÷ 64 codes of held-out news vectors: .86 .88 .90, without
# them .83 .87 .93; where the codes start with the first step, on latents that still spread: .85 .90 .89 and .36 .45 .59
SETTLING = 0.75  # share of the steps after which no code is moved
SAMPLE = 64  # vectors a code that a move looks at
WARM_UP = 0.05
CLIP = 50.0  # norm of the gradient; the losses are sums over a vector


class Losses(NamedTuple):
    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor


def fit_rqvae(quantizer: Quantizer, x: Tensor, config: SemanticsConfig, seed: int) -> dict[str, float]:
    """Train on x [n, width]; returns the last step's losses, sums over a vector, means over the batch.

    Raises AlureError where the loss stops being finite.
    """
    device, generator = quantizer.mean.device, torch.Generator().manual_seed(seed)
    steps = config.steps
    plain = int(PLAIN * steps)
    reseat_every = max(1, round((SETTLING * steps - plain) / RESEATS))
    optimizer = torch.optim.AdamW(quantizer.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    losses = Losses(*torch.zeros(3))
    with track("Training codebooks", steps, "steps") as bar:
        for step in range(steps):
            if step == plain:
                start_codebooks(quantizer, x, generator)
            elif step > plain and (step - plain) % reseat_every == 0 and step < SETTLING * steps:
                reseat(quantizer, drawn(x, SAMPLE * quantizer.shape.codebook, generator).to(device), generator)
            batch = drawn(x, config.batch_size, generator).to(device)
            losses = plain_losses(quantizer, batch) if step < plain else compute_losses(quantizer, batch)
            total = losses.reconstruction + losses.codebook + config.beta * losses.commitment
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(quantizer.parameters(), CLIP)
            if not math.isfinite(float(total.detach() + norm)):
                raise AlureError(
                    f"quantize: the loss or its gradient stopped being finite at step {step + 1} of {steps}; nothing "
                    f"was written; try a --learning-rate below {config.learning_rate:g}"
                )
            optimizer.step()
            rate.step()
            bar.advance(note=f"loss {float(total.detach()):.3f}")
    return {name: float(loss.detach()) for name, loss in losses._asdict().items()}


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a short linear rise, then half a cosine."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def plain_losses(quantizer: Quantizer, x: Tensor) -> Losses:
    """Of the autoencoder without codes."""
    x = quantizer.standardise(x)
    none = x.new_zeros(())
    return Losses((x - quantizer.decoder(quantizer.encoder(x))).square().sum(1).mean(), none, none)


def compute_losses(quantizer: Quantizer, x: Tensor) -> Losses:
    x = quantizer.standardise(x)
    latents = quantizer.encoder(x)
    residual, quantised = latents, torch.zeros_like(latents)
    codebook = commitment = x.new_zeros(())
    for level in range(quantizer.shape.levels):
        _, gap = residual_quantize(residual.detach(), quantizer.codebooks[level : level + 1])  # r − e
        code = (residual - gap).detach()
        codebook = codebook + gap.square().sum(1).mean()
        commitment = commitment + (residual - code).square().sum(1).mean()
        residual, quantised = residual - code, quantised + code
    straight_through = latents + (quantised - latents).detach()
    return Losses((x - quantizer.decoder(straight_through)).square().sum(1).mean(), codebook, commitment)


@torch.no_grad()
def start_codebooks(quantizer: Quantizer, x: Tensor, generator: torch.Generator) -> None:
    """k-means of the latents, level by level."""
    shape = quantizer.shape
    latents = quantizer.latents(drawn(x, 256 * shape.codebook, generator).to(quantizer.mean.device))
    seed = int(torch.randint(1 << 31, (), generator=generator))
    quantizer.codebooks.copy_(train_residual_codebooks(latents, shape.levels, shape.codebook, seed).codebooks)


@torch.no_grad()
def reseat(quantizer: Quantizer, x: Tensor, generator: torch.Generator) -> None:
    """Move the codes that few of x [n, width] choose beside those that many choose, in every level."""
    residual = quantizer.latents(x)
    for level in range(quantizer.shape.levels):
        book = quantizer.codebooks[level]
        chosen, left = residual_quantize(residual, book[None])
        quantizer.codebooks[level] = split_most_used(book, residual, chosen[:, 0], generator)
        residual = left


def drawn(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows of x, each drawn evenly; all of x where it has no more."""
    return x if len(x) <= count else x[torch.randint(len(x), (count,), generator=generator)]
