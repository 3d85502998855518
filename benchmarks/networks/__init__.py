"""Inference of networks: our execution beside plain eager code of the same weights."""
