"""Denoisers as a plain library: noise levels, machines, closed forms, samplers, banks. No gRPC."""
