"""A generation written for other tools: FAISS index files, Parquet, Lance, NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alure.engine.errors import InputError
from alure.engine.events.replacing import building, publish, recover
from alure.engine.files import write_json
from alure.engine.graph.faiss_files import write_faiss
from alure.engine.store import EmbeddingStore

FORMATS = ("faiss", "parquet", "lance", "npy")
DESCRIPTION = "export.json"  # of what and to what; by it an export is known


def export_store(
    store_path: str | Path, to: str, out: Path, *, flat: bool = False, generation: str | None = None
) -> dict[str, Any]:
    """Write the tables of one published generation (default: the newest) of a store as the folder `out`.

    An earlier export to the same format is replaced as a whole at the end, so that no file of it stays beside newer
    ones; any other folder that is not empty is refused with InputError.

    parquet, lance: every table; with `flat` one row an edge or a candidate. npy: the embeddings. faiss: an index of
    them a country, in the graph's clusters. Beside both `user_ids.parquet`, whose row i is the user of vector i.
    """
    if to not in FORMATS:
        raise InputError(f"--to: expected one of {', '.join(FORMATS)}; got {to!r}")
    if flat and to in ("faiss", "npy"):
        raise InputError(f"--flat: is for graphs and candidates, which --to {to} does not write; use --to parquet")
    store = EmbeddingStore(store_path)
    chosen = generation or store.latest("embeddings").generation
    recover(out)
    check_replaceable(out, to)
    with building(out) as folder:
        if to in ("parquet", "lance"):
            written = export_tables(store, chosen, folder, to, flat)
        elif to == "faiss":
            written = write_faiss(store, chosen, folder)
        else:
            written = export_vectors(store, chosen, folder)
        write_json(folder / DESCRIPTION, {"generation": chosen, "format": to, "files": written})
        publish(folder, out)
    return {"generation": chosen, "format": to, "out": str(out), "files": written}


def check_replaceable(out: Path, to: str) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; expected a folder to make, or an earlier export to replace")
    if not out.is_dir() or not any(out.iterdir()):
        return
    path = out / DESCRIPTION
    try:
        found = json.loads(path.read_text())["format"] if path.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        found = None
    if found != to:
        held = f"is an export to {found}" if found else f"is not empty and no export ({DESCRIPTION})"
        raise InputError(f"out: {out} {held}, so it is not replaced; name another folder")


def export_tables(store: EmbeddingStore, generation: str, out: Path, to: str, flat: bool) -> dict[str, int]:
    tables = {"embeddings": store.read_embeddings(generation)}
    for kind, read in (("graph", store.read_graph), ("candidates", store.read_candidates)):
        for published in store.generations(kind):
            if published.generation == generation:
                table = read(generation, published.name)
                tables[f"{kind}-{published.name}"] = explode(table) if flat else table
    for name, table in tables.items():
        write_table(table, out / f"{name}.{to}", to)
    return {name: table.num_rows for name, table in tables.items()}


def explode(table: pa.Table) -> pa.Table:
    """One row a list element: list columns are flattened together, the others repeated; `rank` counts from 1."""
    lists = [field.name for field in table.schema if pa.types.is_list(field.type) or pa.types.is_large_list(field.type)]
    table = table.combine_chunks()
    rows = pc.list_parent_indices(table[lists[0]].combine_chunks()).cast(pa.int64())
    lengths = pc.list_value_length(table[lists[0]]).fill_null(0).to_numpy().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    columns = {name: table[name].take(rows) for name in table.column_names if name not in lists}
    columns["rank"] = pa.array(np.arange(len(rows)) - np.repeat(starts, lengths) + 1)
    for name in lists:
        columns[name] = pc.list_flatten(table[name])
    return pa.table(columns)


def write_table(table: pa.Table, path: Path, to: str) -> None:
    if to == "parquet":
        pq.write_table(table, path, compression="zstd")
        return
    try:
        import lance
    except ModuleNotFoundError:
        raise InputError("--to lance: needs the package pylance; install it (pip install pylance)") from None
    lance.write_dataset(table, str(path), mode="overwrite")


def export_vectors(store: EmbeddingStore, generation: str, out: Path) -> dict[str, int]:
    matrix = store.read_matrix(generation)
    pq.write_table(pa.table({"user_id": matrix.user_ids, "country": matrix.countries}), out / "user_ids.parquet")
    np.save(out / "embeddings.npy", matrix.values, allow_pickle=False)
    return {"embeddings.npy": len(matrix.values), "user_ids.parquet": len(matrix.values)}
