"""Benchmarks beside the peers, in the same run: `alure bench SUITE`, or `python -m alure.bench SUITE`.

A suite is a module of this folder whose functions `bench_*` run under pytest-benchmark. Each case checks its result
against the reference before it is timed, so a fast wrong answer is never reported.
"""

SUITES = ("attention", "encoding", "compression", "neighbors", "online", "pagerank", "refresh", "retrieval")
