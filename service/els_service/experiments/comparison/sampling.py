"""Sampling of images by networks and machines from the same noise, with resumption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.files import write_atomically
from els_service.denoisers.samplers import Options, sample, steps_of
from els_service.errors import ElsError, InvalidArgumentError, LoadError

_FORMAT = "els-compare-1"
_CHUNK_S = 30.0
"""Approximate seconds between two writes of the images."""
_LARGEST_CHUNK = 64

Report = Callable[[int, int], None]
"""Callback with the number of steps done and the total."""


@dataclass(frozen=True)
class SampleSpec:
    """Sampling options; image i depends only on them and on i."""

    seed: int = 0
    steps: int = 20
    sampler: str = "ddim"
    label_count: int = 0
    """Image i has label i modulo this number; 0 means no labels."""

    def labels(self, first: int, count: int) -> list[int]:
        """Return the labels of ``count`` images from ``first`` on."""
        if not self.label_count:
            return [-1] * count
        return [i % self.label_count for i in range(first, first + count)]


def check_seed(seed: int) -> None:
    """Raise InvalidArgumentError unless 0 ≤ seed < 2⁶⁴."""
    if not 0 <= seed < 1 << 64:
        raise InvalidArgumentError("seed", "0 to 2**64 - 1", seed)


@dataclass(frozen=True)
class Samples:
    """Images of a denoiser.

    Attributes:
        images: [N, C, H, W] float32.
        seconds: that all images of the file took, in all runs.
        seconds_per_step: of one image.
    """

    images: Tensor
    seconds: float
    seconds_per_step: float


def sample_images(
    denoiser: Denoiser,
    how: SampleSpec,
    count: int,
    file: Path,
    identity: Mapping[str, Any],
    report: Report = lambda done, total: None,
) -> Samples:
    """Return the first ``count`` images of a denoiser; those in ``file`` are not sampled again.

    Args:
        denoiser: a network or a machine.
        how: noise, labels and steps.
        count: number of images, at least 1.
        file: file of the images, written after every few images.
        identity: JSON value that identifies the denoiser.
        report: callback for every step.

    Raises:
        LoadError: ``file`` has images of another run; names the setting that differs.
        ElsError: An image is not finite.
    """
    settings = json.loads(json.dumps({**identity, **vars(how)}))
    parts, seconds = _read(file, settings)
    options = Options(steps=how.steps)
    chunk = chunk_size(denoiser, how)
    steps = steps_of(how.sampler, options)
    while (done := sum(map(len, parts))) < count:
        # The same batch boundaries as in a run without interruption.
        size = min(count, (done // chunk + 1) * chunk) - done
        begin = time.monotonic()
        labels = how.labels(done, size)
        for step in sample(
            denoiser,
            count=size,
            first=done,
            seed=how.seed,
            sampler=how.sampler,
            options=options,
            labels=labels,
        ):
            report(done * steps + step.index * size, count * steps)
        _check_finite(file.stem, step.x, done)
        parts.append(step.x.float())
        seconds += time.monotonic() - begin
        _write(file, torch.cat(parts), settings, seconds)
    images = torch.cat(parts)
    return Samples(images[:count], seconds, seconds / (len(images) * steps))


def chunk_size(denoiser: Denoiser, how: SampleSpec) -> int:
    """Return the number of images per batch: about half a minute of computation."""
    x = torch.zeros(1, *denoiser.info.shape)
    options = Options(steps=how.steps)
    queries = (make_query(x, options.level(i), how.labels(0, 1)) for i in range(1, how.steps + 1))
    seconds = sum(map(denoiser.predict_seconds, queries))
    return max(1, min(_LARGEST_CHUNK, int(_CHUNK_S / seconds)))


def _check_finite(name: str, images: Tensor, first: int) -> None:
    for i, image in enumerate(images, first):
        if not image.isfinite().all():
            raise ElsError(f"{name}: expected finite images, got NaN or infinity in image {i}")


def _read(file: Path, settings: dict[str, Any]) -> tuple[list[Tensor], float]:
    if not file.exists():
        return [], 0.0
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata()
            images = tensors.get_tensor("images")
        if metadata["format"] != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}, got {metadata['format']}")
        found, seconds = json.loads(metadata["settings"]), float(metadata["seconds"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LoadError(file, f"expected images of a comparison: {error}") from error
    for name in sorted(found.keys() | settings.keys()):
        if found.get(name) != settings.get(name):
            reason = f"{name}: expected {found.get(name)} as begun, got {settings.get(name)}"
            raise LoadError(file, f"{reason}; use another --out to start over")
    return [images], seconds


def _write(file: Path, images: Tensor, settings: dict[str, Any], seconds: float) -> None:
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(settings, sort_keys=True),
        "seconds": repr(seconds),
    }
    write_atomically(file, save({"images": images.contiguous()}, metadata))
