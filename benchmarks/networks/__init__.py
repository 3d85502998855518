"""Inference of networks: the service's execution and plain eager code with the same weights."""
