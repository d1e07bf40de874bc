"""Index files that FAISS reads and searches to the neighbours of the graph: the same vectors in the same clusters."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alure.engine.clusters import Clusters, compute_device, lists_of, read_clusters, unit_vectors
from alure.engine.errors import InputError
from alure.engine.graph.base import digest
from alure.engine.graph.engines import import_faiss
from alure.engine.graph.similar import by_country
from alure.engine.store import EmbeddingStore
from alure.engine.store.averages import graph_vectors

INDEX, QUANTIZERS = b"IwFl", (b"IxFI", b"IxFl")  # IndexIVFFlat; IndexFlatIP, IndexFlat
HEADER = struct.Struct("<iqqq?i")  # d, vectors, two unused, is_trained, metric
INNER_PRODUCT = 0


def write_faiss(store: EmbeddingStore, generation: str, out: Path) -> dict[str, int]:
    """Write the embeddings of a published generation into `out`, and return the vectors of each file.

    COUNTRY.faiss: IndexIVFFlat with the centroids, lists and nprobe of the graph `alure`; IndexFlatIP in an IndexIDMap2
    where the country was searched exactly. Ids are rows of user_ids.parquet; vectors have length 1, so that inner
    products are cosines; users of a zero embedding, who have no neighbours, are left out. Without a graph: one flat
    embeddings.faiss.
    """
    matrix = graph_vectors(store, generation)
    graph = store.log.find(generation, "graph", "alure")
    clusters = {}
    if graph is not None:
        clusters = read_clusters(store, graph)
        if digest(clusters) != graph.properties.get("clusters"):
            clusters = {}  # of another build: an exact index serves too
    pq.write_table(pa.table({"user_id": matrix.user_ids, "country": matrix.countries}), out / "user_ids.parquet")
    parts = (
        by_country(matrix.countries, len(matrix.values))[1]
        if graph
        else [("embeddings", np.arange(len(matrix.values)))]
    )
    written = {"user_ids.parquet": len(matrix.values)}
    for country, users in parts:
        rows, vectors = unit_vectors(matrix.values[users])
        name = f"{quote(country, safe=' ')}.faiss"
        index = _index(vectors, users[rows], clusters.get(country))
        import_faiss().write_index(index, str(out / name))
        written[name] = len(vectors)
    return written


def _index(vectors: np.ndarray, ids: np.ndarray, clusters: Clusters | None) -> Any:
    faiss = import_faiss()
    width = vectors.shape[1]
    if clusters is None:
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
        index.add_with_ids(vectors, ids)
        return index
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(clusters.centroids.cpu().numpy())
    index = faiss.IndexIVFFlat(quantizer, width, clusters.nlist, faiss.METRIC_INNER_PRODUCT)
    index.referenced_objects = [quantizer]  # the index holds no reference of its own
    index.is_trained, index.nprobe = True, clusters.nprobe
    order, offsets = lists_of(torch.from_numpy(vectors).to(compute_device()), clusters)
    lists = np.empty(len(vectors), np.int64)  # ours, not FAISS's: a tie of centroids must not move a user
    lists[order.cpu().numpy()] = np.repeat(np.arange(clusters.nlist), np.diff(offsets.cpu().numpy()))
    pointers = [faiss.swig_ptr(np.ascontiguousarray(part)) for part in (vectors, ids, lists)]
    index.add_core(len(vectors), *pointers)
    return index


def read_clusters_of_files(folder: Path, width: int, nprobe: int | None) -> dict[str, Clusters]:
    """The centroids in the files COUNTRY.faiss of a folder, by country: what `write_faiss` wrote, or other indexes.

    Only IndexIVFFlat over a flat quantizer, both by inner product, is read, and of it only the centroids, here and not
    by FAISS, whose reader is not made for files of strangers: InputError for any other, for a width that is not that
    of the embeddings, and for a file that says more than it holds. nprobe None: all of them, until it is measured.
    """
    if not folder.is_dir():
        raise InputError(f"clusters: expected a folder of index files COUNTRY.faiss, got {folder}")
    files = {unquote(path.stem): path for path in sorted(folder.glob("*.faiss"))}
    if not files:
        raise InputError(f"clusters: {folder} holds no file COUNTRY.faiss; `alure export --to faiss` writes them")
    found = {}
    for country, path in files.items():
        centroids = torch.from_numpy(_centroids(path, width)).to(compute_device())
        found[country] = Clusters(centroids, min(nprobe or len(centroids), len(centroids)))
    return found


def _centroids(path: Path, width: int) -> np.ndarray:
    """float32 [nlist, width]. The file: header, nlist, nprobe, the quantizer's header, number of floats, floats, …"""
    with path.open("rb") as file:

        def refuse(expected: str, got: object) -> InputError:
            return InputError(f"clusters: {path}: expected {expected}, got {got}; refused")

        def read(size: int) -> bytes:
            data = file.read(size)
            if len(data) < size:
                raise refuse("a whole index file", "one that ends early")
            return data

        def header(kinds: Sequence[bytes], name: str) -> int:
            kind = read(4)
            if kind not in kinds:
                raise refuse(name, repr(kind.decode("latin-1")))
            d, vectors, _, _, trained, metric = HEADER.unpack(read(HEADER.size))
            if d != width or not trained or metric != INNER_PRODUCT:
                state = f"width {d}, {'' if trained else 'not '}trained, metric {metric}"
                raise refuse(f"{name} of width {width}, trained, of inner products (metric 0)", state)
            return vectors

        header([INDEX], "an IndexIVFFlat (IwFl)")
        nlist, _ = struct.unpack("<QQ", read(16))
        stored = header(QUANTIZERS, "a flat quantizer (IxFI)")
        (floats,) = struct.unpack("<Q", read(8))
        if not 1 <= nlist == stored or floats != nlist * width:
            raise refuse(f"a centroid of {width} floats a list", f"{nlist} lists, {stored} centroids, {floats} floats")
        if floats * 4 > path.stat().st_size - file.tell():  # before anything of that size is made
            raise refuse(f"{floats} floats", "a file that ends early")
        centroids = np.frombuffer(read(floats * 4), "<f4").reshape(nlist, width).copy()
    if not np.isfinite(centroids).all():
        raise refuse("finite centroids", "NaN or infinity")
    return centroids
