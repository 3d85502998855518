"""What every model takes and gives in the Open Inference Protocol: names, datatypes, shapes.

Inputs: ``x`` FP32 [-1, C, H, W]; exactly one of ``sigma``, ``alpha_bar``, ``time`` FP32 [-1];
optionally ``label`` INT64 [-1] and ``window`` INT64 [-1]. Outputs: ``denoised`` and ``score`` FP32
[-1, C, H, W], ``log_evidence`` FP32 [-1, H, W] where the model has it; only what is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy.typing as npt

from els_service.denoisers.base import DenoiserInfo

LEVELS = ("sigma", "alpha_bar", "time")


@dataclass(frozen=True)
class Datatype:
    """How numbers travel: protocol's name, layout of raw contents, field of typed contents."""

    name: str
    layout: npt.DTypeLike
    field: str


FP32 = Datatype("FP32", "<f4", "fp32_contents")
INT64 = Datatype("INT64", "<i8", "int64_contents")

INPUTS = {"x": FP32, **dict.fromkeys(LEVELS, FP32), "label": INT64, "window": INT64}
OUTPUTS = ("denoised", "score", "log_evidence")


def inputs_of(info: DenoiserInfo) -> dict[str, tuple[int, ...]]:
    """Return each input with its shape; -1 stands for the number of images."""
    shapes: dict[str, tuple[int, ...]] = {"x": (-1, *info.shape), **dict.fromkeys(LEVELS, (-1,))}
    if info.label_count:
        shapes["label"] = (-1,)
    if info.max_window:
        shapes["window"] = (-1,)
    return shapes


def outputs_of(info: DenoiserInfo) -> dict[str, tuple[int, ...]]:
    """Return each output with its shape; -1 stands for the number of images."""
    shape = (-1, *info.shape)
    shapes: dict[str, tuple[int, ...]] = {"denoised": shape, "score": shape}
    if info.has_log_evidence:
        shapes["log_evidence"] = (-1, *info.shape[1:])
    return shapes
