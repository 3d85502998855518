"""Weights of a module of a diffusers folder: one file, shards with an index, or a variant.

PART/diffusion_pytorch_model.safetensors
PART/diffusion_pytorch_model.VARIANT.safetensors
PART/diffusion_pytorch_model.safetensors.index.json  …-00001-of-00002.safetensors
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from els_service.errors import LoadError

_STEM = "diffusion_pytorch_model"
_VARIANT = re.compile(
    rf"{_STEM}\.(?:(\w+)(?:-\d+-of-\d+)?\.safetensors|safetensors\.index\.(\w+)\.json)"
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LARGEST_INDEX = 1 << 24
"""Bytes of an index; one of 100,000 tensors has 10 MB."""
_MOST_SHARDS = 1000


class Inside(Protocol):
    """Resolver of names in a model folder."""

    def __call__(self, name: str) -> Path:
        """Return the path of a file; raises LoadError if outside the root or not a file."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder of the model folder, sorted; none if it is no folder."""
        ...


@dataclass(frozen=True)
class Below:
    """Resolver of names in a folder of another resolver's."""

    inside: Inside
    folder: str

    def __call__(self, name: str) -> Path:
        """Return the path of a file; see ``Inside``."""
        return self.inside(f"{self.folder}/{name}")

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; see ``Inside``."""
        return self.inside.names(f"{self.folder}/{folder}")


@dataclass(frozen=True)
class WeightFiles:
    """Files of a module's weights."""

    path: Path
    """The weights, or the index of their shards."""
    shards: tuple[Path, ...]
    """All files to read."""


def find_weights(inside: Inside, part: str, variant: str) -> WeightFiles:
    """Return the files of a module's weights; without a variant also those of the only one.

    Args:
        inside: resolver of names in the diffusers folder.
        part: folder of the module.
        variant: name of the variant; empty for none.

    Raises:
        LoadError: There are none, only pickles, or several variants to choose from.
    """
    found = _find(inside, part, variant)
    if found:
        return found
    names = inside.names(part)
    variants = sorted({one or other for one, other in _variants(names)})
    if not variant and len(variants) == 1 and (found := _find(inside, part, variants[0])):
        return found
    name = f"{part}/{_STEM}" + (f".{variant}" if variant else "")
    if variants:
        reason = f"variant: expected one of {', '.join(variants)} in model.yaml, as"
        raise LoadError(
            inside(f"{part}/config.json").parent, f"{reason} {name}.safetensors is none"
        )
    for pickle in names:
        if pickle.startswith(_STEM) and pickle.endswith(_PICKLE_SUFFIXES):
            reason = "expected safetensors: a pickle can execute code when it is read"
            raise LoadError(inside(f"{part}/{pickle}"), f"{reason}; save_pretrained writes one")
    inside(f"{name}.safetensors")
    raise AssertionError("a file that was found is returned above")


def _find(inside: Inside, part: str, variant: str) -> WeightFiles | None:
    """Return the files of a variant; None if it has neither weights nor an index."""
    present = inside.names(part)
    dotted = f".{variant}" if variant else ""
    if (name := f"{_STEM}{dotted}.safetensors") in present:
        path = inside(f"{part}/{name}")
        return WeightFiles(path, (path,))
    # diffusers writes the former; the latter is read too.
    for name in (
        f"{_STEM}.safetensors.index{dotted}.json",
        f"{_STEM}{dotted}.safetensors.index.json",
    ):
        if name in present:
            path = inside(f"{part}/{name}")
            return WeightFiles(path, tuple(inside(f"{part}/{one}") for one in _shards(path)))
    return None


def _variants(names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        match = _VARIANT.fullmatch(name)
        if match:
            yield match.group(1), match.group(2)


def _shards(path: Path) -> list[str]:
    """Return the file names of an index, each once.

    Raises:
        LoadError: The index is malformed, or names a file elsewhere.
    """
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_LARGEST_INDEX))
        names = sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise LoadError(path, f"weight_map: expected tensors → file names, got {text}") from error
    if not 1 <= len(names) <= _MOST_SHARDS:
        raise LoadError(path, f"weight_map: expected 1 to {_MOST_SHARDS} files, got {len(names)}")
    for name in names:
        if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
            expected = "weight_map: expected names of safetensors files in this folder"
            raise LoadError(path, f"{expected}, got {name!r:.80}")
    return names
