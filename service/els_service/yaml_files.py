"""Safe reader of YAML documents, with errors of one line.

A short document can expand to a huge one, as an alias of a few bytes repeats any node. So the size
of a document with its aliases expanded is checked before it is constructed.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from els_service.errors import LoadError, shortened

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_T = TypeVar("_T")

MAX_BYTES = 1 << 20
"""Maximum size of a document in bytes."""
_LARGEST = 2 * MAX_BYTES
"""Maximum values and characters of a document with aliases expanded; more than ``MAX_BYTES`` allows
without aliases."""
_LONGEST_SCALAR = 1 << 16
"""Maximum characters of one value: parsing a number of a megabyte takes minutes."""
_FAULTS = 20
"""Maximum faults of a document in an error."""

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel = 2


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file of at most ``MAX_BYTES``.

    Raises:
        LoadError: The file cannot be read, is not YAML, or is too large, with aliases expanded.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise LoadError(path, f"expected a readable file, got {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise LoadError(path, f"expected at most {MAX_BYTES} bytes, got more")
    try:
        return _parse(data)
    except Exception as error:
        # Malformed scalars and deep nesting: ValueError, KeyError, AttributeError, RecursionError …
        fault = " ".join(str(error)[:_LONGEST_SCALAR].split())
        raise LoadError(path, f"expected YAML, got {fault}") from error


def _parse(data: bytes) -> Any:
    loader = yaml.SafeLoader(data)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _Sizes().of(node)) > _LARGEST:
            raise ValueError(
                f"{size} values and characters with aliases expanded; {_LARGEST} are allowed"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Sizes:
    """Sizes of nodes with aliases expanded; each node is visited once."""

    def __init__(self) -> None:
        self._known: dict[yaml.Node, int | None] = {}

    def of(self, node: yaml.Node) -> int:
        """Return the number of values and characters of a node.

        Raises:
            ValueError: The node contains itself, or a value that is too long.
        """
        known = self._known.get(node, 0)
        if known is None:
            raise ValueError("an alias of a node that contains it")
        if not known:
            self._known[node] = None
            known = self._known[node] = 1 + self._inside(node)
        return known

    def _inside(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > _LONGEST_SCALAR:
                got = f"a value of {len(node.value)} characters"
                raise ValueError(f"{got}; {_LONGEST_SCALAR} are allowed")
            return len(node.value)
        if isinstance(node, yaml.MappingNode):
            return sum(self.of(key) + self.of(value) for key, value in node.value)
        return sum(map(self.of, node.value))


def validate(adapter: TypeAdapter[_T], content: Any, source: object, *, secret: bool = False) -> _T:
    """Return the content as the adapter's type; ``secret`` content is not shown in errors.

    Raises:
        LoadError: The content is invalid; names ``source`` and the first faults.
    """
    # Local import: training and comparison read YAML without pydantic.
    from pydantic import ValidationError

    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        fields: dict[tuple[Any, ...], list[Any]] = {}
        for fault in error.errors():
            fields.setdefault(_place(content, fault), []).append(fault)
        faults = [_fault(place, of, secret) for place, of in islice(fields.items(), _FAULTS)]
        if (others := len(fields) - len(faults)) > 0:
            faults.append(f"and {others} more faults")
        raise LoadError(source, "; ".join(faults)) from (None if secret else error)


def _place(content: Any, fault: Any) -> tuple[Any, ...]:
    """Return the keys of a fault in the document, without pydantic's names of alternatives."""
    place: list[Any] = []
    for part in fault["loc"]:
        known = range(len(content)) if isinstance(content, list) else content
        if isinstance(content, dict | list) and part in known:
            place.append(part)
            content = content[part]
    if fault["type"] == "missing":
        place.append(fault["loc"][-1])
    return tuple(place)


def _fault(place: tuple[Any, ...], faults: list[Any], secret: bool) -> str:
    """Return the text of the faults of one field, by each of its alternatives."""
    where = ".".join(shortened(str(part)) for part in place) or "document"
    # The first letter only: a message may have names and patterns, where case matters.
    messages = [
        "input should be a mapping"
        if fault["type"] == "model_type"
        else f"{fault['msg'][:1].lower()}{fault['msg'][1:]}"
        for fault in faults
    ]
    text = f"{where}: {shortened(', or '.join(dict.fromkeys(messages)))}"
    return text if secret else f"{text}, got {_brief(faults[0]['input'])}"


def _brief(value: object) -> str:
    try:
        return shortened(_BRIEF.repr(value))
    except ValueError:
        return "a number of very many digits"
