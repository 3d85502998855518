"""Measurements run by hand; dated records go to ``results/``."""
