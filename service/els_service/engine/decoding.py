"""Latent decoders as denoisers: decoding is queued, has a deadline and a watchdog."""

from __future__ import annotations

import math

from els_service.denoisers.base import Denoised, DenoiserInfo, LatentDecoder, Query

_LAUNCH_S, _PIXEL_S = 1e-3, 5e-6
"""Initial estimate, about that of a CPU, which the cost model corrects."""


class DecoderAsDenoiser:
    """Denoiser whose result for latents is their decoded images.

    Args:
        denoiser: denoiser with the decoder.
    """

    def __init__(self, denoiser: LatentDecoder) -> None:
        self._denoiser = denoiser

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser of the latents."""
        return self._denoiser.info

    def check(self, query: Query) -> None:
        """Do nothing, as latents come from a checked trajectory."""

    def predict_seconds(self, query: Query) -> float:
        """Return an estimate from the number of decoded pixels."""
        pixels = math.prod(self.info.decoded_shape or ())
        return len(query) * (_LAUNCH_S + _PIXEL_S * pixels)

    def denoise(self, query: Query) -> Denoised:
        """Return the images in [-1, 1] of latents [B, C, H, W]: [B, *decoded_shape]."""
        return Denoised(self._denoiser.decode(query.pixels), None)
