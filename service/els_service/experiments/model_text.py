"""Edit of one key of a ``model.yaml`` that keeps its comments and all other bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from els_service.denoisers.files import write_atomically
from els_service.errors import LoadError
from els_service.yaml_files import read_yaml


def set_key(path: Path, key: str, value: Any) -> None:
    """Set a top-level key of a YAML file, in its place or at the end; the write is atomic.

    Raises:
        LoadError: The file is no mapping, or cannot be edited without a change elsewhere.
        OSError: The file cannot be written, and is unchanged.
    """
    before = read_yaml(path)
    if not isinstance(before, dict):
        raise LoadError(path, f"expected a mapping, got {type(before).__name__}")
    # Bytes, as reading text would replace the line ends.
    text = path.read_bytes().decode()
    edited = _edited(text, key, _flow(value))
    try:
        unchanged = yaml.safe_load(edited) == before | {key: value}
    except yaml.YAMLError:
        unchanged = False
    if not unchanged:
        raise LoadError(path, f"expected YAML in which {key} can be set in place: set it by hand")
    write_atomically(path, edited.encode())


def _edited(text: str, key: str, value: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    # Marks count characters; a byte order mark is none of them.
    text = text.removeprefix("\ufeff")
    for name, node in root.value:
        if name.value == key:
            begin, end = node.start_mark.index, _end(text, node)
            # A block value begins on a line of its own, or behind an anchor.
            begin = text.index(":", name.end_mark.index) + 1
            return f"{text[:begin]} {value}{text[end:]}"
    if root.flow_style:
        end = root.end_mark.index - 1
        return f"{text[:end].rstrip()}, {key}: {value}{text[end:]}"
    end = _end(text, root)
    line_end = text.find("\n", end)
    end = len(text) if line_end < 0 else line_end
    return f"{text[:end]}\n{key}: {value}{text[end:] or chr(10)}"


def _end(text: str, node: yaml.Node) -> int:
    """Return where a node ends; a block's own mark lies behind the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    # A literal scalar ends behind its last line end.
    return len(text[: node.end_mark.index].rstrip("\r\n"))


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, sort_keys=False)
    # A document that is a plain scalar ends with a mark of its own.
    return text.removesuffix("...\n").strip()
