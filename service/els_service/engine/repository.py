"""Model folders, ``NAME/model.yaml`` with banks and tables, and denoisers built from them.

A folder ``NAME/VERSION/model.yaml``, its name a whole number, is a version of the model; a
``model.yaml`` right in ``NAME`` is version 1.

Nothing here can execute code: YAML is read by the safe loader, tensors come from safetensors, and
every path, links resolved, stays inside the models root.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal
from weakref import WeakValueDictionary

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
from els_service.denoisers.networks import WEIGHTS_FILE, load_network, parse_network
from els_service.denoisers.pretrained.weights import Inside
from els_service.denoisers.windows import WindowTable
from els_service.engine.pretrained_specs import (
    DiffusersSpec,
    LatentSpec,
    OnnxSpec,
    PretrainedSpec,
    load_pretrained,
)
from els_service.errors import LoadError
from els_service.yaml_files import read_yaml, validate

CALIBRATED = "windows.yaml"
"""A table {sigma, k} in a model's folder, which ``window: auto`` takes."""
_FILE_SYSTEMS_OWN = "lost+found"
"""On a volume of its own; nobody but root may read it."""
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


class NetworkSpec(_Spec):
    """A trained network; ``parse_network`` checks the fields, as it must where pydantic is not."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["network"]


Spec = AnalyticSpec | GaussianSpec | WienerSpec | NetworkSpec | PretrainedSpec
_SPEC: TypeAdapter[Spec] = TypeAdapter(Annotated[Spec, Field(discriminator="kind")])

_WINDOWS = TypeAdapter(WindowSpec)


_FileState = tuple[Path, int, int, int]
"""Path, number, time of change and size: another state is another content."""


class ModelRepository:
    """The models root: says which models there are and loads them.

    A bank is held once, however many models stand on it, for as long as one does. Several threads
    may load at once; of one bank the first loads it, and the others wait for that.

    Args:
        root: folder whose children with a ``model.yaml`` are models.
        implementation: of patch attention, as in ``PatchAttention``.
    """

    def __init__(self, root: Path, *, implementation: str = "auto") -> None:
        self._given, self.root = root, Path(os.path.realpath(root))
        self._implementation = implementation
        self._locks: WeakValueDictionary[_FileState, Lock] = WeakValueDictionary()
        """Of banks that are being loaded."""
        self._banks: WeakValueDictionary[_FileState, Bank] = WeakValueDictionary()
        self._attentions: WeakValueDictionary[tuple[_FileState, str], PatchAttention] = (
            WeakValueDictionary()
        )
        self._sources: dict[tuple[str, int], list[Path]] = {}
        """The files that versions of models were loaded from last, but for banks and windows."""
        self._digests: dict[Path, tuple[_FileState, bytes]] = {}
        """SHA-256 of those files, as they were when they were read last."""

    def check_is_there(self) -> None:
        """Return if there is something, even if it is no folder or cannot be read now.

        Raises:
            LoadError: There is nothing: a name that is wrong, rather than a volume that is empty.
        """
        try:
            self._given.lstat()
        except FileNotFoundError as error:
            raise LoadError(self.root, "expected a folder of models, found nothing") from error
        except OSError:
            # There, but not to be had at the moment; whoever reads it says why.
            return

    def names(self) -> list[str]:
        """Return the names of all model folders, sorted; a name that cannot be printed is none.

        Raises:
            LoadError: The root is no folder, or one that cannot be read.
        """
        return sorted(name for name in self._children() if _is_model(self.root / name))

    def __contains__(self, name: str) -> bool:
        """Return whether ``names`` has a name; looks into that one folder alone.

        Raises:
            LoadError: As ``names``.
        """
        # Listed, so that no path or odd spelling that a caller sends is looked up as a file.
        return name in self._children() and _is_model(self.root / name)

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model, ascending; none where there is no such model.

        Raises:
            LoadError: Two folders claim the same version.
        """
        found = [version for version, _ in _versions(self.root / name)]
        if len(set(found)) < len(found):
            raise LoadError(self.root / name, "expected each version once, got two model.yaml")
        return sorted(found)

    def load(self, name: str, version: int = 1, device: str = "cpu") -> Denoiser:
        """Return the denoiser of a model folder.

        Args:
            name: one of ``names``.
            version: one of ``versions``.
            device: where bank or weights are held.

        Raises:
            LoadError: A file is missing, malformed, of a wrong version, or outside the root.
        """
        folder = dict(_versions(self.root / name)).get(version, self.root / name)
        path = self._inside(folder, "model.yaml")
        spec = validate(_SPEC, read_yaml(path), path)
        try:
            files = self._sources[name, version] = [path]
            return self._build(folder, spec, device, files)
        except LoadError:
            raise
        except ModuleNotFoundError as error:
            expected = "expected an installation with the extra of this kind of model"
            raise LoadError(path, f"kind: {expected}, got no module {error.name}") from error
        except Exception as error:
            # The file system, safetensors and torch each refuse in their own ways.
            raise LoadError(path, " ".join(str(error).split())) from error

    def fingerprint(self, name: str, version: int = 1) -> str:
        """Return SHA-256 (hex) over the files that a version was loaded from last.

        That is ``model.yaml`` and what it names of weights and statistics; banks and calibrated
        windows are left out, as a denoiser's ``info`` tells them.

        Raises:
            LoadError: A file is gone, or cannot be read any more.
        """
        digest = hashlib.sha256()
        for path in self._sources.get((name, version), ()):
            try:
                digest.update(self._digest(path))
            except OSError as error:
                raise LoadError(path, f"expected a file, got {error}") from error
        return digest.hexdigest()

    def _children(self) -> list[str]:
        try:
            return os.listdir(self.root)
        except OSError as error:
            expected = "expected a folder of models that can be read"
            raise LoadError(self.root, f"{expected}, got {error.strerror}") from error

    def _build(self, folder: Path, spec: Spec, device: str, files: list[Path]) -> Denoiser:
        inside = _ModelFolder(self, folder, files)
        match spec:
            case AnalyticSpec():
                path = self._inside(folder, spec.bank)
                with self._alone(path):
                    bank = self._bank(path)
                    attention = self._attention(path, bank, device)
                return AnalyticDenoiser(
                    attention,
                    bank,
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
                    self._statistic(inside, "mean", spec.mean),
                    self._statistic(inside, "variance", spec.variance),
                )
            case WienerSpec():
                path = self._inside(folder, spec.bank)
                with self._alone(path):
                    bank = self._bank(path)
                return WienerDenoiser(bank)
            case NetworkSpec():
                document = parse_network(spec.model_dump(), folder / "model.yaml")
                return load_network(document, inside(WEIGHTS_FILE), device)
            case DiffusersSpec() | LatentSpec() | OnnxSpec():
                return load_pretrained(spec, inside, device)

    def _digest(self, path: Path) -> bytes:
        """Return SHA-256 of a file; what has not changed is read once."""
        state = _state(path)
        known, digest = self._digests.get(path, (None, b""))
        if known != state:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            self._digests[path] = state, digest
        return digest

    def _alone(self, path: Path) -> Lock:
        """Return the lock of a bank's file: two threads must not both read it."""
        return self._locks.setdefault(_state(path), Lock())

    def _bank(self, path: Path) -> Bank:
        key = _state(path)
        bank = self._banks.get(key)
        if bank is None:
            bank = self._banks[key] = load_bank(path)
        return bank

    def _attention(self, path: Path, bank: Bank, device: str) -> PatchAttention:
        key = _state(path), device
        attention = self._attentions.get(key)
        if attention is None:
            pixels = bank.pixels().to(device)
            attention = PatchAttention(pixels, implementation=self._implementation)
            self._attentions[key] = attention
        return attention

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

    def _statistic(self, inside: Inside, name: str, value: float | list[float] | str) -> Tensor:
        if isinstance(value, list):
            return torch.tensor(value, dtype=torch.float64)[:, None, None]
        if not isinstance(value, str):
            return torch.tensor(value, dtype=torch.float64)
        path = inside(value)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LoadError(path, f"expected a safetensors file, got {error}") from error
        if name not in tensors:
            raise LoadError(path, f"expected a tensor {name!r}, got {sorted(tensors)}")
        return tensors[name]

    def _inside(self, folder: Path, relative: str) -> Path:
        """Return a file of a model folder; raises LoadError if it is outside the root."""
        if Path(relative).is_absolute():
            raise LoadError(relative, "expected a path relative to the model's folder")
        try:
            path = (folder / relative).resolve()
            if not path.is_relative_to(self.root):
                raise LoadError(path, f"expected a file inside the models root {self.root}")
            if not path.is_file():
                raise LoadError(path, "expected a file, found none")
        except (OSError, RuntimeError) as error:
            # A link to itself, a name too long, a folder that may not be read.
            raise LoadError(folder / relative, f"expected a file, got {error}") from error
        return path


@dataclass(frozen=True)
class _ModelFolder:
    """Resolver of names in a model folder, which notes the files that were read."""

    repository: ModelRepository
    folder: Path
    files: list[Path]

    def __call__(self, name: str) -> Path:
        """Return the path of a file; see ``Inside``."""
        self.files.append(self.repository._inside(self.folder, name))
        return self.files[-1]

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; see ``Inside``."""
        try:
            path = (self.folder / folder).resolve()
            inside = path.is_relative_to(self.repository.root)
            return sorted(os.listdir(path)) if inside else []
        except (OSError, RuntimeError):
            return []  # no such folder; the file that is missing is named


def _is_model(folder: Path) -> bool:
    """Return whether a child of the root is a model, even if it is one that will be refused."""
    name = folder.name
    return (
        not name.startswith(("_", "."))
        and name != _FILE_SYSTEMS_OWN
        # Others, such as names that are no UTF-8, could not be told to a caller.
        and name.isprintable()
        and bool(_versions(folder))
    )


def _versions(folder: Path) -> list[tuple[int, Path]]:
    """Return each version of a model with its folder."""
    found = [(1, folder)] if _is_there(folder / "model.yaml") else []
    # A folder that may not be read is a model that is refused.
    with contextlib.suppress(OSError):
        if folder.is_dir():
            numbered = [child for child in folder.iterdir() if child.name.isdecimal()]
            versions = [child for child in numbered if _is_there(child / "model.yaml")]
            found += [(int(child.name), child) for child in versions]
    return found


def _state(path: Path) -> _FileState:
    status = path.stat()
    return path, status.st_ino, status.st_mtime_ns, status.st_size


def _is_there(path: Path) -> bool:
    # A link to nowhere is a model that is refused, not one that is overlooked.
    try:
        return path.exists() or path.is_symlink()
    except OSError:
        return True
