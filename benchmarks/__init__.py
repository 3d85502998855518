"""Benchmarks run by hand; dated records are written to ``results/``."""
