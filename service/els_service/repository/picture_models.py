"""Models of kind ``picture`` from the pictures in their folder."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from els_kernels import FoldedAttention
from els_service.denoisers.base import Denoiser
from els_service.denoisers.file_names import printable_name
from els_service.denoisers.folded import fold_of
from els_service.denoisers.picture import PictureDenoiser
from els_service.denoisers.picture_banks import check_pictures, picture_bank
from els_service.denoisers.picture_subset import SubsetDenoiser, all_patches, patch_subset
from els_service.denoisers.pictures import read_picture
from els_service.denoisers.pyramids import COARSEST_PATCHES, fitted, resized, scale_count
from els_service.repository.folders import ModelFiles
from els_service.repository.specs import PictureSpec


def load_picture_model(
    spec: PictureSpec, files: ModelFiles, implementation: str, device: str
) -> Denoiser:
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
        names=[printable_name(Path(name), Path(name).parent) for name in spec.pictures],
    )
    # A picture file has no memory of its own once its scales are made.
    attention = fold_of(bank, device, implementation)
    rho = math.inf if isinstance(spec.fold, str) else float(spec.fold)
    model = PictureDenoiser(attention, bank, patch=spec.patch, fold=rho, steps=spec.steps)
    if spec.sources is None:
        return model
    whole = [bank.images[slice(*bank.label_range(label))] for label in range(len(bank.sizes))]
    subset = patch_subset(whole, patch=spec.patch, sources=spec.sources, seed=spec.seed)
    part = FoldedAttention([im.to(device) for im in subset.images], implementation=implementation)
    name = f"sources {spec.sources} seed {spec.seed}"
    return SubsetDenoiser(
        model, all_patches(whole), subset, part, patch=spec.patch, fold=rho, name=name
    )


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
