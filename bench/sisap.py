"""The all-kNN task of the SISAP challenge: an HDF5 file of vectors in, the k nearest others of every one out.

    python -m alure.bench.sisap make vectors.h5 --rows 200000 --dims 384
    python -m alure.bench.sisap run vectors.h5 --out knns.h5 --memory-gib 16

In: dataset `train` [n, d], and `allknn/knns` where the truth is known. Out: `knns` int32 [n, k] counted from 1, without
self, `dists` (1 − cosine), and the attributes algo, task, buildtime, querytime, params. Recall is of a sample, without
self. Not a suite of `alure bench`: its time is end to end, reading and writing included.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alure.kernels import assign_clusters, grouped_topk, train_kmeans

K, TASK = 15, "task2"
BLOCK = 1 << 16  # rows read, searched and written at once
SAMPLE = 1000  # rows whose neighbours are compared with the truth
NPROBE = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m alure.bench.sisap", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="vectors of the shape of text embeddings")
    make.add_argument("file", type=Path)
    make.add_argument("--rows", type=int, default=200_000)
    make.add_argument("--dims", type=int, default=384)
    run = commands.add_parser("run", help="find everybody's neighbours")
    run.add_argument("file", type=Path)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument(
        "--nlist", type=int, help="clusters (default: as many as make assignment and search cost the same)"
    )
    run.add_argument("--nprobe", type=int, default=NPROBE, help=f"clusters searched ({NPROBE})")
    run.add_argument("--memory-gib", type=float, help="allocations beyond this fail")
    options = parser.parse_args()
    try:
        import h5py  # noqa: F401
    except ModuleNotFoundError:
        print("sisap: needs the package h5py; pip install h5py", file=sys.stderr)
        return 2
    if options.command == "make":
        make_vectors(options.file, options.rows, options.dims)
    else:
        print(json.dumps(all_knn(options.file, options.out, options.nlist, options.nprobe, options.memory_gib)))
    return 0


def make_vectors(path: Path, rows: int, dims: int, seed: int = 0) -> None:
    """Unit vectors around centres whose sizes follow a power law, within each on a subspace of 24 dimensions."""
    import h5py

    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(rows // 1000, 1), dims), dtype=np.float32)
    planes = rng.standard_normal((16, min(24, dims), dims), dtype=np.float32) / np.float32(24**0.5)
    with h5py.File(path, "w") as file:
        train = file.create_dataset("train", (rows, dims), np.float16)
        for block in blocks(rows):
            own = (len(centres) * rng.random(block.stop - block.start) ** 2).astype(np.int64)
            x = centres[own]
            for plane in range(len(planes)):
                members = np.flatnonzero(own % len(planes) == plane)
                x[members] += rng.standard_normal((len(members), planes.shape[1]), dtype=np.float32) @ planes[plane]
            train[block] = x / np.linalg.norm(x, axis=1, keepdims=True)


def all_knn(path: Path, out: Path, nlist: int | None, nprobe: int, memory_gib: float | None) -> dict[str, Any]:
    """Write `out`, and return times in seconds, recall and the peak of the resident set."""
    import h5py

    if memory_gib is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * 2**30),) * 2)
    clock = [time.perf_counter()]
    with h5py.File(path) as file:
        x = torch.empty(file["train"].shape, dtype=torch.float32)
        for block in blocks(len(x)):
            part = torch.from_numpy(file["train"][block].astype(np.float32))
            x[block] = part / part.norm(dim=1, keepdim=True).clamp(min=1e-12)
    clock.append(time.perf_counter())
    nlist = nlist or max(1, min(len(x), round((len(x) * nprobe) ** 0.5)))
    nprobe = min(nprobe, nlist)
    centroids = train_kmeans(x, nlist, max_points_per_centroid=64)
    nearest = torch.cat([assign_clusters(x[block], centroids, 1)[1].squeeze(1) for block in blocks(len(x))])
    sizes = torch.bincount(nearest, minlength=nlist)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    order = nearest.argsort(stable=True)
    x = x[order]  # by cluster: neighbours in the file are neighbours in memory too
    clock.append(time.perf_counter())
    params = f"nlist={nlist}, nprobe={nprobe}"
    found = np.empty((len(x), K), np.int32)
    distances = np.empty((len(x), K), np.float32)
    for block in blocks(len(x)):
        queries = x[block]
        _, probes = assign_clusters(queries, centroids, nprobe)
        D, I = grouped_topk(queries, x, offsets, probes, K, exclude=torch.arange(block.start, block.stop))
        rows = order[block].numpy()
        found[rows] = torch.where(I >= 0, order[I.clamp(min=0)] + 1, 0).numpy()
        distances[rows] = 1.0 - D.numpy()
    clock.append(time.perf_counter())
    with h5py.File(out, "w") as file:
        file["knns"], file["dists"] = found, distances
        file.attrs.update(
            algo="alure", task=TASK, params=params, buildtime=clock[2] - clock[1], querytime=clock[3] - clock[2]
        )
    clock.append(time.perf_counter())
    seconds = dict(zip(("read", "clusters", "search", "write"), np.diff(clock).round(2).tolist()))
    return {
        "rows": len(x), "dims": x.shape[1], "k": K, "params": params, "seconds": seconds,
        "total_seconds": round(clock[-1] - clock[0], 2), "recall": recall(path, found, x, order),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), "memory_gib": memory_gib,
    }  # fmt: skip


def recall(path: Path, found: np.ndarray, x: torch.Tensor, order: torch.Tensor) -> float:
    """Share of the true neighbours among `found` of a sample: of the file's truth, else of an exact search; no self."""
    import h5py

    sample = np.sort(np.random.default_rng(0).choice(len(x), min(SAMPLE, len(x)), replace=False))
    with h5py.File(path) as file:
        if "allknn/knns" in file:
            truth = file["allknn/knns"][sample]
        else:
            place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[torch.from_numpy(sample)]
            every = torch.zeros((len(place), 1), dtype=torch.int64)
            _, I = grouped_topk(x[place], x, torch.tensor([0, len(x)]), every, K, exclude=place)
            truth = torch.where(I >= 0, order[I.clamp(min=0)] + 1, 0).numpy()
    hits = total = 0
    for row, wanted, got in zip(sample, truth, found[sample]):
        others = [i for i in wanted.tolist() if i not in (0, row + 1)][:K]
        hits, total = hits + len(np.intersect1d(others, got)), total + len(others)
    return round(hits / max(total, 1), 4)


def blocks(rows: int) -> Iterator[slice]:
    for first in range(0, rows, BLOCK):
        yield slice(first, min(first + BLOCK, rows))


if __name__ == "__main__":
    sys.exit(main())
