"""YAML documents read safely, and their faults told in one line."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from els_service.errors import LoadError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_T = TypeVar("_T")

# Aliases let a short document stand for an endless one.
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel = 2


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        LoadError: The file cannot be read or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise LoadError(path, f"expected a readable file, got {error.strerror}") from error
    except Exception as error:
        # Malformed scalars and deep nesting: ValueError, KeyError, AttributeError, RecursionError …
        raise LoadError(path, f"expected YAML, got {' '.join(str(error).split())}") from error


def validate(adapter: TypeAdapter[_T], content: Any, source: object, *, secret: bool = False) -> _T:
    """Return the content as the adapter's type; a ``secret`` one is not shown in errors.

    Raises:
        LoadError: It does not fit; names ``source`` and every fault.
    """
    # Here, because training and comparison read YAML where there is no pydantic.
    from pydantic import ValidationError

    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc'])) or 'document'}: {fault['msg'].lower()}"
            + ("" if secret else f", got {_BRIEF.repr(fault['input'])}")
            for fault in error.errors()
        )
        raise LoadError(source, "; ".join(faults)) from (None if secret else error)
