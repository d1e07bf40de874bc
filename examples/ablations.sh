#!/bin/sh
# Each part of the model left out: on the synthetic ads world, and with --data DIR the time bias on real sets.
exec python -m alure.bench.quality ablations "$@"
