#!/bin/sh
# Similar users: what they did, as candidates on retail_rocket and the check-ins; give --data DIR.
exec python -m alure.bench.quality similar-users "$@"
