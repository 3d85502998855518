"""Records of unfinished builds of banks in parts: what is asked for, and what is built so far."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from els_service.denoisers.bank_parts import Part
from els_service.denoisers.bank_selection import Size, Source
from els_service.denoisers.files import UNSUPPORTED, remove_remains, write_atomically
from els_service.errors import LoadError

RECORD = "build.json"
"""Record of an unfinished build in its folder."""
_SHOWN = 10
"""Entries of a folder in an error."""


@dataclass(frozen=True)
class Request:
    """Options of a build.

    Attributes:
        shard_size: images of each part but the last.
        limit: maximum number of images.
        per_label: maximum number of images of each label.
        size: size to resize to.
        skip_unreadable: skip and count pictures that cannot be read.
        source: origin of the images.
        licence: licence of the images.
        built_from: source and options as the command has them, for the manifest.
        mirror: follow each image by its mirror image, which limits do not count.
    """

    shard_size: int
    limit: int | None = None
    per_label: int | None = None
    size: Size | None = None
    skip_unreadable: bool = False
    source: str = ""
    licence: str = ""
    built_from: dict[str, Any] = field(default_factory=dict)
    mirror: bool = False


@dataclass
class BuildState:
    """Record of an unfinished build: JSON in ``build.json``."""

    request: dict[str, Any]
    position: int = 0
    """Of the next candidate in the order."""
    of_label: int = 0
    """Images taken of the label of the candidate before."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    labels: list[list[int]] = field(default_factory=list)
    """Runs [label, number of images]."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    first_skipped: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images of whole parts."""
        return sum(part["images"] for part in self.parts)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two builds do not write one bank."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoadError(out, "expected no other build of this bank, got one") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)


def opened(out: Path, request: dict[str, Any]) -> BuildState:
    """Return the state of a build of the same source and options, or that of a new one."""
    # Of a killed build: the lock says that no other one writes here.
    remove_remains(out, age_s=0)
    path = out / RECORD
    if not path.exists():
        if entries := sorted(os.listdir(out)):
            expected = "expected an empty folder or an unfinished build"
            raise LoadError(out, f"{expected}, got {', '.join(entries[:_SHOWN])}")
        write_record(out, state := BuildState(request))
        return state
    try:
        state = BuildState(**json.loads(path.read_bytes()))
        built = {name: state.request[name] for name in request}
        [Part(**part) for part in state.parts]
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise LoadError(path, f"expected the record of a build, got {error}") from error
    for name, value in request.items():
        if built[name] != value:
            expected = f"{name}: expected {built[name]}, as the build was begun with"
            raise LoadError(path, f"{expected}, got {value}; remove {out} to build it again")
    return state


def described(source: Source, label_names: tuple[str, ...], request: Request) -> dict[str, Any]:
    """Return the options that decide the bytes of a bank, as values of JSON."""
    labels = b"" if source.labels is None else source.labels.tobytes()
    options = {
        **dataclasses.asdict(request),
        "label_names": label_names,
        "labels": hashlib.sha256(labels).hexdigest(),
        "files": _state_of_files(source.path),
    }
    described: dict[str, Any] = json.loads(json.dumps(options))
    return described


def _state_of_files(path: Path) -> str:
    """Return SHA-256 (hex) of names, sizes and times of the files of a source."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            digest.update(_state_of(Path(folder, name), path))
    if path.is_file():
        digest.update(_state_of(path, path))
    return digest.hexdigest()


def _state_of(file: Path, source: Path) -> bytes:
    status = file.lstat()
    name = str(file.relative_to(source))
    return json.dumps([name, status.st_size, status.st_mtime_ns]).encode()


def write_record(out: Path, state: BuildState) -> None:
    """Write the record of a build, after its part."""
    write_atomically(out / RECORD, (json.dumps(dataclasses.asdict(state)) + "\n").encode())
