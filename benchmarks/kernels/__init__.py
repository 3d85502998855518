"""Speed of patch attention and other implementations; ``python -m benchmarks.kernels``."""
