"""`alure quantize encode`: items with content vectors in, the same with `semantic_ids` out. Out of core, atomic."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alure.engine.errors import AlureError, InputError
from alure.engine.files import publish
from alure.engine.progress import track
from alure.engine.semantics.codebooks import load_quantizer
from alure.engine.semantics.figures import distinctness, fingerprints, perplexities
from alure.engine.semantics.quantizer import Quantizer
from alure.engine.semantics.vectors import Rows, VectorColumn, to_matrix

SEMANTIC_IDS = "semantic_ids"
CODES = pa.list_(pa.int32())
MADE_BY = b"alure.codebooks"  # in the file's metadata: the SHA-256 of the codebooks; codes of two do not compare


@dataclass
class EncodingReport:
    """What an encoding wrote."""

    out: str
    codebooks: str
    levels: int
    codebook: int
    rows: Rows
    replaced: bool  # the items had semantic_ids already
    perplexity: list[float] = field(default_factory=list)  # a level
    unique_share: float = 0.0
    collision_rate: float = 0.0
    seconds: float = 0.0


def encode_items(
    codebooks: Path, items: Path, out: Path, *, column: str = "dense", device: torch.device | str | None = None
) -> EncodingReport:
    """Write the table `items` (Parquet, a folder of it, or Delta) to the Parquet file `out` with its semantic ids.

    Every row and every other column is kept. Items without a usable vector get null. `out` appears whole or not at all;
    it may be `items` itself. InputError where the codebooks are damaged, or the vectors are not of their width.
    """
    started = time.monotonic()
    quantizer, digest = load_quantizer(codebooks)
    quantizer.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_file(out, items)
    source = VectorColumn(items, column)
    width, usual = quantizer.shape.width, source.usual_width()
    if usual != width:
        raise InputError(
            f"{source.what}: expected vectors of {width:,} values as the codebooks {codebooks} were made from, got "
            f"{usual:,}; name another column with --dense, or train codebooks on these items"
        )
    schema = coded_schema(source.data.schema, digest)
    report = EncodingReport(
        str(out), str(codebooks), quantizer.shape.levels, quantizer.shape.codebook, Rows(),
        replaced=SEMANTIC_IDS in source.data.schema.names,
    )  # fmt: skip
    all_codes, prints = [np.empty((0, report.levels), np.int32)], [np.empty(0, np.uint64)]
    with whole_file(out) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        with track("Encoding items", source.count_rows(), "items") as bar:
            for batch in source.batches():
                vectors, where, found = to_matrix(batch.column(column), width)
                report.rows.add(found)
                codes = codes_of(quantizer, vectors)
                writer.write_batch(with_codes(batch, codes, where, schema))
                all_codes.append(codes)
                prints.append(fingerprints(vectors))
                bar.advance(len(batch))
        report.rows.check(source.what, width)
    codes = np.concatenate(all_codes)
    report.perplexity = perplexities(codes, report.codebook)
    told_apart = distinctness(codes, np.concatenate(prints))
    report.unique_share, report.collision_rate = told_apart["unique_share"], told_apart["collision_rate"]
    report.seconds = time.monotonic() - started
    return report


def check_file(out: Path, items: Path) -> None:
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; expected the name of a Parquet file to write")
    if items.is_dir() and out.resolve().is_relative_to(items.resolve()):
        raise InputError(f"out: {out} is inside {items}, whose files are all read; name a file elsewhere")


@torch.no_grad()
def codes_of(quantizer: Quantizer, vectors: np.ndarray) -> np.ndarray:
    """int32 [n, levels]."""
    return quantizer.codes(torch.from_numpy(vectors).to(quantizer.mean.device)).cpu().numpy().astype(np.int32)


def coded_schema(schema: pa.Schema, digest: str) -> pa.Schema:
    """`schema` with semantic_ids in place of what it had under that name, or at the end."""
    coded = pa.field(SEMANTIC_IDS, CODES)
    at = schema.get_field_index(SEMANTIC_IDS)
    schema = schema.append(coded) if at < 0 else schema.set(at, coded)
    return schema.with_metadata({**(schema.metadata or {}), MADE_BY: digest.encode()})


def with_codes(batch: pa.RecordBatch, codes: np.ndarray, where: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    """`batch` in `schema`: row where[i] gets codes[i], the others null."""
    has = np.zeros(len(batch), bool)
    has[where] = True
    offsets = np.zeros(len(batch) + 1, np.int32)
    np.cumsum(has * codes.shape[1], out=offsets[1:])
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.ravel(), pa.int32()), mask=pa.array(~has))
    columns = [lists if name == SEMANTIC_IDS else batch.column(name) for name in schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


@contextmanager
def whole_file(path: Path) -> Iterator[pa.NativeFile]:
    """A file to write that takes the place of `path` at the end; what a killed writer left is overwritten."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"out: {path} cannot be written: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system when this process ends
        except BlockingIOError:
            raise AlureError(f"out: another process is writing {path}; wait for it, or end it") from None
        if not temporary.exists() or not os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
            raise AlureError(f"out: another process has just written {path}; run the command again")
        published = False
        try:
            file.truncate()
            yield pa.PythonFile(file, mode="w")
            file.flush()
            publish(temporary, path)
            published = True
        finally:
            if not published:
                temporary.unlink()
