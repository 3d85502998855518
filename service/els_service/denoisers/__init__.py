"""Denoisers as a library without gRPC: noise levels, machines, closed forms, samplers, banks."""
