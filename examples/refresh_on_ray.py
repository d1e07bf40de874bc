"""The nightly refresh as a step of a Ray job: two actors share it, then Ray Data has what was published.

    python examples/refresh_on_ray.py MODEL EVENTS STORE

On a cluster the three paths are on a disk that every machine sees.
"""

import sys
from collections import Counter

import ray

from alure.engine import EmbeddingStore, RefreshJob


def main(model: str, events: str, store: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    report = RefreshJob(model, events, store, workers=2, engine="ray").run()
    embeddings = ray.data.from_arrow(EmbeddingStore(store).read_embeddings(report.generation))
    countries = Counter(row["country"] for row in embeddings.iter_rows())
    print(f"{report.generation}: {embeddings.count()} users, by country {dict(countries)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
