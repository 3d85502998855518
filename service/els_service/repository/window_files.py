"""Tables in model folders: windows, folds and thresholds by noise level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from els_service.denoisers.fold_levels import FoldTable
from els_service.denoisers.pca_masks import ThresholdTable
from els_service.denoisers.windows import WindowTable
from els_service.errors import LoadError
from els_service.yaml_files import read_yaml


def read_windows(path: Path) -> WindowTable:
    """Return the table of a file.

    Raises:
        LoadError: The file cannot be read, or is not a table of odd windows by increasing level.
    """
    content = _mapping(path, "windows", ("sigma", "k"))
    if not _is_list_of(content["sigma"], (int, float)):
        raise LoadError(path, f"expected windows: sigma: a list of numbers, got {content['sigma']}")
    if not _is_list_of(content["k"], int):
        raise LoadError(path, f"expected windows: k: a list of whole numbers, got {content['k']}")
    try:
        return WindowTable(tuple(map(float, content["sigma"])), tuple(content["k"]))
    except (ValueError, OverflowError) as error:
        raise LoadError(path, f"expected windows: {error}") from error


def read_folds(path: Path) -> FoldTable:
    """Return the table of windows and folds of a file.

    Raises:
        LoadError: The file cannot be read, or is no such table.
    """
    content = _mapping(path, "folds", ("sigma", "k", "rho"))
    for name, kind in (("sigma", (int, float)), ("k", (int,)), ("rho", (int, float))):
        if not _is_list_of(content[name], kind):
            raise LoadError(path, f"expected folds: {name}: numbers, got {content[name]}")
    sigma, rho = (tuple(map(float, content[name])) for name in ("sigma", "rho"))
    try:
        return FoldTable(sigma, tuple(content["k"]), rho)
    except (ValueError, OverflowError) as error:
        raise LoadError(path, f"expected folds: {error}") from error


def read_thresholds(path: Path) -> ThresholdTable:
    """Return the table of thresholds of a file.

    Raises:
        LoadError: The file cannot be read, or is no such table.
    """
    content = _mapping(path, "thresholds", ("sigma", "tau"))
    for name in ("sigma", "tau"):
        if not _is_list_of(content[name], (int, float)):
            raise LoadError(path, f"expected thresholds: {name}: numbers, got {content[name]}")
    sigma, tau = (tuple(map(float, content[name])) for name in ("sigma", "tau"))
    try:
        return ThresholdTable(sigma, tau)
    except (ValueError, OverflowError) as error:
        raise LoadError(path, f"expected thresholds: {error}") from error


def _mapping(path: Path, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of a file with these keys."""
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != set(names):
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        keys = ", ".join(names[:-1]) + f" and {names[-1]}"
        raise LoadError(path, f"expected {what}, a mapping of {keys}, got {got or 'nothing'}")
    return content


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
