"""Schemas of ``model.yaml`` for every kind but ``network``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from els_service.denoisers.folded import LEAST_FOLD, MAX_SIDE
from els_service.denoisers.picture import MAX_PICTURE_SIDE
from els_service.denoisers.pyramids import MAX_SCALES
from els_service.denoisers.smoothed import MAX_DRAWS
from els_service.repository.pretrained_specs import PretrainedSpec
from els_service.yaml_files import validate

MAX_PICTURES = 16
"""Largest number of pictures of a model of kind ``picture``."""
MAX_SHARDS = 1024
"""Largest number of shards of a bank, if it has as many blocks."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schedule: Literal["cosine"] = "cosine"


class WindowSpec(BaseModel):
    """Windows by noise level, see ``WindowTable``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sigma: list[float]
    k: list[int]


Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class SizesSpec(BaseModel):
    """Smallest and largest height and width of queries."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    height: Annotated[list[Side], Field(min_length=2, max_length=2)]
    width: Annotated[list[Side], Field(min_length=2, max_length=2)]


class AnalyticSpec(_Spec):
    """An analytic machine."""

    kind: Literal["analytic"]
    machine: Literal["ideal", "local", "equivariant", "els"]
    padding: Literal["zeros", "circular", "valid", "inside"] = "zeros"
    bank: str
    window: int | Literal["auto", "fashion-mnist-resnet"] | WindowSpec = "auto"
    fold: float | Literal["inf", "uniform", "auto"] = 0.0
    sizes: Literal["any"] | SizesSpec | None = None
    shards: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_SHARDS)] | None = None
    engine: Literal["local", "ray"] | None = None


class PictureSpec(_Spec):
    """The patches of a few pictures, at the scales of a pyramid."""

    kind: Literal["picture"]
    pictures: Annotated[list[str], Field(min_length=1, max_length=MAX_PICTURES)]
    patch: Annotated[int, Field(ge=3, le=63)] = 9
    scales: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_SCALES)] = "auto"
    coarsest: Literal["auto"] | Annotated[int, Field(ge=3)] = "auto"
    finest: Annotated[int, Field(ge=3, le=MAX_PICTURE_SIDE)] = 192
    fold: Annotated[float, Field(ge=LEAST_FOLD)] | Literal["inf", "uniform"] = 0.2
    steps: Annotated[int, Field(ge=2, le=1000)] = 10
    sources: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0
    source: str = ""
    licence: str = ""


class GaussianSpec(_Spec):
    """A Gaussian prior; ``mean`` and ``variance`` are a number, one per channel, or a file."""

    kind: Literal["gaussian"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    mean: float | list[float] | str
    variance: float | list[float] | str


class WienerSpec(_Spec):
    """The linear denoiser of a bank."""

    kind: Literal["wiener"]
    bank: str


class ThresholdSpec(BaseModel):
    """Thresholds by noise level, see ``ThresholdTable``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sigma: list[float]
    tau: list[float]


class PcaSpec(_Spec):
    """PCA-locality over a bank."""

    kind: Literal["pca"]
    bank: str
    rule: Literal["correlation", "released"] = "correlation"
    threshold: float | Literal["auto"] | ThresholdSpec = "auto"
    covariance: Literal["label", "all"] = "label"


class SmoothedSpec(_Spec):
    """The ideal machine of a bank with a smoothed score."""

    kind: Literal["smoothed"]
    bank: str
    smoothing: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    draws: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 16
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0


class _NetworkSpec(BaseModel):
    """Lists the kind in errors; ``parse_network`` validates the document without pydantic."""

    kind: Literal["network"]


_ClosedForm = GaussianSpec | PcaSpec | SmoothedSpec | WienerSpec
Spec = AnalyticSpec | PictureSpec | _ClosedForm | PretrainedSpec
_SPEC: TypeAdapter[Spec | _NetworkSpec] = TypeAdapter(
    Annotated[Spec | _NetworkSpec, Field(discriminator="kind")]
)


def parse_spec(content: Any, source: Path) -> Spec:
    """Return the content of a ``model.yaml``, validated.

    Raises:
        LoadError: A field is missing, unknown or out of range, or the kind is ``network``.
    """
    spec = validate(_SPEC, content, source)
    assert not isinstance(spec, _NetworkSpec)
    return spec
