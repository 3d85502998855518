"""Values of parsed JSON: checks of their types, and their form in errors."""

from __future__ import annotations

import json
from typing import Any

from els_service.errors import InvalidArgumentError, printable, shortened

_REPORTED = 100
"""Maximum characters of a value in an error."""


def as_object(value: Any, field: str) -> dict[str, Any]:
    """Return a JSON object; an absent one is empty.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgumentError(field, "an object", kind_of(value))
    return value


def as_list(value: Any, field: str) -> list[Any]:
    """Return a JSON array; an absent one is empty.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgumentError(field, "an array", kind_of(value))
    return value


def as_text(value: Any, field: str) -> str:
    """Return a JSON string; an absent one is empty.

    Raises:
        InvalidArgumentError: It is something else, or no valid Unicode.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidArgumentError(field, "a string", kind_of(value))
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidArgumentError(field, "Unicode text", "a lone surrogate")
    return value


def kind_of(value: Any) -> str:
    """Return a JSON value as it was written, or its kind if that is long; for errors."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = value[:_REPORTED] if isinstance(value, str) else value
    return shortened(printable(json.dumps(text, ensure_ascii=False)), _REPORTED)
