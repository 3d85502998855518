"""Denoisers from validated ``model.yaml`` documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank
from els_service.denoisers.base import Denoiser, SizeRange
from els_service.denoisers.closed_forms import GaussianDenoiser, WienerDenoiser
from els_service.denoisers.engines.options import EngineDefaults
from els_service.denoisers.fold_levels import LevelFoldDenoiser, Machine
from els_service.denoisers.folded import MAX_SIDE, FoldedDenoiser, check_fold, check_images
from els_service.denoisers.mapped_banks import MappedBank
from els_service.denoisers.mixed_banks import one_size
from els_service.denoisers.pca import PcaDenoiser
from els_service.denoisers.pca_masks import DEFAULT_THRESHOLD, ThresholdTable
from els_service.denoisers.smoothed import SmoothedDenoiser
from els_service.denoisers.source_banks import SourceBank
from els_service.denoisers.windows import PUBLISHED, WindowTable
from els_service.errors import LoadError
from els_service.repository.bank_cache import BankCache
from els_service.repository.folders import (
    FOLDS_FILE,
    THRESHOLDS_FILE,
    WINDOWS_FILE,
    ModelFiles,
)
from els_service.repository.picture_models import load_picture_model
from els_service.repository.pretrained_specs import (
    DiffusersSpec,
    LatentSpec,
    OnnxSpec,
    load_pretrained,
)
from els_service.repository.specs import (
    AnalyticSpec,
    GaussianSpec,
    PcaSpec,
    PictureSpec,
    SizesSpec,
    SmoothedSpec,
    Spec,
    ThresholdSpec,
    WienerSpec,
    WindowSpec,
)
from els_service.repository.window_files import read_folds, read_thresholds, read_windows
from els_service.shards.denoiser import ShardedDenoiser
from els_service.shards.opening import SHARDED_CALL_S, Engine

_MAX_NUMBERS = 1 << 29
"""Maximum numbers of an image: what the largest legal message holds."""


def build(
    spec: Spec, files: ModelFiles, banks: BankCache, device: str, engines: EngineDefaults
) -> Denoiser:
    """Return the denoiser that a document describes.

    Args:
        spec: the document.
        files: files of its folder.
        banks: cache of banks.
        device: device that holds bank or weights.
        engines: engine options of the server, for trained networks.

    Raises:
        LoadError: A file is missing or invalid.
        ValueError: A field is out of range.
        OSError: A file cannot be read.
        ModuleNotFoundError: The extra of this kind is not installed.
    """
    match spec:
        case AnalyticSpec():
            return _analytic(spec, files, banks, device)
        case GaussianSpec():
            channels, height, width = spec.shape
            if (numbers := math.prod(spec.shape)) > _MAX_NUMBERS:
                raise ValueError(f"shape: expected at most {_MAX_NUMBERS} numbers, got {numbers}")
            return GaussianDenoiser(
                (channels, height, width),
                _statistic(files, "mean", spec.mean),
                _statistic(files, "variance", spec.variance),
            )
        case PcaSpec():
            return _pca(spec, files, banks, device)
        case SmoothedSpec():
            bank, attention = banks.attention(files.find_bank(spec.bank), device)
            ideal = AnalyticDenoiser(attention, bank, machine="ideal")
            return SmoothedDenoiser(
                ideal, smoothing=spec.smoothing, draws=spec.draws, seed=spec.seed
            )
        case PictureSpec():
            return load_picture_model(spec, files, banks.implementation, device)
        case WienerSpec():
            return WienerDenoiser(one_size(banks.bank(files.find_bank(spec.bank)), "kind wiener"))
        case DiffusersSpec() | LatentSpec() | OnnxSpec():
            return load_pretrained(spec, files, device, engines)


def _pca(spec: PcaSpec, files: ModelFiles, banks: BankCache, device: str) -> Denoiser:
    """Return the machine of PCA-locality."""
    if isinstance(spec.threshold, ThresholdSpec):
        table = ThresholdTable(tuple(spec.threshold.sigma), tuple(spec.threshold.tau))
    elif spec.threshold != "auto":
        table = ThresholdTable.constant(spec.threshold)
    elif (files.folder / THRESHOLDS_FILE).exists():
        table = read_thresholds(files.find(THRESHOLDS_FILE))
    elif spec.rule == "correlation":
        table = ThresholdTable.constant(DEFAULT_THRESHOLD)
    else:
        expected = f"a number, a table or {THRESHOLDS_FILE} with rule released"
        raise ValueError(f"threshold: expected {expected}, got auto")
    return PcaDenoiser(
        one_size(banks.bank(files.find_bank(spec.bank)), "kind pca"),
        rule=spec.rule,
        threshold=table,
        covariance=spec.covariance,
        device=device,
    )


def _analytic(spec: AnalyticSpec, files: ModelFiles, banks: BankCache, device: str) -> Denoiser:
    """Return a machine: with a fold where its document asks for what only that answers."""
    if spec.shards is None and spec.engine is not None:
        raise ValueError(f"engine: expected shards beside it, got {spec.engine} alone")
    if spec.shards is not None and device != "cpu":
        raise ValueError(f"shards: expected device cpu, got {device}")
    images = _Images(banks, files.find_bank(spec.bank), device, spec.shards, spec.engine or "local")
    if spec.fold == "auto":
        table = read_folds(files.find(FOLDS_FILE))
        windows = WindowSpec(sigma=list(table.sigma), k=list(table.k))
        machines = {
            rho: _machine(spec.model_copy(update={"fold": rho, "window": windows}), files, images)
            for rho in sorted(set(table.rho))
        }
        return LevelFoldDenoiser(machines, table)
    return _machine(spec, files, images)


@dataclass(frozen=True)
class _Images:
    """Images of a machine, in this process or in shards.

    Attributes:
        banks: cache of banks.
        path: of the bank.
        device: that holds it.
        shards: number of shards; None for this process.
        engine: of shards.
    """

    banks: BankCache
    path: Path
    device: str
    shards: int | Literal["auto"] | None
    engine: Engine

    def bank(self) -> SourceBank:
        """Return the bank; raises as the next."""
        if self.shards is None:
            return self.banks.bank(self.path)
        return self.banks.sharded(self.path, self.shards, self.engine).bank

    def plain(self, **options: Any) -> AnalyticDenoiser:
        """Return a machine without a fold.

        Args:
            **options: of ``AnalyticDenoiser``.

        Raises:
            LoadError: The bank is damaged, a shard cannot be loaded, or Ray is not installed.
        """
        if self.shards is None:
            bank, attention = self.banks.attention(self.path, self.device)
            return AnalyticDenoiser(attention, bank, **options)
        shards = self.banks.sharded(self.path, self.shards, self.engine)
        return ShardedDenoiser(shards, **options)

    def folded(self, plain: AnalyticDenoiser | None, **options: Any) -> FoldedDenoiser:
        """Return a machine with a fold; raises as ``plain``.

        Args:
            plain: for queries of the bank's size, or None.
            **options: of ``FoldedDenoiser``.
        """
        if self.shards is None:
            bank, moments = self.banks.fold(self.path, self.device)
            return FoldedDenoiser(moments, bank, plain=plain, **options)
        shards, moments = self.banks.sharded_fold(self.path, self.shards, self.engine)
        return FoldedDenoiser(moments, shards.bank, plain=plain, call_s=SHARDED_CALL_S, **options)


def _machine(spec: AnalyticSpec, files: ModelFiles, images: _Images) -> Machine:
    """Return a machine with one fold, or none."""
    common: dict[str, Any] = {
        "machine": spec.machine,
        "padding": spec.padding,
        "window": _window(files, spec.window),
        "clip": isinstance(spec.window, str),
    }
    rho, sized = (
        math.inf if isinstance(spec.fold, str) else float(spec.fold),
        spec.sizes is not None,
    )
    bank = images.bank()
    if rho == 0 and spec.padding != "inside" and not sized:
        check_images(bank, spec.machine, sized=False)
        return images.plain(**common)
    check_fold(spec.machine, spec.padding, rho, sized=sized)
    check_images(bank, spec.machine, sized=sized)
    plain = None
    if rho == 0 and spec.padding != "inside" and isinstance(bank, Bank | MappedBank):
        # Queries of the bank's size keep the bits that they have without ``sizes``.
        plain = images.plain(**common)
    return images.folded(plain, **common, fold=rho, sizes=_sizes(spec.sizes, bank.shape))


def _sizes(sizes: Literal["any"] | SizesSpec | None, shape: tuple[int, ...]) -> SizeRange | None:
    """Return the range of sizes of queries.

    Raises:
        ValueError: A range is empty, or without the size of the bank's images.
    """
    if sizes is None:
        return None
    if sizes == "any":
        return SizeRange((1, MAX_SIDE), (1, MAX_SIDE))
    ranges = (sizes.height[0], sizes.height[1]), (sizes.width[0], sizes.width[1])
    for name, side, (low, high) in zip(("height", "width"), shape[1:], ranges, strict=True):
        if not low <= side <= high:
            expected = f"lowest to highest, with the bank's {side} between them"
            raise ValueError(f"sizes.{name}: expected {expected}, got [{low}, {high}]")
    return SizeRange(*ranges)


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
