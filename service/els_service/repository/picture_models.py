"""Models of kind ``picture`` from the pictures in their folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from els_kernels import FoldedAttention, grouped
from els_service.denoisers.picture import PictureDenoiser, check_pictures, picture_bank
from els_service.denoisers.pictures import read_picture
from els_service.denoisers.pyramids import COARSEST_PATCHES, fitted, resized, scale_count
from els_service.repository.folders import ModelFiles
from els_service.repository.specs import PictureSpec


def load_picture_model(
    spec: PictureSpec, files: ModelFiles, implementation: str, device: str
) -> PictureDenoiser:
    """Return the denoiser of a document of kind ``picture``.

    Raises:
        LoadError: A picture is missing, damaged, or of an unsupported format.
        ValueError: A key is out of range for the pictures.
    """
    if spec.patch % 2 == 0:
        raise ValueError(f"patch: expected an odd number, got {spec.patch}")
    coarsest = round(COARSEST_PATCHES * spec.patch)
    if isinstance(spec.coarsest, int):
        coarsest = spec.coarsest
    if coarsest < spec.patch:
        raise ValueError(f"coarsest: expected at least {spec.patch}, the patch, got {coarsest}")
    pictures = [read_finest(files(name), spec.finest) for name in spec.pictures]
    check_pictures(pictures, spec.patch)
    scales = spec.scales
    if scales == "auto":
        height, width = pictures[0].shape[1:]
        scales = scale_count((height, width), coarsest)
    bank = picture_bank(
        pictures,
        coarsest=coarsest,
        scales=scales,
        source=spec.source or ", ".join(Path(name).name for name in spec.pictures),
        licence=spec.licence,
    )
    # A picture file has no memory of its own once its scales are made.
    groups = grouped([image.to(device) for image in bank.images])
    attention = FoldedAttention(groups, implementation=implementation)
    if attention.device.type == "cpu":
        # Views: pictures of one size are stacked for the fold, and held once.
        bank = replace(bank, images=tuple(image for group in groups for image in group))
    rho = math.inf if isinstance(spec.fold, str) else float(spec.fold)
    return PictureDenoiser(attention, bank, patch=spec.patch, fold=rho, steps=spec.steps)


def read_finest(file: Path, longest: int) -> Tensor:
    """Return a picture [C, H, W] float64 in [-1, 1], reduced to ``longest`` pixels a side.

    Raises:
        LoadError: As ``read_picture``.
    """
    pixels = torch.from_numpy(read_picture(file).transpose(2, 0, 1).copy())
    height, width = pixels.shape[1:]
    size = fitted((height, width), longest)
    # Reduced in float32: the largest legal picture has 67 million pixels.
    image = pixels[None].float() / 127.5 - 1
    return resized(image, size)[0].double().clamp(-1, 1)
