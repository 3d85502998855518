"""Tensor names, datatypes and shapes of every model in the Open Inference Protocol.

Inputs: ``x`` FP32 [-1, C, H, W]; exactly one of ``sigma``, ``alpha_bar``, ``time`` FP32 [-1];
optionally ``label`` INT64 [-1] and ``window`` INT64 [-1]. Outputs: ``denoised`` and ``score`` FP32
[-1, C, H, W], ``log_evidence`` FP32 [-1, H, W] if the model has it; all, or those requested. H and
W are -1 for a model that answers several sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from els_service.denoisers.base import DenoiserInfo

LEVELS = ("sigma", "alpha_bar", "time")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Datatype:
    """Encoding of numbers: protocol's name, layout of raw contents, field of typed contents."""

    name: str
    layout: np.dtype[Any]
    field: str


FP32 = Datatype("FP32", np.dtype("<f4"), "fp32_contents")
INT64 = Datatype("INT64", np.dtype("<i8"), "int64_contents")

INPUTS = {"x": FP32, **dict.fromkeys(LEVELS, FP32), "label": INT64, "window": INT64}
OUTPUTS = ("denoised", "score", "log_evidence")


def inputs_of(info: DenoiserInfo) -> Shapes:
    """Return the shape of each input; -1 is the number of images, or a side of any length."""
    return _inputs(_image_shape(info), info.label_count > 0, info.max_window > 0)


def outputs_of(info: DenoiserInfo) -> Shapes:
    """Return the shape of each output; -1 is the number of images, or a side of any length."""
    return _outputs(_image_shape(info), info.has_log_evidence)


def _image_shape(info: DenoiserInfo) -> tuple[int, ...]:
    return info.shape if info.sizes is None else (info.shape[0], -1, -1)


# Cached: each ModelInfer uses both.
@functools.lru_cache(256)
def _inputs(shape: tuple[int, ...], labelled: bool, windowed: bool) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {"x": (-1, *shape), **dict.fromkeys(LEVELS, (-1,))}
    if labelled:
        shapes["label"] = (-1,)
    if windowed:
        shapes["window"] = (-1,)
    return MappingProxyType(shapes)


@functools.lru_cache(256)
def _outputs(shape: tuple[int, ...], has_log_evidence: bool) -> Shapes:
    shapes = {"denoised": (-1, *shape), "score": (-1, *shape)}
    if has_log_evidence:
        shapes["log_evidence"] = (-1, *shape[1:])
    return MappingProxyType(shapes)
