"""Speed and error of patch attention with a fold against its matmul form."""
