"""Layout of model folders: versions on disk, and files that stay inside the models root."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from els_service.denoisers.bank_parts import MANIFEST
from els_service.denoisers.networks.folder import MODEL_FILE, pickle_hint
from els_service.errors import LoadError

WINDOWS_FILE = "windows.yaml"
FOLDS_FILE = "folds.yaml"
THRESHOLDS_FILE = "thresholds.yaml"
"""Table {sigma, k} in a model folder, used by ``window: auto`` before ``PUBLISHED``."""
_FILE_SYSTEM_FOLDER = "lost+found"
"""Present on a volume of its own; only root may read it."""

FileState = tuple[Path, int, int, int]
"""Path, inode, time of change and size; the content of a file changes only with its state."""


class ModelFiles:
    """Files of one model folder.

    Args:
        folder: folder of the model or version.
        root: resolved models root, which contains all files that a model may name.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self._root = folder, root
        self.named: list[Path] = []
        """Files that were resolved by a call, in order."""

    def __call__(self, name: str) -> Path:
        """Return the path of a file as ``find`` does, and add it to ``named``."""
        path = self.find(name)
        self.named.append(path)
        return path

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder of the model folder, sorted; none if it is no folder."""
        try:
            path = (self.folder / folder).resolve()
            return sorted(os.listdir(path)) if path.is_relative_to(self._root) else []
        except (OSError, RuntimeError):
            return []  # the error of the missing file names it

    def find(self, relative: str) -> Path:
        """Return the resolved path of a file, given relative to the model folder.

        Raises:
            LoadError: The path is absolute, outside the root, or not that of a file.
        """
        if Path(relative).is_absolute():
            raise LoadError(relative, "expected a path relative to the model's folder")
        try:
            path = (self.folder / relative).resolve()
            if not path.is_relative_to(self._root):
                raise LoadError(path, f"expected a file inside the models root {self._root}")
            if not path.is_file():
                raise LoadError(path, f"expected a file, found none{pickle_hint(path)}")
        except (OSError, RuntimeError) as error:
            # A link to itself, a name that is too long, or a folder without permission.
            raise LoadError(self.folder / relative, f"expected a file, got {error}") from error
        return path

    def find_bank(self, relative: str) -> Path:
        """Return the path of a bank file, or of the manifest of a folder; raises as ``find``."""
        try:
            in_parts = (self.folder / relative / MANIFEST).exists()
        except (OSError, ValueError):
            in_parts = False  # the error of ``find`` names the file
        return self.find(f"{relative}/{MANIFEST}" if in_parts else relative)


def is_model(folder: Path) -> bool:
    """Return whether a child of the models root is a model; its content may be invalid."""
    name = folder.name
    return (
        not name.startswith(("_", "."))
        and name != _FILE_SYSTEM_FOLDER
        # Other names, such as those that are not UTF-8, cannot be sent to a caller.
        and name.isprintable()
        and bool(versions(folder))
    )


def versions(folder: Path) -> list[tuple[int, Path]]:
    """Return each version of a model with its folder; ``model.yaml`` in ``folder`` is version 1."""
    found = [(1, folder)] if _exists(folder / MODEL_FILE) else []
    # A folder without permission is an invalid model.
    with contextlib.suppress(OSError):
        if folder.is_dir():
            numbered = [child for child in folder.iterdir() if child.name.isdecimal()]
            found += [(int(child.name), child) for child in numbered if _exists(child / MODEL_FILE)]
    return found


def newest_version(folder: Path) -> Path:
    """Return the folder of a model's newest version; ``folder`` itself if it has no versions."""
    return max(versions(folder), default=(0, folder))[1]


def model_folder(folder: Path) -> Path:
    """Return the resolved folder of a model, given that of the model or of one of its versions."""
    folder = folder.resolve()
    return folder.parent if folder.name.isdecimal() else folder


def file_state(path: Path) -> FileState:
    """Return the state of a file.

    Raises:
        OSError: It cannot be read.
    """
    status = path.stat()
    return path, status.st_ino, status.st_mtime_ns, status.st_size


def _exists(path: Path) -> bool:
    # A broken link is an invalid model, which is reported, not a folder without a model.
    try:
        return path.exists() or path.is_symlink()
    except OSError:
        return True
