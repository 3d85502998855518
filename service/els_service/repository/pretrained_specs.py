"""Sections of ``model.yaml`` that describe pretrained networks, and their loaders."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from els_service.denoisers.base import Denoiser
from els_service.denoisers.engines.options import MAX_THREADS, EngineDefaults, EngineOptions
from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA
from els_service.denoisers.networks.config import MAX_BUCKET
from els_service.denoisers.pretrained.latent import load_latent
from els_service.denoisers.pretrained.onnx_graph import OnnxDocument
from els_service.denoisers.pretrained.onnx_model import OWN, load_onnx
from els_service.denoisers.pretrained.time_inputs import (
    BETA_SCHEDULES,
    MAX_TIMESTEPS,
    FlowTime,
    TimeInput,
    betas_of,
    timesteps_of,
)
from els_service.denoisers.pretrained.timesteps import Timesteps
from els_service.denoisers.pretrained.unet import UnetOptions, load_unet
from els_service.denoisers.pretrained.weights import Below, Inside
from els_service.errors import LoadError

_Shape = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
_Sigma = Annotated[float, Field(ge=MIN_SIGMA, le=MAX_SIGMA)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Precision = Literal["float32", "bfloat16", "float16"]
_Buckets = list[Annotated[int, Field(ge=1, le=MAX_BUCKET)]]
_Threads = Annotated[int, Field(ge=1, le=MAX_THREADS)]


class _ExecutionSpec(_Spec):
    """Options of the engine; None for those of the server."""

    precision: _Precision | None = None
    buckets: _Buckets = []
    threads: _Threads | None = None
    fallback: bool | None = None


class ExecutionSpec(_ExecutionSpec):
    """Options of the engine of a torch module."""

    engine: Literal["torch", "openvino", "onnxruntime", "compile", "auto"] | None = None


class OnnxExecutionSpec(_ExecutionSpec):
    """Options of the engine of an ONNX graph."""

    engine: Literal["onnxruntime", "openvino", "auto"] | None = None


class _UnetSpec(_Spec):
    """Folder of diffusers, unchanged."""

    folder: str = "."
    """Folder of ``unet`` and ``scheduler``, relative to the model folder."""
    variant: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = ""
    null_label: bool = False
    network: Annotated[str, Field(pattern=r"^[A-Za-z0-9_/-]*$")] = ""
    """Its sub-folder; empty for ``unet`` or else ``transformer``, or the folder itself."""
    shape: _Shape | None = None
    execution: ExecutionSpec = ExecutionSpec()


class DiffusersSpec(_UnetSpec):
    """A ``UNet2DModel`` or ``DiTTransformer2DModel`` of diffusers."""

    kind: Literal["diffusers"]


class LatentSpec(_UnetSpec):
    """A UNet of diffusers over the latents of the folder's ``vae``."""

    kind: Literal["latent"]
    condition_rows: Annotated[int, Field(ge=1, le=4096)] = 77


_LevelForm = Literal["sigma", "log_sigma", "alpha_bar", "time", "timestep", "flow"]
_BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
_Beta = Annotated[float, Field(gt=0, lt=1)]


class OnnxLevelSpec(_Spec):
    """Input of a graph for the noise level."""

    input: str
    given_as: Annotated[_LevelForm, Field(alias="as")] = "sigma"
    range: Annotated[list[_Sigma], Field(min_length=2, max_length=2)] | None = None
    betas: _BetaSchedule | list[_Beta] | None = None
    beta_start: _Beta | None = None
    beta_end: _Beta | None = None
    timesteps: Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)] | None = None
    shift: Annotated[float, Field(gt=0, le=1000)] | None = None

    def time_input(self) -> TimeInput | None:
        """Return the time input of ``timestep`` and ``flow``; None for others.

        Raises:
            ValueError: A field is missing, or does not apply.
        """
        applies = _LEVEL_FIELDS.get(self.given_as, ("range",))
        for name in ("range", "betas", "beta_start", "beta_end", "timesteps", "shift"):
            if getattr(self, name) is not None and name not in applies:
                expected = f"expected none for level.as {self.given_as}"
                raise ValueError(f"level.{name}: {expected}, got {getattr(self, name)!r:.80}")
        if self.given_as == "flow":
            return FlowTime(float(self.timesteps or 1), self.shift or 1.0)
        return self._timesteps() if self.given_as == "timestep" else None

    def _timesteps(self) -> Timesteps:
        if self.betas is None:
            kinds = ", ".join(BETA_SCHEDULES)
            raise ValueError(f"level.betas: expected one of {kinds}, or the numbers, got none")
        betas = self.betas
        if isinstance(betas, str):
            start, end = self.beta_start or 1e-4, self.beta_end or 0.02
            if start > end:
                expected = f"at least {start:g}, the beta_start"
                raise ValueError(f"level.beta_end: expected {expected}, got {end:g}")
            betas = betas_of(betas, self.timesteps or 1000, start, end)
        elif self.beta_start is not None or self.beta_end is not None:
            name = "beta_end" if self.beta_start is None else "beta_start"
            raise ValueError(f"level.{name}: expected none beside the numbers of level.betas")
        elif self.timesteps not in (None, len(betas)):
            raise ValueError(f"level.timesteps: expected {len(betas)}, as many as level.betas")
        try:
            return timesteps_of(betas)
        except ValueError as error:
            raise ValueError(f"level.betas: {error}") from error


_LEVEL_FIELDS = {
    "timestep": ("betas", "beta_start", "beta_end", "timesteps"),
    "flow": ("timesteps", "shift"),
}
"""level.as → fields that apply beside ``input``."""


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
    prediction: Literal["x0", "eps", "v", "flow"] | None = None
    scaling: Literal["exploding", "preserving", "flow"] | None = None
    label: OnnxLabelSpec | None = None
    constants: dict[str, float | list[float]] = {}
    shape: _Shape | None = None
    deterministic: bool = False
    execution: OnnxExecutionSpec = OnnxExecutionSpec()


PretrainedSpec = DiffusersSpec | LatentSpec | OnnxSpec


def load_pretrained(
    spec: PretrainedSpec, inside: Inside, device: str, defaults: EngineDefaults
) -> Denoiser:
    """Return the denoiser of a model folder.

    Args:
        spec: its ``model.yaml``.
        inside: function from a name in the model folder to its path.
        device: device that holds weights; ONNX graphs run on the CPU.
        defaults: engine options of the server.

    Raises:
        LoadError: A file is missing or invalid; names it and the field or tensor.
        ValueError: A field is out of range, or the machine lacks the engine.
        ModuleNotFoundError: The extra of this kind is not installed.
    """
    if isinstance(spec, OnnxSpec):
        return load_onnx(
            _onnx_document(spec), spec.file, inside, _options(spec, defaults, spec.deterministic)
        )
    if Path(spec.folder).is_absolute():
        raise LoadError(spec.folder, "expected a path relative to the model's folder")
    channels, height, width = spec.shape or (0, 0, 0)
    options = UnetOptions(
        network=spec.network,
        shape=(channels, height, width) if spec.shape else None,
        variant=spec.variant,
        null_label=spec.null_label,
        condition_rows=spec.condition_rows if isinstance(spec, LatentSpec) else 0,
        engine=_options(spec, defaults, deterministic=False),
    )
    load = load_latent if isinstance(spec, LatentSpec) else load_unet
    return load(Below(inside, spec.folder), options, device)


def _options(spec: PretrainedSpec, defaults: EngineDefaults, deterministic: bool) -> EngineOptions:
    """Return the options of the document, or else of the server.

    Raises:
        ValueError: Buckets do not increase.
    """
    given = spec.execution
    default = defaults.engine
    if isinstance(spec, OnnxSpec) and default in ("torch", "compile"):
        default = OWN.engine  # torch computes no graphs of ONNX
    buckets = given.buckets
    if any(low >= high for low, high in itertools.pairwise(buckets)):
        raise ValueError(f"execution.buckets: expected increasing numbers, got {buckets}")
    return EngineOptions(
        engine=given.engine or default,
        precision=given.precision or defaults.precision,
        threads=given.threads,
        fallback=defaults.fallback if given.fallback is None else given.fallback,
        deterministic=deterministic,
        buckets=tuple(buckets),
    )


_RANGE = (0.002, 80.0)
"""Trained s/a unless ``level.range`` says another."""
_DEFAULTS = {"timestep": ("eps", "preserving"), "flow": ("flow", "flow")}
"""level.as → prediction and scaling, where they are the usual ones of an export."""


def _onnx_document(spec: OnnxSpec) -> OnnxDocument:
    time_input = spec.level.time_input()
    prediction, scaling = _DEFAULTS.get(spec.level.given_as, ("x0", "exploding"))
    lowest, highest = spec.level.range or _RANGE
    if lowest >= highest:
        raise ValueError(f"level.range: expected two increasing numbers, got {spec.level.range}")
    channels, height, width = spec.shape or (0, 0, 0)
    return OnnxDocument(
        input=spec.input,
        output=spec.output,
        level=spec.level.input,
        level_as=spec.level.given_as,
        time_input=time_input,
        prediction=spec.prediction or prediction,
        scaling=spec.scaling or scaling,
        sigma_range=(lowest, highest),
        label=spec.label.input if spec.label else None,
        label_count=spec.label.count if spec.label else 0,
        constants=spec.constants,
        shape=(channels, height, width) if spec.shape else None,
        deterministic=spec.deterministic,
    )
