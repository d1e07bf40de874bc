"""Index files that FAISS reads and searches to the neighbours of the graph: the same vectors in the same clusters."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from alure.engine.graph.base import digest, read_clusters
from alure.engine.graph.engines import Clusters, compute_device, import_faiss, lists_of
from alure.engine.graph.similar import by_country, unit_vectors
from alure.engine.store import EmbeddingStore


def write_faiss(store: EmbeddingStore, generation: str, out: Path) -> dict[str, int]:
    """Write the embeddings of a published generation into `out`, and return the vectors of each file.

    COUNTRY.faiss: IndexIVFFlat with the centroids, lists and nprobe of the graph `alure`; IndexFlatIP in an IndexIDMap2
    where the country was searched exactly. Ids are rows of user_ids.parquet; vectors have length 1, so that inner
    products are cosines; users of a zero embedding, who have no neighbours, are left out. Without a graph: one flat
    embeddings.faiss.
    """
    matrix = store.read_matrix(generation)
    graph = store.log.find(generation, "graph", "alure")
    clusters = {}
    if graph is not None:
        clusters = read_clusters(store, graph, graph.properties["nprobe"])
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
