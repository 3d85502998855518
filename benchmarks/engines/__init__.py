"""Engines of networks: ours behind the denoiser protocol, beside each library called directly."""
