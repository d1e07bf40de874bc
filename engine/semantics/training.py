"""`alure quantize train`: a sample of the items' vectors in, codebooks and what they are worth out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alure.engine.config import SemanticsConfig
from alure.engine.errors import InputError
from alure.engine.progress import say
from alure.engine.semantics.codebooks import check_out, save_quantizer
from alure.engine.semantics.figures import distinctness, fingerprints, perplexities
from alure.engine.semantics.quantizer import Quantizer, QuantizerShape
from alure.engine.semantics.rqvae import fit_rqvae
from alure.engine.semantics.vectors import Rows, VectorColumn
from alure.kernels import train_residual_codebooks

ITEMS_A_CODE = 48  # at least, for the default size: a tenth of the items is then enough to judge the codes by
SMALLEST, LARGEST = 8, 256  # default codebooks
BLOCK = 8_192  # vectors encoded at once


@dataclass
class QuantizerReport:
    """What a training did; codebooks.json holds the same."""

    codebooks: str  # the folder
    method: str
    levels: int
    codebook: int
    width: int
    vectors: int  # learned from
    held_out: int
    skipped: Rows
    explained: float = 0.0  # share of the held-out vectors' variance that their codes keep
    perplexity: list[float] = field(default_factory=list)  # a level, of the vectors learned from
    held_out_perplexity: list[float] = field(default_factory=list)
    held_out_use: float = 0.0  # the least used level's perplexity ÷ codebook
    unique_share: float = 0.0  # of all vectors
    collision_rate: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # at the end, of rqvae
    seconds: float = 0.0


def train_quantizer(
    items: Path,
    config: SemanticsConfig,
    out: Path,
    *,
    column: str = "dense",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> QuantizerReport:
    """Learn codebooks from the vectors in `column` of the table `items` and write them to the folder `out`.

    The same seed, input, device and config.threads give the same codebooks. InputError where the table, the column
    or its vectors cannot be used, or are fewer than the codes; AlureError where the loss stops being finite. Nothing is
    written but at the end.
    """
    started = time.monotonic()
    check_out(out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = VectorColumn(items, column)
    width = source.usual_width()
    sample = source.sample(width, config.max_vectors, seed)
    codebook = config.codebook or default_codebook(len(sample.values))
    learned, held_out = split(torch.from_numpy(sample.values), config.holdout_share, seed)
    if len(learned) < codebook:
        raise InputError(
            f"{source.what}: expected at least {codebook:,} vectors to learn from, one a code, got {len(learned):,} "
            f"(and {len(held_out):,} held out); give more items, or a smaller --codebook"
        )
    shape = QuantizerShape(
        method=config.method,
        width=width,
        levels=config.levels,
        codebook=codebook,
        hidden=config.hidden if config.method == "rqvae" else (),
        latent=config.latent if config.method == "rqvae" else width,
    )
    report = QuantizerReport(
        str(out), config.method, config.levels, codebook, width, len(learned), len(held_out), sample.rows
    )
    with reproducible(seed, config.threads):
        quantizer = Quantizer(shape).to(device)
        standardise_as(quantizer, learned)
        if config.method == "rqvae":
            report.losses = fit_rqvae(quantizer, learned, config, seed)
        else:
            fit_kmeans(quantizer, learned, seed)
        measure(quantizer.eval(), learned, held_out, report)
    report.seconds = time.monotonic() - started
    save_quantizer(out, quantizer, asdict(report))
    return report


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """PyTorch's random numbers from `seed` on, and its CPU threads, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def default_codebook(vectors: int) -> int:
    """A power of two: 64 for 4,097 vectors, 256 from 12,288."""
    return min(max(1 << (max(1, vectors // ITEMS_A_CODE).bit_length() - 1), SMALLEST), LARGEST)


def split(x: Tensor, holdout_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(to learn from, held out), both in a random order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(holdout_share * len(x)))
    return x[order[held_out:]], x[order[:held_out]]


def standardise_as(quantizer: Quantizer, x: Tensor) -> None:
    """Centre and scale so that the values of x have variance 1; the scale stays 1 where x has none."""
    mean = x.mean(0, dtype=torch.float64)
    squares = sum(float((block - mean).square().sum()) for block in x.split(BLOCK))
    deviation = (squares / x.numel()) ** 0.5
    quantizer.mean.copy_(mean)
    quantizer.scale.fill_(deviation if deviation > 0 else 1.0)


@torch.no_grad()
def fit_kmeans(quantizer: Quantizer, x: Tensor, seed: int) -> None:
    say(
        f"quantize: residual k-means of {len(x):,} vectors, {quantizer.shape.levels} × {quantizer.shape.codebook} codes"
    )
    latents = quantizer.latents(x.to(quantizer.mean.device))
    trained = train_residual_codebooks(latents, quantizer.shape.levels, quantizer.shape.codebook, seed)
    quantizer.codebooks.copy_(trained.codebooks)


@torch.no_grad()
def measure(quantizer: Quantizer, learned: Tensor, held_out: Tensor, report: QuantizerReport) -> None:
    """Fill in the report's figures."""
    codebook = quantizer.shape.codebook
    codes, held_out_codes = encode(quantizer, learned), encode(quantizer, held_out)
    report.perplexity = perplexities(codes.numpy(), codebook)
    report.held_out_perplexity = perplexities(held_out_codes.numpy(), codebook)
    report.held_out_use = min(report.held_out_perplexity) / codebook
    prints = np.concatenate([fingerprints(learned.numpy()), fingerprints(held_out.numpy())])
    told_apart = distinctness(torch.cat([codes, held_out_codes]).numpy(), prints)
    report.unique_share, report.collision_rate = told_apart["unique_share"], told_apart["collision_rate"]
    mean = quantizer.mean.cpu()
    total = float((held_out - mean).double().square().sum())
    left = 0.0
    for block in held_out.split(BLOCK):
        kept = quantizer.reconstruct(block.to(quantizer.mean.device)).cpu()
        left += float((block - kept).double().square().sum())
    report.explained = 1 - left / total if total else 1.0


def encode(quantizer: Quantizer, x: Tensor) -> Tensor:
    """int32 [n, levels] on the CPU, a block of rows at a time."""
    blocks = [quantizer.codes(block.to(quantizer.mean.device)).to("cpu", torch.int32) for block in x.split(BLOCK)]
    return torch.cat(blocks) if blocks else torch.empty(0, quantizer.shape.levels, dtype=torch.int32)
