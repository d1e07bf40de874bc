#!/bin/sh
# Scaling: recall and NE against the FLOPs of embedding a user, over length, width and depth.
exec python -m alure.bench.quality scaling "$@"
