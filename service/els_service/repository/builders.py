"""Denoisers from validated ``model.yaml`` documents."""

from __future__ import annotations

import math

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.base import Denoiser
from els_service.denoisers.closed_forms import GaussianDenoiser, WienerDenoiser
from els_service.denoisers.windows import PUBLISHED, WindowTable
from els_service.errors import LoadError
from els_service.repository.bank_cache import BankCache
from els_service.repository.folders import WINDOWS_FILE, ModelFiles
from els_service.repository.pretrained_specs import (
    DiffusersSpec,
    LatentSpec,
    OnnxSpec,
    load_pretrained,
)
from els_service.repository.specs import AnalyticSpec, GaussianSpec, Spec, WienerSpec, WindowSpec
from els_service.repository.window_files import read_windows

_MAX_NUMBERS = 1 << 29
"""Maximum numbers of an image: what the largest legal message holds."""


def build(spec: Spec, files: ModelFiles, banks: BankCache, device: str) -> Denoiser:
    """Return the denoiser that a document describes.

    Args:
        spec: the document.
        files: files of its folder.
        banks: cache of banks.
        device: device that holds bank or weights.

    Raises:
        LoadError: A file is missing or invalid.
        ValueError: A field is out of range.
        OSError: A file cannot be read.
        ModuleNotFoundError: The extra of this kind is not installed.
    """
    match spec:
        case AnalyticSpec():
            bank, attention = banks.attention(files.find(spec.bank), device)
            return AnalyticDenoiser(
                attention,
                bank,
                machine=spec.machine,
                padding=spec.padding,
                window=_window(files, spec.window),
                clip=isinstance(spec.window, str),
            )
        case GaussianSpec():
            channels, height, width = spec.shape
            if (numbers := math.prod(spec.shape)) > _MAX_NUMBERS:
                raise ValueError(f"shape: expected at most {_MAX_NUMBERS} numbers, got {numbers}")
            return GaussianDenoiser(
                (channels, height, width),
                _statistic(files, "mean", spec.mean),
                _statistic(files, "variance", spec.variance),
            )
        case WienerSpec():
            return WienerDenoiser(banks.bank(files.find(spec.bank)))
        case DiffusersSpec() | LatentSpec() | OnnxSpec():
            return load_pretrained(spec, files, device)


def _window(files: ModelFiles, window: int | str | WindowSpec) -> WindowTable | None:
    if isinstance(window, int):
        return WindowTable.constant(window)
    if isinstance(window, WindowSpec):
        return WindowTable(tuple(window.sigma), tuple(window.k))
    if window == PUBLISHED or not (files.folder / WINDOWS_FILE).exists():
        return None
    return read_windows(files.find(WINDOWS_FILE))


def _statistic(files: ModelFiles, name: str, value: float | list[float] | str) -> Tensor:
    if isinstance(value, list):
        return torch.tensor(value, dtype=torch.float64)[:, None, None]
    if not isinstance(value, str):
        return torch.tensor(value, dtype=torch.float64)
    path = files(value)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(path, f"expected a safetensors file, got {error}") from error
    if name not in tensors:
        raise LoadError(path, f"expected a tensor {name!r}, got {sorted(tensors)}")
    return tensors[name]
