"""Training data: concatenated banks or data sets; batches depend only on seed and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from els_service.denoisers.bank_parts import is_in_parts
from els_service.denoisers.bank_sources import read_source
from els_service.denoisers.banks import UNLABELLED, Bank, make_bank
from els_service.denoisers.levels import cosine
from els_service.denoisers.mixed_banks import load_any_bank, one_size
from els_service.denoisers.networks.parametrisation import parametrise
from els_service.errors import InvalidArgumentError
from els_service.experiments.training.settings import TrainingSettings

_TIMES = 1000
_ORDER, _NOISE = 1, 2
"""Streams of random numbers; stream 0 is that of the weights."""


def load_training_data(
    paths: Sequence[Path],
    *,
    resize: tuple[int, int] | None = None,
    limit: int | None = None,
    label_names: tuple[str, ...] = (),
    source: str = "",
    licence: str = "",
    labelled: bool = True,
) -> Bank:
    """Return all images of banks (``.safetensors``) and data sets as one bank.

    Args:
        paths: banks, or data sets as for ``read_source``, which are concatenated. Labels are
            matched by name if they have names, otherwise by number.
        resize: (H, W) of the images of data sets.
        limit: maximum number of images of each data set.
        label_names: one for each label, replacing those found; labels are then matched by number.
        source: origin of the images, replacing that of the banks.
        licence: licence of the images, replacing that of the banks.
        labelled: whether labels will be used; otherwise their names may differ.

    Raises:
        LoadError: A file is missing, damaged or of an unknown format; names it.
        InvalidArgumentError: The parts are incompatible, or there are none.
    """
    if not paths:
        raise InvalidArgumentError("data", "at least one file or folder", "none")
    banks = [_read(path, resize, limit, label_names) for path in paths]
    by_name = labelled and not label_names and any(bank.label_names for bank in banks)
    bank = banks[0] if len(banks) == 1 else _joined(banks, by_name)
    return dataclasses.replace(
        bank,
        label_names=label_names or bank.label_names,
        source=source or bank.source,
        licence=licence or bank.licence,
    )


def _read(
    path: Path, resize: tuple[int, int] | None, limit: int | None, label_names: tuple[str, ...]
) -> Bank:
    if path.suffix != ".safetensors" and not is_in_parts(path):
        bank = read_source(path, resize=resize, limit=limit, label_names=label_names)
    elif resize is not None or limit is not None:
        raise InvalidArgumentError("data", "a data set where it is resized or cut", path)
    else:
        bank = one_size(load_any_bank(path), "training")
    return dataclasses.replace(bank, source=bank.source or path.resolve().name)


def _joined(banks: Sequence[Bank], by_name: bool) -> Bank:
    first = banks[0]
    for bank in banks[1:]:
        if bank.shape != first.shape or bank.images.dtype != first.images.dtype:
            expected = f"parts of {first.images.dtype} images of shape {first.shape}"
            raise InvalidArgumentError("data", expected, f"{bank.images.dtype} of {bank.shape}")
        if (bank.label_count == 0) != (first.label_count == 0):
            raise InvalidArgumentError("data", "parts with labels, or without", "both")
    names = _names(banks) if by_name else ()
    labels = [_renumbered(bank, names) if by_name else bank.labels for bank in banks]
    licences = _distinct(bank.licence or "unstated" for bank in banks)
    return make_bank(
        np.concatenate([bank.images for bank in banks]),
        np.concatenate(labels) if first.label_count else None,
        label_names=names,
        source="; ".join(_distinct(bank.source for bank in banks)),
        licence="; ".join(licences) if licences != ("unstated",) else "",
    )


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts, each once, in order."""
    return tuple(dict.fromkeys(texts))


def _names(banks: Sequence[Bank]) -> tuple[str, ...]:
    """Return the names of all labels that have images."""
    for bank in banks:
        if not bank.label_names:
            expected = "parts that all name their labels, or none"
            raise InvalidArgumentError("data", expected, "some; --label-names would do for all")
        if len(set(bank.label_names)) < len(bank.label_names):
            expected = "another name for each label where parts are joined"
            raise InvalidArgumentError("data", expected, ", ".join(bank.label_names))
    seen = {bank.label_names[n] for bank in banks for n in np.unique(bank.labels)}
    return _distinct(name for bank in banks for name in bank.label_names if name in seen)


def _renumbered(bank: Bank, names: Sequence[str]) -> npt.NDArray[np.int64]:
    number = {name: i for i, name in enumerate(names)}
    # A label without images needs no number.
    return np.array([number.get(name, 0) for name in bank.label_names])[bank.labels]


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch on the device: inputs of the network and target outputs."""

    x: Tensor
    """[B, C, H, W] float32: c_in·(a·x0 + s·ε)"""
    time: Tensor
    labels: Tensor
    target: Tensor
    """Target: (x0 - c_skip·x) / c_out, for any parametrisation."""


class Batches:
    """Batches of a training run; batch n is the same in every run with the same seed.

    Args:
        bank: the images.
        settings: batch size, seed, parametrisation.
        device: device of images and batches.
    """

    def __init__(self, bank: Bank, settings: TrainingSettings, device: torch.device) -> None:
        self._settings, self._device = settings, device
        self._images = torch.from_numpy(bank.images).to(device)
        self._labels = np.where(bank.labels == UNLABELLED, 0, bank.labels)
        self._order = (-1, np.empty(0, np.int64))

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        settings = self._settings
        seed = np.random.SeedSequence((settings.seed, _NOISE, step))
        numbers = np.random.default_rng(seed)
        chosen = self._chosen(step)
        # Without t = 0, which has no noise to predict.
        level = cosine(numbers.integers(1, _TIMES + 1, len(chosen)) / _TIMES)
        p = parametrise(settings.network.prediction, level, settings.network.sigma_data)
        columns = np.stack([level.a, level.s, p.c_in, p.c_skip, p.c_out, p.time])
        on_device = self._sent(columns.astype(np.float32))
        a, s, c_in, c_skip, c_out = on_device[:5, :, None, None, None]
        x0 = _scaled(self._images[self._sent(chosen)])
        x = a * x0 + s * self._noise(x0, seed)
        labels = self._sent(self._withheld(self._labels[chosen], numbers))
        target = (x0 - c_skip * x) / c_out
        return Batch(c_in * x, on_device[5], labels, target)

    def _sent(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        # From pinned memory: other copies wait for the GPU's pending work.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _chosen(self, step: int) -> npt.NDArray[np.int64]:
        """Return the indices of a step within the infinite sequence of shuffled epochs."""
        images, batch = len(self._images), self._settings.batch
        places = np.arange(step * batch, (step + 1) * batch)
        parts = [
            self._shuffled(epoch)[places[places // images == epoch] % images]
            for epoch in range(places[0] // images, places[-1] // images + 1)
        ]
        return np.concatenate(parts)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order[0] != epoch:
            seed = np.random.SeedSequence((self._settings.seed, _ORDER, epoch))
            order = np.random.default_rng(seed).permutation(len(self._images))
            self._order = (epoch, order)
        return self._order[1]

    def _noise(self, like: Tensor, seed: np.random.SeedSequence) -> Tensor:
        generator = torch.Generator(self._device)
        generator.manual_seed(int(seed.generate_state(1)[0]))
        return torch.randn(like.shape, generator=generator, device=self._device)

    def _withheld(
        self, labels: npt.NDArray[np.int64], numbers: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Return the labels, some of them randomly replaced by the null label."""
        withheld = numbers.random(len(labels)) < self._settings.label_dropout
        return np.where(withheld, self._settings.network.label_count, labels)


def _scaled(images: Tensor) -> Tensor:
    """Return float32 images; uint8 v becomes v/127.5 - 1."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images
