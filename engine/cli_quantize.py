"""`alure quantize`: codebooks of semantic ids, and items encoded by them."""

from pathlib import Path
from typing import Annotated

import typer

from alure.engine.config import SemanticsConfig
from alure.engine.errors import InputError
from alure.engine.options import Commands, Json, Out, Seed, finish, override

quantize = Commands(
    name="quantize",
    help="Semantic ids: learn codebooks from the items' content vectors, then encode items by them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Items = Annotated[Path, typer.Argument(help="Items with content vectors: Parquet, a folder of it, or Delta.")]
Dense = Annotated[str, typer.Option("--dense", help="The column of the vectors: lists of floats of one length.")]


@quantize.command()
def train(
    items: Items,
    out: Out,
    method: Annotated[str | None, typer.Option(help="rqvae, or kmeans: residual k-means without a network.")] = None,
    levels: Annotated[int | None, typer.Option(help="Codes an item gets (3).")] = None,
    codebook: Annotated[
        int | None, typer.Option(help="Codes of a level (by the number of items: a power of two from 8 to 256).")
    ] = None,
    latent: Annotated[int | None, typer.Option(help="rqvae: width of what is quantised (32).")] = None,
    hidden: Annotated[str | None, typer.Option(help="rqvae: widths of the encoder's layers (256,128).")] = None,
    beta: Annotated[float | None, typer.Option(help="rqvae: weight of the commitment loss (0.25).")] = None,
    steps: Annotated[int | None, typer.Option(help="rqvae: training steps (1000).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="rqvae: at its highest (0.003).")] = None,
    max_vectors: Annotated[int | None, typer.Option(help="Vectors to draw from a larger table (200000).")] = None,
    dense: Dense = "dense",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learn codebooks. A tenth of the vectors is held out; the report says how evenly their codes are used.

    perplexity: codes of a level in effective use, at most the codebook. explained: share of the held-out vectors'
    variance that the codes keep. collision_rate: share of different vectors that share all their codes with another.

    Example: `alure quantize train items.parquet --out codebooks --levels 3 --codebook 256`
    """
    from alure.engine.semantics import train_quantizer

    config = override(
        SemanticsConfig(),
        method=method,
        levels=levels,
        codebook=codebook,
        latent=latent,
        hidden=None if hidden is None else parse_widths(hidden),
        beta=beta,
        steps=steps,
        learning_rate=learning_rate,
        max_vectors=max_vectors,
    )
    finish(train_quantizer(items, config, out, column=dense, seed=seed), as_json)


@quantize.command()
def encode(
    codebooks: Annotated[Path, typer.Argument(help="What `alure quantize train` wrote.")],
    items: Items,
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to write; it may be ITEMS itself.")],
    dense: Dense = "dense",
    as_json: Json = False,
) -> None:
    """Write the items with a column `semantic_ids`, ready for `alure ingest --items`; other columns stay as they are.

    Example: `alure quantize encode codebooks items.parquet --out items_with_codes.parquet`
    """
    from alure.engine.semantics import encode_items

    finish(encode_items(codebooks, items, out, column=dense), as_json)


def parse_widths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise InputError(f"--hidden: expected widths such as 256,128, got {text!r}")
    return [int(part) for part in parts]
