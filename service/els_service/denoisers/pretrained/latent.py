"""Latent diffusion: a denoiser of latents, and the decoder from latents to images.

All denoising is on latents: the model's shape is that of the latents, levels are in the VAE's
scaled units (``scaling_factor``), and batches, scores and samplers do not involve the VAE. Only at
the end of a trajectory, on request, ``decode`` converts latents to images in [-1, 1], as a batch of
its own. In the API this is three fields of a request (conditioning, unconditional, guidance; each
image has its own, and a batch may mix them), a flag and a field of ``Sample``, and a description in
``Model``.

Text encoders are not served: callers send embeddings as tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from els_kernels import checkpoint
from els_service.denoisers.answers import check_finite
from els_service.denoisers.base import Denoised, DenoiserInfo, Query
from els_service.denoisers.gradients import Direction, Product
from els_service.denoisers.pretrained.folder import Only, Part, build_part, load_part
from els_service.denoisers.pretrained.unet import (
    CONDITIONAL,
    UnetDenoiser,
    UnetOptions,
    load_unet,
    memory_of,
)
from els_service.denoisers.pretrained.weights import Inside
from els_service.errors import LoadError

_VAES = ("AutoencoderKL", "AutoencoderTiny")
_ONLY: Only = {"latents_mean": (None,), "latents_std": (None,)}


class LatentDenoiser:
    """A UNet on latents with the VAE's decoder, in float32.

    Args:
        unet: denoiser of latents.
        part: the VAE with its weights; its encoder is dropped.
        decoded_shape: (C, H, W) of a decoded image.
        device: device of the weights.
    """

    def __init__(
        self, unet: UnetDenoiser, part: Part, decoded_shape: tuple[int, int, int], device: str
    ) -> None:
        self._unet, self._device = unet, device
        self._vae: Any = part.module
        self._vae.encoder = nn.Identity()
        self._scale: float = part.config["scaling_factor"]
        self._shift: float = part.config["shift_factor"] or 0.0
        self._info = dataclasses.replace(
            unet.info,
            kind="latent",
            decoded_shape=decoded_shape,
            memory_bytes=unet.info.memory_bytes + memory_of(part.module),
        )

    @property
    def info(self) -> DenoiserInfo:
        """Description of the model; ``shape`` is that of the latents."""
        return self._info

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if shape, a label or a condition is not supported."""
        self._unet.check(query)

    def predict_seconds(self, query: Query) -> float:
        """Return a rough estimate from the number of operations."""
        return self._unet.predict_seconds(query)

    def denoise(self, query: Query) -> Denoised:
        """Return D(x) as latents."""
        return self._unet.denoise(query)

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg of latents."""
        return self._unet.vjp(query, cotangent)

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u of latents."""
        return self._unet.jvp(query, tangent)

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return a multiple of the time of ``denoise``."""
        return self._unet.predict_product_seconds(query, direction)

    def decode(self, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the images in [-1, 1] of latents [B, C, H, W]: [B, *decoded_shape].

        Raises:
            ElsError: The decoder returned NaN or infinity.
        """
        with torch.inference_mode():
            scaled = torch.from_numpy(latents).to(self._device) / self._scale + self._shift
            # One at a time: decoding needs far more memory than a latent.
            images = [self._decode_one(one) for one in scaled]
            pixels: npt.NDArray[np.float32] = torch.cat(images).cpu().numpy()
        check_finite(pixels, "the decoder")
        return pixels.clip(-1, 1, out=pixels)

    def _decode_one(self, latent: Tensor) -> Tensor:
        checkpoint()
        image: Tensor = self._vae.decode(latent[None], return_dict=False)[0]
        return image


def load_latent(inside: Inside, options: UnetOptions, device: str) -> LatentDenoiser:
    """Return the denoiser of a diffusers folder: ``vae``, ``unet`` and ``scheduler``.

    Args:
        inside: resolver of names in the diffusers folder.
        options: options of the UNet.
        device: device to run on.

    Raises:
        LoadError: A file is missing or rejected; names it and the field or tensor.
    """
    part = build_part(inside, "vae", _VAES, _ONLY)
    scale, shift = part.config["scaling_factor"], part.config["shift_factor"]
    if not (isinstance(scale, int | float) and scale > 0):
        raise part.refuse("scaling_factor", "a positive number")
    if not isinstance(shift, int | float | None):
        raise part.refuse("shift_factor", "a number")
    unet = load_unet(inside, options, device, CONDITIONAL)
    decoded_shape = _decoded_shape(part, unet.info.shape)
    load_part(inside, "vae", part, variant=options.variant, device=device)
    return LatentDenoiser(unet, part, decoded_shape, device)


def _decoded_shape(part: Part, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (C, H, W) of the images of latents (C, H, W).

    Raises:
        LoadError: The latents of the VAE have another number of channels.
    """
    if part.config["latent_channels"] != shape[0]:
        raise part.refuse("latent_channels", f"{shape[0]}, as the unet's in_channels")
    module: Any = part.module
    try:
        with torch.inference_mode():
            latents = torch.empty(1, *shape, device="meta")
            _, channels, height, width = module.decode(latents, return_dict=False)[0].shape
    except Exception as error:
        # Validated by diffusers, with many exception types.
        text = " ".join(str(error).split())
        raise LoadError(part.path, f"expected a decoder of {list(shape)}, got {text}") from error
    return channels, height, width
