"""Cost of posterior moments in multiples of a plain denoise."""
