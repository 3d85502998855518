"""The file format of image banks.

A bank file is a safetensors file in one canonical byte layout: tensors, and the string metadata
``format``, ``version``, ``fingerprint``, ``source``, ``licence``, ``label_names`` (a JSON list) and
``checksum``. The version follows from the tensors:

    version 1   labels, images              images of one size, [N, C, H, W]
    version 2   and file_names              the same, with the names of their files
    version 3   labels, extents, images     images of several sizes, [M], with extents [N, 2];
                file_names, or not          see ``mixed_banks.MixedBank``

A file that differs in any byte from the output of ``save_bank`` is rejected, so every modification
is detected. Equal banks have equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors

from els_service.denoisers.files import write_atomically
from els_service.errors import LoadError

FORMAT = "els-bank"

_SAFETENSORS_DTYPES = {"uint8": "U8", "float32": "F32", "int64": "I64"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
}

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's flag of mappings that take no commit charge; Python has its name since 3.13."""


@dataclass(frozen=True, eq=False)
class BankContent:
    """Content of a bank file.

    Attributes:
        arrays: tensors by name, in the order of the file: wider types first, so that all are
            aligned.
        fingerprint: SHA-256 (hex) of the bank.
        label_names: one for each label, or empty.
        source: origin of the images.
        licence: licence of the images.
    """

    arrays: Mapping[str, NDArray[Any]]
    fingerprint: str
    label_names: tuple[str, ...]
    source: str
    licence: str

    @property
    def version(self) -> str:
        """Version of the format."""
        if "extents" in self.arrays:
            return "3"
        return "2" if "file_names" in self.arrays else "1"


class Storable(Protocol):
    """A bank of either class."""

    @property
    def content(self) -> BankContent:
        """Content of its file."""
        ...


_Bank = TypeVar("_Bank", bound=Storable)


def save_bank(bank: Storable, path: str | os.PathLike[str]) -> None:
    """Write the bank to a file atomically.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, *_blocks(bank.content))


def read_bank(
    path: str | os.PathLike[str],
    construct: Callable[[BankContent], _Bank],
    *,
    mapped: bool = False,
) -> _Bank:
    """Return the bank in a file.

    Args:
        path: the file.
        construct: returns the bank of a content, and raises ValueError, KeyError or TypeError
            if it is none.
        mapped: map the file instead of reading it; its memory is then the page cache's, shared by
            processes. The file must be replaced, never written in place. Writes to the arrays are
            private to the process.

    Raises:
        LoadError: the file is missing, truncated, modified, of another format or version, or does
            not contain a valid bank; names the file, and the field or tensor.
    """
    try:
        data = mapped_file(Path(path)) if mapped else Path(path).read_bytes()
        content = _decode(data)
        bank = construct(content)
        _check_unmodified(bank.content, content.fingerprint, data)
        return bank
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(path, error.strerror or str(error)) from error
    except KeyError as error:
        raise LoadError(path, f"not a bank: {error} is missing or of an unknown type") from error
    except SafetensorError as error:
        raise LoadError(path, f"not a bank: header: expected safetensors, got {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise LoadError(path, f"not a bank: {error}") from error


def fingerprint_start(description: list[Any]) -> bytes:
    """Return a description, JSON, as a fingerprint has it before the arrays."""
    return json.dumps(description).encode()


def fingerprint_of(description: list[Any], arrays: Iterable[NDArray[Any]]) -> str:
    """Return SHA-256 (hex) of a description, as JSON, and of arrays."""
    digest = hashlib.sha256(fingerprint_start(description))
    for array in arrays:
        digest.update(_little_endian(array))
    return digest.hexdigest()


def mapped_file(path: Path) -> mmap.mmap:
    """Return a private mapping of a file, which reserves no memory.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty.
    """
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("header: expected safetensors, got an empty file")
        # Writable, as torch takes no read-only arrays; what is written would not reach the file.
        flags = mmap.MAP_PRIVATE | _NO_RESERVE
        return mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)


def _views(data: mmap.mmap, header: dict[str, Any], begin: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a mapped file, without copies; ``_check_unmodified`` checks the rest."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            offset = begin + entry["data_offsets"][0]
            arrays[name] = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
    return arrays


def _decode(data: bytes | mmap.mmap) -> BankContent:
    """Return the content of a file; raise as ``read_bank`` catches."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if isinstance(data, bytes):
        arrays = parse_safetensors(data)
        header = json.loads(data[8:begin])
    else:
        header = json.loads(data[8:begin])
        if not isinstance(header, dict):
            raise ValueError("header: expected safetensors, got no object")
        arrays = _views(data, header, begin)
    metadata: dict[str, str] = header.get("__metadata__") or {}
    content = BankContent(arrays, "", (), "", "")
    if metadata["format"] != FORMAT or metadata["version"] != content.version:
        got = f"{metadata['format']} version {metadata['version']}"
        raise ValueError(f"version: expected {FORMAT} version {content.version}, got {got}")
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise KeyError(missing[0])
    return BankContent(
        arrays,
        metadata["fingerprint"],
        _label_names(metadata["label_names"]),
        metadata["source"],
        metadata["licence"],
    )


def _label_names(text: str) -> tuple[str, ...]:
    try:
        return tuple(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"label_names: expected a list in JSON, got {error}") from error


def _check_unmodified(content: BankContent, fingerprint: str, data: bytes | mmap.mmap) -> None:
    if content.fingerprint != fingerprint:
        expected = f"expected {content.fingerprint}, that of the contents"
        reason = "the fingerprint does not match the contents"
        raise ValueError(f"fingerprint: {expected}, got {fingerprint[:64]!r}: {reason}")
    # The arrays are views of the data: equal headers place them over all of it.
    head, *blocks = _blocks(content)
    if data[: len(head)] != head or len(data) != len(head) + sum(map(len, blocks)):
        reason = "damaged or edited, not byte for byte what save_bank writes"
        raise ValueError(f"checksum: expected that of the file: {reason}")


def _blocks(content: BankContent) -> list[bytes | memoryview]:
    """Return header and tensors of a safetensors file; equal contents give equal bytes.

    Not written by the library, whose order of the metadata differs between processes.
    """
    provenance = [content.fingerprint, content.source, content.licence]
    if "file_names" in content.arrays:
        names = _little_endian(content.arrays["file_names"])
        provenance.append(hashlib.sha256(names).hexdigest())
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": content.version,
            "fingerprint": content.fingerprint,
            "source": content.source,
            "licence": content.licence,
            "label_names": json.dumps(content.label_names),
            # The fingerprint covers the contents; the checksum also covers source, licence and
            # file names.
            "checksum": hashlib.sha256(json.dumps(provenance).encode()).hexdigest(),
        }
    }
    blocks: list[bytes | memoryview] = []
    offset = 0
    for name, array in content.arrays.items():
        block = _little_endian(array)
        dtype = _SAFETENSORS_DTYPES[array.dtype.name]
        offsets = [offset, offset := offset + len(block)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        blocks.append(block)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *blocks]


def _little_endian(array: NDArray[Any]) -> memoryview:
    """Return the array's bytes in little-endian order, without a copy if it has that order."""
    ordered = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8).data
