"""Extension of griffe: ``Example:`` of a docstring is a section of code, as ``Examples:`` is."""

from __future__ import annotations

import re
from typing import Any

import griffe


class CodeOfExamples(griffe.Extension):
    """Renames the section before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring:
            value = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", value, flags=re.MULTILINE)
