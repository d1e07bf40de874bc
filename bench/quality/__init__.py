"""How good the embeddings are, on data people know: `python -m alure.bench.quality EXPERIMENT --data DIR`.

Every run is a row of results/quality/EXPERIMENT.jsonl; `python -m alure.bench.quality page` writes docs/quality.md from
the rows. A run whose row is there is not done again.
"""
