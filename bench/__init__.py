"""Benchmarks beside the peers, in the same run."""
