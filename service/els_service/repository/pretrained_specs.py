"""Sections of ``model.yaml`` that describe pretrained networks, and their loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from els_service.denoisers.base import Denoiser
from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA
from els_service.denoisers.pretrained.folder import Inside
from els_service.denoisers.pretrained.latent import load_latent
from els_service.denoisers.pretrained.onnx_model import OnnxDocument, load_onnx
from els_service.denoisers.pretrained.unet import UnetOptions, load_unet
from els_service.errors import LoadError

_Shape = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
_Sigma = Annotated[float, Field(ge=MIN_SIGMA, le=MAX_SIGMA)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _UnetSpec(_Spec):
    """Folder of diffusers, unchanged."""

    folder: str = "."
    """Folder of ``unet`` and ``scheduler``, relative to the model folder."""
    variant: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = ""
    null_label: bool = False


class DiffusersSpec(_UnetSpec):
    """A ``UNet2DModel`` of diffusers."""

    kind: Literal["diffusers"]


class LatentSpec(_UnetSpec):
    """A UNet of diffusers over the latents of the folder's ``vae``."""

    kind: Literal["latent"]
    condition_rows: Annotated[int, Field(ge=1, le=4096)] = 77


class OnnxLevelSpec(_Spec):
    """Input of a graph for the noise level."""

    input: str
    given_as: Annotated[Literal["sigma", "log_sigma", "alpha_bar", "time"], Field(alias="as")] = (
        "sigma"
    )
    range: Annotated[list[_Sigma], Field(min_length=2, max_length=2)] = [0.002, 80.0]


class OnnxLabelSpec(_Spec):
    """The input that takes labels."""

    input: str
    count: Annotated[int, Field(ge=1, le=100_000)]


class OnnxSpec(_Spec):
    """An ONNX graph; see ``OnnxDocument``."""

    kind: Literal["onnx"]
    file: str
    input: str
    output: str
    level: OnnxLevelSpec
    prediction: Literal["x0", "eps", "v"] = "x0"
    scaling: Literal["exploding", "preserving"] = "exploding"
    label: OnnxLabelSpec | None = None
    constants: dict[str, float | list[float]] = {}
    shape: _Shape | None = None
    deterministic: bool = False


PretrainedSpec = DiffusersSpec | LatentSpec | OnnxSpec


def load_pretrained(spec: PretrainedSpec, inside: Inside, device: str) -> Denoiser:
    """Return the denoiser of a model folder.

    Args:
        spec: its ``model.yaml``.
        inside: function from a name in the model folder to its path.
        device: device that holds weights; ONNX graphs run on the CPU.

    Raises:
        LoadError: A file is missing or invalid; names it and the field or tensor.
        ValueError: A field is out of range.
        ModuleNotFoundError: The extra of this kind is not installed.
    """
    if isinstance(spec, OnnxSpec):
        return load_onnx(_onnx_document(spec), spec.file, inside)
    if Path(spec.folder).is_absolute():
        raise LoadError(spec.folder, "expected a path relative to the model's folder")
    options = UnetOptions(
        variant=spec.variant,
        null_label=spec.null_label,
        condition_rows=spec.condition_rows if isinstance(spec, LatentSpec) else 0,
    )
    load = load_latent if isinstance(spec, LatentSpec) else load_unet
    return load(lambda name: inside(f"{spec.folder}/{name}"), options, device)


def _onnx_document(spec: OnnxSpec) -> OnnxDocument:
    lowest, highest = spec.level.range
    if lowest >= highest:
        raise ValueError(f"level.range: expected two increasing numbers, got {spec.level.range}")
    channels, height, width = spec.shape or (0, 0, 0)
    return OnnxDocument(
        input=spec.input,
        output=spec.output,
        level=spec.level.input,
        level_as=spec.level.given_as,
        prediction=spec.prediction,
        exploding=spec.scaling == "exploding",
        sigma_range=(lowest, highest),
        label=spec.label.input if spec.label else None,
        label_count=spec.label.count if spec.label else 0,
        constants=spec.constants,
        shape=(channels, height, width) if spec.shape else None,
        deterministic=spec.deterministic,
    )
