"""Benchmark of originality: what is copied, by which model, and what a report costs."""
