"""Checks of a query against the description of a denoiser."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from els_service.denoisers.base import DenoiserInfo, Integers, Query
from els_service.errors import InvalidArgumentError


def check_query(info: DenoiserInfo, query: Query) -> None:
    """Check shape, labels, windows and conditions against the description of a denoiser.

    Raises:
        InvalidArgumentError: One of them is not supported; names field, expected and got.
    """
    if query.pixels.shape[1:] != info.shape and not _has_legal_size(info, query.pixels.shape):
        channels, height, width = info.shape
        sides = f"{height}, {width}" if info.sizes is None else str(info.sizes)
        expected = f"[B, {channels}, {sides}]"
        raise InvalidArgumentError("x", f"shape {expected}", f"{list(query.pixels.shape)}")
    _check_labels(info, query.labels.tolist())
    _check_windows(info, query.windows.tolist(), query.pixels.shape)
    if info.condition_width or query.conditions:
        _check_conditions(info, query)
    if query.guidance is not None:
        _check_guidance(info, query.labels, query.guidance)


def _has_legal_size(info: DenoiserInfo, shape: tuple[int, ...]) -> bool:
    """Return whether images [B, C, H, W] have the channels of a model and one of its sizes."""
    if info.sizes is None or len(shape) != 4 or shape[1] != info.shape[0]:
        return False
    return (shape[2], shape[3]) in info.sizes


def _check_guidance(
    info: DenoiserInfo, labels: Integers, guidance: npt.NDArray[np.float64]
) -> None:
    for label, g in zip(labels.tolist(), guidance.tolist(), strict=True):
        if g == 1:
            continue
        if not info.label_guidance:
            expected = "0 or 1 without conditioning, as this model has no class for no label"
            raise InvalidArgumentError("guidance", expected, g)
        if label < 0:
            raise InvalidArgumentError("guidance", "0 or 1 for an image without a label", g)


def _check_labels(info: DenoiserInfo, labels: list[int]) -> None:
    for label in labels:
        if label == -1:
            continue
        if not info.label_count:
            raise InvalidArgumentError("labels", "none for an unlabelled model", label)
        if not 0 <= label < info.label_count:
            raise InvalidArgumentError("labels", f"-1 to {info.label_count - 1}", label)


def largest_window(info: DenoiserInfo, height: int, width: int) -> int:
    """Return the largest window of queries [B, C, ``height``, ``width``]; 0 if there are none."""
    if not info.max_window or (height, width) == info.shape[1:]:
        return info.max_window
    of_bank = None if info.bank is None else info.bank.sizes
    return odd(min(height, width, *(info.shape[1:] if of_bank is None else (of_bank.least,))))


def odd(side: int) -> int:
    """Return the largest odd number up to ``side``."""
    return side - (side + 1) % 2


def _check_windows(info: DenoiserInfo, windows: list[int], shape: tuple[int, ...]) -> None:
    for k in windows:
        if k == 0:
            continue
        if not info.max_window:
            raise InvalidArgumentError("windows", "none for a model without a window", k)
        largest = largest_window(info, shape[2], shape[3])
        if k % 2 == 0 or not 1 <= k <= largest:
            raise InvalidArgumentError("windows", f"odd from 1 to {largest}", k)


def _check_conditions(info: DenoiserInfo, query: Query) -> None:
    if not info.condition_width:
        raise InvalidArgumentError("conditioning", "none for this model", "some")
    expected = f"[1 to {info.condition_rows}, {info.condition_width}] for each image"
    if not query.conditions:
        raise InvalidArgumentError("conditioning", expected, "none")
    for condition in query.conditions:
        rows, width = condition.given.shape
        if width != info.condition_width or not 1 <= rows <= info.condition_rows:
            raise InvalidArgumentError("conditioning", expected, [rows, width])
        other = condition.unconditional
        if other is not None and other.shape != condition.given.shape:
            raise InvalidArgumentError(
                "unconditional", f"shape {[rows, width]}, as conditioning", list(other.shape)
            )
