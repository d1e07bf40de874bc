#!/bin/sh
# Recall against the age of the embeddings, on the synthetic ads world.
exec python -m alure.bench.quality freshness "$@"
