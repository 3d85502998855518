"""Latent decoders as denoisers: decoding is queued, has a deadline and a watchdog."""

from __future__ import annotations

import math

from els_service.denoisers.base import Denoised, DenoiserInfo, LatentDecoder, Query

_LAUNCH_S, _PIXEL_S = 1e-3, 5e-6
"""A first guess, about a CPU's; the clock corrects it."""


class DecoderAsDenoiser:
    """A denoiser whose answer to latents is the images that they decode to.

    Args:
        denoiser: whose decoder it is.
    """

    def __init__(self, denoiser: LatentDecoder) -> None:
        self._denoiser = denoiser

    @property
    def info(self) -> DenoiserInfo:
        """What the denoiser of the latents is."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Return: latents come from a trajectory, which was checked."""

    def predict_seconds(self, query: Query) -> float:
        """Return a guess from the number of pixels that come out."""
        pixels = math.prod(self.info.decoded_shape or ())
        return len(query) * (_LAUNCH_S + _PIXEL_S * pixels)

    def denoise(self, query: Query) -> Denoised:
        """Return the images in [-1, 1] of latents [B, C, H, W]: [B, *decoded_shape]."""
        return Denoised(self._denoiser.decode(query.pixels), None)
