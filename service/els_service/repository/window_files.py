"""Tables of windows in model folders: ``{sigma: [...], k: [...]}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from els_service.denoisers.windows import WindowTable
from els_service.errors import LoadError
from els_service.yaml_files import read_yaml


def read_windows(path: Path) -> WindowTable:
    """Return the table of a file.

    Raises:
        LoadError: The file cannot be read, or is not a table of odd windows by increasing level.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or set(content) != {"sigma", "k"}:
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise LoadError(path, f"expected windows, a mapping of sigma and k, got {got or 'nothing'}")
    if not _is_list_of(content["sigma"], (int, float)):
        raise LoadError(path, f"expected windows: sigma: a list of numbers, got {content['sigma']}")
    if not _is_list_of(content["k"], int):
        raise LoadError(path, f"expected windows: k: a list of whole numbers, got {content['k']}")
    try:
        return WindowTable(tuple(map(float, content["sigma"])), tuple(content["k"]))
    except (ValueError, OverflowError) as error:
        raise LoadError(path, f"expected windows: {error}") from error


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )
