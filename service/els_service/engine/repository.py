"""Model folders: ``NAME/model.yaml`` with banks and tables beside it, turned into denoisers.

Nothing here can execute code: YAML is read by the safe loader, tensors come from safetensors, and
every path, links resolved, stays inside the models root.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from els_kernels import PatchAttention
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank, load_bank
from els_service.denoisers.base import Denoiser
from els_service.denoisers.closed_forms import GaussianDenoiser, WienerDenoiser
from els_service.denoisers.windows import WindowTable
from els_service.documents import read_yaml, validate
from els_service.errors import LoadError

CALIBRATED = "windows.yaml"
"""A table {sigma, k} in a model's folder, which ``window: auto`` takes."""
_LARGEST = 1 << 29
"""Numbers of an image that the largest legal message can hold."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schedule: Literal["cosine"] = "cosine"


class WindowSpec(BaseModel):
    """Windows by noise level, see ``WindowTable``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sigma: list[float]
    k: list[int]


class AnalyticSpec(_Spec):
    """A machine over a bank."""

    kind: Literal["analytic"]
    machine: Literal["ideal", "local", "equivariant", "els"]
    padding: Literal["zeros", "circular", "valid"] = "zeros"
    bank: str
    window: int | Literal["auto"] | WindowSpec = "auto"


class GaussianSpec(_Spec):
    """A Gaussian prior; ``mean`` and ``variance`` are numbers, one a channel, or a file."""

    kind: Literal["gaussian"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    mean: float | list[float] | str
    variance: float | list[float] | str


class WienerSpec(_Spec):
    """The linear denoiser of a bank."""

    kind: Literal["wiener"]
    bank: str


Spec = AnalyticSpec | GaussianSpec | WienerSpec
_SPEC: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="kind")])

_WINDOWS = TypeAdapter(WindowSpec)


class ModelRepository:
    """The models root: says which models there are and loads them; banks are loaded once.

    Args:
        root: folder whose children with a ``model.yaml`` are models.
        implementation: of patch attention, as in ``PatchAttention``.
        device: where banks are held.
    """

    def __init__(self, root: Path, *, implementation: str = "auto", device: str = "cpu") -> None:
        self.root = root.resolve()
        self._implementation, self._device = implementation, device
        self._banks: dict[Path, Bank] = {}
        self._attentions: dict[Path, PatchAttention] = {}

    def names(self) -> list[str]:
        """Return the names of all model folders, sorted.

        Raises:
            LoadError: The root is no folder.
        """
        if not self.root.is_dir():
            raise LoadError(self.root, "expected a folder of models")
        return sorted(
            child.name
            for child in self.root.iterdir()
            if not child.name.startswith(("_", ".")) and _is_there(child / "model.yaml")
        )

    def load(self, name: str) -> Denoiser:
        """Return the denoiser of a model folder.

        Raises:
            LoadError: A file is missing, malformed, of a wrong version, or outside the root.
        """
        folder = self.root / name
        path = self._inside(folder, "model.yaml")
        spec = validate(_SPEC, read_yaml(path), path)
        try:
            return self._build(folder, spec)
        except LoadError:
            raise
        except Exception as error:
            # The file system, safetensors and torch each refuse in their own ways.
            raise LoadError(path, " ".join(str(error).split())) from error

    def _build(self, folder: Path, spec: Spec) -> Denoiser:
        match spec:
            case AnalyticSpec():
                path = self._inside(folder, spec.bank)
                return AnalyticDenoiser(
                    self._attention(path),
                    self._bank(path),
                    machine=spec.machine,
                    padding=spec.padding,
                    window=self._window(folder, spec.window),
                    clip=spec.window == "auto",
                )
            case GaussianSpec():
                channels, height, width = spec.shape
                if (numbers := math.prod(spec.shape)) > _LARGEST:
                    raise ValueError(f"shape: expected at most {_LARGEST} numbers, got {numbers}")
                return GaussianDenoiser(
                    (channels, height, width),
                    self._statistic(folder, "mean", spec.mean),
                    self._statistic(folder, "variance", spec.variance),
                )
            case WienerSpec():
                return WienerDenoiser(self._bank(self._inside(folder, spec.bank)))

    def _bank(self, path: Path) -> Bank:
        if path not in self._banks:
            self._banks[path] = load_bank(path)
        return self._banks[path]

    def _attention(self, path: Path) -> PatchAttention:
        if path not in self._attentions:
            pixels = self._bank(path).pixels().to(self._device)
            self._attentions[path] = PatchAttention(pixels, implementation=self._implementation)
        return self._attentions[path]

    def _window(self, folder: Path, window: int | str | WindowSpec) -> WindowTable | None:
        if isinstance(window, int):
            return WindowTable.constant(window)
        if isinstance(window, WindowSpec):
            return WindowTable(tuple(window.sigma), tuple(window.k))
        if not (folder / CALIBRATED).exists():
            return None
        path = self._inside(folder, CALIBRATED)
        table = validate(_WINDOWS, read_yaml(path), path)
        try:
            return WindowTable(tuple(table.sigma), tuple(table.k))
        except ValueError as error:
            raise LoadError(path, str(error)) from error

    def _statistic(self, folder: Path, name: str, value: float | list[float] | str) -> Tensor:
        if isinstance(value, list):
            return torch.tensor(value, dtype=torch.float64)[:, None, None]
        if not isinstance(value, str):
            return torch.tensor(value, dtype=torch.float64)
        path = self._inside(folder, value)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LoadError(path, f"expected a safetensors file, got {error}") from error
        if name not in tensors:
            raise LoadError(path, f"expected a tensor {name!r}, got {sorted(tensors)}")
        return tensors[name]

    def _inside(self, folder: Path, relative: str) -> Path:
        if Path(relative).is_absolute():
            raise LoadError(relative, "expected a path relative to the model's folder")
        try:
            path = (folder / relative).resolve()
        except (OSError, RuntimeError) as error:
            raise LoadError(folder / relative, "expected a file, found a loop of links") from error
        if not path.is_relative_to(self.root):
            raise LoadError(path, f"expected a file inside the models root {self.root}")
        if not path.is_file():
            raise LoadError(path, "expected a file, found none")
        return path


def _is_there(path: Path) -> bool:
    # A link to nowhere is a model that is refused, not one that is overlooked.
    return path.exists() or path.is_symlink()
