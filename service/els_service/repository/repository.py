"""Models root: a folder whose children with a ``model.yaml`` are models.

A folder ``NAME/VERSION/model.yaml``, its name a whole number, is a version of the model; a
``model.yaml`` in ``NAME`` itself is version 1.

Loading executes no code from files: YAML is read by the safe loader, tensors come from safetensors,
and every path, with links resolved, is inside the models root.
"""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files as package_files
from pathlib import Path

from els_service.denoisers.base import Denoiser
from els_service.denoisers.engines.options import EngineDefaults
from els_service.denoisers.networks import (
    MODEL_FILE,
    WEIGHTS_FILE,
    NetworkDenoiser,
    load_network,
    parse_network,
)
from els_service.errors import LoadError, shortened
from els_service.repository.bank_cache import BankCache
from els_service.repository.folders import (
    FileState,
    ModelFiles,
    file_state,
    is_model,
    model_folder,
    versions,
)
from els_service.shards.shard import ShardOptions
from els_service.yaml_files import read_yaml


def bundled_models() -> Path:
    """Return the folder of models that ships with the package."""
    return Path(str(package_files("els_service") / "bundled"))


class ModelRepository:
    """Models of a models root.

    A bank is loaded once however many models use it, and unloaded with the last of them. Several
    threads may load at once.

    Args:
        root: folder whose children with a ``model.yaml`` are models.
        implementation: implementation of patch attention, as in ``PatchAttention``.
        engines: engine options of trained networks that do not name theirs.
        shards: settings of banks in shards.
    """

    def __init__(
        self,
        root: Path,
        *,
        implementation: str = "auto",
        engines: EngineDefaults | None = None,
        shards: ShardOptions | None = None,
    ) -> None:
        self._given, self.root = root, Path(os.path.realpath(root))
        self._banks = BankCache(implementation, shards)
        self._engines = engines or EngineDefaults()
        self._sources: dict[tuple[str, int], list[Path]] = {}
        """(Model, version) → files of its last load, without banks and windows."""
        self._digests: dict[Path, tuple[FileState, bytes]] = {}
        """SHA-256 of those files, with the state in which they were read."""

    def __str__(self) -> str:
        return str(self.root)

    def check_is_there(self) -> None:
        """Check that the root exists; it may be unreadable, or not a folder.

        Raises:
            LoadError: It does not exist: its name is wrong, as an empty volume would exist.
        """
        try:
            self._given.lstat()
        except FileNotFoundError as error:
            raise LoadError(self.root, "expected a folder of models, found nothing") from error
        except OSError:
            # It exists but is not accessible now; ``names`` reports why.
            return

    def names(self) -> list[str]:
        """Return the names of all model folders, sorted, without names that are not printable.

        Raises:
            LoadError: The root is not a folder, or cannot be read.
        """
        return sorted(name for name in self._children() if is_model(self.root / name))

    def __contains__(self, name: str) -> bool:
        """Return whether ``names`` has a name; reads only that folder.

        Raises:
            LoadError: As ``names``.
        """
        # Compared with a listing, so that no path or other spelling from a caller is opened.
        return name in self._children() and is_model(self.root / name)

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model, ascending; empty if there is no such model.

        Raises:
            LoadError: Two folders have the same version.
        """
        found = [version for version, _ in versions(self.root / name)]
        if len(set(found)) < len(found):
            raise LoadError(self.root / name, "expected each version once, got two model.yaml")
        return sorted(found)

    def load(self, name: str, version: int = 1, device: str = "cpu") -> Denoiser:
        """Return the denoiser of a model folder.

        Args:
            name: one of ``names``.
            version: one of ``versions``.
            device: device that holds bank or weights.

        Raises:
            LoadError: A file is missing, malformed, of an unknown format version, or outside the
                root.
        """
        folder = dict(versions(self.root / name)).get(version, self.root / name)
        files = ModelFiles(folder, self.root)
        denoiser = _load(files, self._banks, device, self._engines)
        self._sources[name, version] = files.named
        return denoiser

    def fingerprint(self, name: str, version: int = 1) -> str:
        """Return SHA-256 (hex) of the files of a version's last load.

        These are ``model.yaml`` and the weights and statistics that it names, without banks and
        calibrated windows, which are in the denoiser's ``info``.

        Raises:
            LoadError: A file no longer exists or cannot be read.
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

    def _digest(self, path: Path) -> bytes:
        """Return SHA-256 of a file; an unchanged file is read once."""
        state = file_state(path)
        known, digest = self._digests.get(path, (None, b""))
        if known != state:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            self._digests[path] = state, digest
        return digest


def load_network_folder(folder: Path, device: str = "cpu") -> NetworkDenoiser:
    """Return the denoiser of a model folder of ``kind: network``, given by its path.

    Args:
        folder: folder of the model or of one of its versions.
        device: device that holds the weights.

    Raises:
        LoadError: The model has another kind, or as ``ModelRepository.load``.
    """
    files = ModelFiles(folder, model_folder(folder).parent)
    path = files.find(MODEL_FILE)
    content = read_yaml(path)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != "network":
        raise LoadError(path, f"kind: expected network, got {shortened(str(kind))}")
    denoiser = _load(files, BankCache(), device, EngineDefaults())
    assert isinstance(denoiser, NetworkDenoiser)
    return denoiser


def _load(files: ModelFiles, banks: BankCache, device: str, engines: EngineDefaults) -> Denoiser:
    path = files(MODEL_FILE)
    content = read_yaml(path)
    try:
        if isinstance(content, dict) and content.get("kind") == "network":
            document = parse_network(content, path, engines)
            return load_network(document, files(WEIGHTS_FILE), device)
        # Local import: networks are loaded without pydantic.
        from els_service.repository.builders import build
        from els_service.repository.specs import parse_spec

        return build(parse_spec(content, path), files, banks, device, engines)
    except LoadError:
        raise
    except ModuleNotFoundError as error:
        expected = "expected an installation with the extra of this kind of model"
        raise LoadError(path, f"kind: {expected}, got no module {error.name}") from error
    except Exception as error:
        # The file system, safetensors and torch raise errors of many classes.
        raise LoadError(path, " ".join(str(error).split())) from error
