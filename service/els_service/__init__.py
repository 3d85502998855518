"""The els-denoise service; import the sub-packages by name."""
