#!/bin/sh
# Table 1: NE of an ads ranker with and without the embeddings, on the synthetic ads world.
exec python -m alure.bench.quality table1 "$@"
