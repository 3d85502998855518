"""Speed of patch attention against its peers; ``python -m benchmarks.kernels``."""
