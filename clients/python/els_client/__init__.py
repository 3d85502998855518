"""Python client of els-denoise."""
