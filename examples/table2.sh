#!/bin/sh
# Table 2: recall of BFF + PPR against BFF + PPR + ALURE at equal budgets, on the synthetic ads world.
exec python -m alure.bench.quality table2 "$@"
