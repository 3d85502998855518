"""Source of the models to serve, as the registry expects it."""

from __future__ import annotations

from typing import Protocol

from els_service.denoisers.base import Denoiser


class ModelSource(Protocol):
    """Models to serve, by name and version; calls come from several threads."""

    def __str__(self) -> str:
        """Name of the source in errors."""
        ...

    def __contains__(self, name: str) -> bool:
        """Return whether there is a model of that name; raises as ``names``."""
        ...

    def names(self) -> list[str]:
        """Return the names of all models, sorted.

        Raises:
            LoadError: The source cannot be read.
        """
        ...

    def versions(self, name: str) -> list[int]:
        """Return the versions of a model, ascending; empty if there is no such model.

        Raises:
            LoadError: The versions are ambiguous.
        """
        ...

    def load(self, name: str, version: int, device: str) -> Denoiser:
        """Return the denoiser of a version on a device.

        Raises:
            LoadError: It cannot be loaded.
        """
        ...

    def fingerprint(self, name: str, version: int) -> str:
        """Return SHA-256 (hex) of what a version was last loaded from.

        Raises:
            LoadError: It cannot be read.
        """
        ...
