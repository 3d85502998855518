"""Builds of banks in parts, from sources that may be larger than memory.

Images are taken in the order of the bank, sorted by label; one part is in memory at a time. After
each part the build is recorded in ``build.json``, so that a killed build continues after its last
whole part and ends with the bytes of one that was not killed. The manifest is written last.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from els_service.denoisers.bank_build_records import (
    RECORD,
    BuildState,
    Request,
    described,
    locked,
    opened,
    write_record,
)
from els_service.denoisers.bank_files import save_bank
from els_service.denoisers.bank_mirrors import mirrored
from els_service.denoisers.bank_parts import (
    MANIFEST,
    Manifest,
    Part,
    fingerprint_of_parts,
    map_part,
)
from els_service.denoisers.bank_selection import Choice, Report, Source, resized
from els_service.denoisers.banks import UNLABELLED, Bank
from els_service.denoisers.file_names import FileNames
from els_service.denoisers.files import write_atomically
from els_service.errors import InvalidArgumentError, LoadError

_SHOWN = 10
"""Errors of skipped pictures in the record."""


@dataclass(frozen=True)
class Built:
    """A finished build: its manifest, and the errors of the first skipped pictures."""

    manifest: Manifest
    first_skipped: tuple[str, ...]


def build_parts(
    source: Source,
    label_names: tuple[str, ...],
    out: Path,
    request: Request,
    progress: Report = lambda done, total: None,
) -> Built:
    """Write a bank in parts to a folder, or continue a build that was killed.

    Args:
        source: the images.
        label_names: one for each label, or more, or none.
        out: the folder, which is made.
        request: options.
        progress: callback with the number of images done, and the maximum number to do.

    Raises:
        InvalidArgumentError: An option is out of range, or not applicable to the source.
        LoadError: A picture cannot be read, the folder has other files or a build of another
            source or with other options, or a part has changed since it was built.
        OSError: A file cannot be written.
    """
    if request.skip_unreadable and source.images is not None:
        raise InvalidArgumentError("skip_unreadable", "a folder of pictures", source.path)
    if request.shard_size < 1:
        raise InvalidArgumentError("shard_size", "at least 1 image", request.shard_size)
    source = mirrored(source) if request.mirror else source
    order = _Order(source, request)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        state = opened(out, described(source, label_names, request))
        progress(state.images, order.most)
        write = partial(_write, out, source, label_names, request, state)
        # Nothing here holds a part while the next one is decoded.
        while state.images < order.most:
            if not write(_Filled(source, order, state, request, progress)):
                break
        if not state.parts:
            raise LoadError(source.path, "holds no images that can be read")
        manifest = _finish(out, label_names, request, state)
    return Built(manifest, tuple(state.first_skipped))


class _Order:
    """Candidates in the order of the bank: by label, and in file order within a label."""

    def __init__(self, source: Source, request: Request) -> None:
        labels = source.labels
        choice = Choice(source, request.limit, request.per_label)
        self.most, self.per_label = choice.most, choice.per_label
        in_order = labels is None or bool(np.all(labels[1:] >= labels[:-1]))
        if request.skip_unreadable:
            if request.limit is not None and not in_order:
                expected = "none with skip_unreadable, as labels of the source are out of order"
                raise InvalidArgumentError("limit", expected, request.limit)
            indices = np.arange(source.count)
        else:
            self.per_label = None
            kept: list[int] = []
            for index in choice.indices(kept):
                kept.append(index)
            indices = np.array(kept, np.int64)
        self.labels = np.full(len(indices), UNLABELLED) if labels is None else labels[indices]
        if not in_order:
            order = np.argsort(self.labels, kind="stable")
            indices, self.labels = indices[order], self.labels[order]
        self.indices = indices

    def window(self, state: BuildState, most: int) -> tuple[slice, int]:
        """Return the next candidates, at most ``most``, and the images taken of their label.

        With a maximum for each label they are of one label: pictures that cannot be read are
        replaced by others of it.
        """
        position, taken = state.position, state.of_label
        if self.per_label is None:
            return slice(position, min(position + most, len(self.indices))), 0
        if position and taken == self.per_label:
            position = self._end(position - 1)
        if position == len(self.indices):
            return slice(position, position), 0
        if position == 0 or self.labels[position] != self.labels[position - 1]:
            taken = 0
        stop = min(position + most, position + self.per_label - taken, self._end(position))
        return slice(position, stop), taken

    def _end(self, position: int) -> int:
        """Return the end of the candidates of the label at a position."""
        return int(np.searchsorted(self.labels, self.labels[position], "right"))


class _Filled:
    """Images of the next part, decoded one by one into memory for one part.

    Advances position and skipped pictures of the state.
    """

    def __init__(
        self,
        source: Source,
        order: _Order,
        state: BuildState,
        request: Request,
        progress: Report,
    ) -> None:
        self._source, self._size, self._state = source, request.size, state
        self._skip, self._progress, self._most = request.skip_unreadable, progress, order.most
        self.target = min(request.shard_size, order.most - state.images)
        self.kept: list[int] = []
        """Indices of the images in the source."""
        self.images: NDArray[Any] = np.empty((0, 0, 0, 0), np.uint8)
        while len(self.kept) < self.target:
            window, taken = order.window(state, self.target - len(self.kept))
            if window.start < window.stop:
                taken += self._decode(order.indices[window])
            state.position, state.of_label = window.stop, taken
            if window.start == window.stop:
                break

    def _decode(self, indices: NDArray[np.int64]) -> int:
        """Append the readable images of some candidates, in their order; return their number."""
        first, done = len(self.kept), np.zeros(len(indices), bool)
        count = self._state.images + first
        # Archives and tables are read fastest in rising order, which the order by label is not.
        for rank in np.argsort(indices, kind="stable"):
            index = int(indices[rank])
            try:
                image = resized(self._source.image(index), self._size)
            except LoadError as error:
                if not self._skip:
                    raise
                if not self._source.is_mirror(index):
                    self._skipped(str(error))
                continue
            self._check_alike(index, image)
            self.images[first + rank] = image.transpose(2, 0, 1)
            done[rank] = True
            count += 1
            self._progress(count, self._most)
        if done.any() and not done.all():
            self.images[first : first + done.sum()] = self.images[first : first + len(done)][done]
        self.kept += indices[done].tolist()
        return int(done.sum())

    def _check_alike(self, index: int, image: NDArray[Any]) -> None:
        """Check an image against the first of the bank, and allocate memory for the part."""
        shape = (image.shape[2], *image.shape[:2])
        if not self._state.shape:
            self._state.shape, self._state.dtype = shape, image.dtype.name
        if (shape, image.dtype.name) != (tuple(self._state.shape), self._state.dtype):
            sizes = f"{list(shape)}, but others of {list(self._state.shape)}"
            place = self._source.place(index)
            raise LoadError(place, f"of channels and size {sizes}; resize may help")
        if not self.images.size:
            self.images = np.empty((self.target, *shape), image.dtype)

    def _skipped(self, error: str) -> None:
        self._state.skipped += 1
        if len(self._state.first_skipped) < _SHOWN:
            self._state.first_skipped.append(error)


def _write(
    out: Path,
    source: Source,
    label_names: tuple[str, ...],
    request: Request,
    state: BuildState,
    part: _Filled,
) -> bool:
    """Write a part, and then the record that it is whole; return whether it has any images."""
    count = len(part.kept)
    if not count:
        return False
    labels = np.full(count, UNLABELLED) if source.labels is None else source.labels[part.kept]
    labels = labels.astype(np.int64)
    names = source.file_names(part.kept)
    bank = Bank(
        part.images[:count],
        labels,
        label_names[: int(labels[-1]) + 1],
        request.source,
        request.licence,
        None if names is None else FileNames.of(names),
    )
    name = f"part-{len(state.parts):05}.safetensors"
    save_bank(bank, out / name)
    state.parts.append(dataclasses.asdict(Part(name, count, bank.fingerprint)))
    values, counts = np.unique(labels, return_counts=True)
    for label, found in zip(values.tolist(), counts.tolist(), strict=True):
        if state.labels and state.labels[-1][0] == label:
            state.labels[-1][1] += found
        else:
            state.labels.append([label, found])
    write_record(out, state)
    return True


def _finish(
    out: Path, label_names: tuple[str, ...], request: Request, state: BuildState
) -> Manifest:
    """Write the manifest, with the fingerprint of the whole read from the parts."""
    channels, height, width = state.shape
    labels = np.repeat([label for label, _ in state.labels], [n for _, n in state.labels])
    names = label_names[: int(labels[-1]) + 1]
    parts = tuple(Part(**part) for part in state.parts)
    shape, dtype = (channels, height, width), np.dtype(state.dtype)
    manifest = Manifest(
        dtype=state.dtype,
        shape=shape,
        labels=tuple((label, count) for label, count in state.labels),
        parts=parts,
        fingerprint=fingerprint_of_parts(
            (map_part(out / part.file, part.fingerprint) for part in parts),
            labels,
            names,
            shape,
            dtype,
        ),
        label_names=names,
        source=request.source,
        licence=request.licence,
        built_from=_built_from(request),
        skipped=state.skipped,
    )
    write_atomically(out / MANIFEST, manifest.encode())
    (out / RECORD).unlink(missing_ok=True)
    return manifest


def _built_from(request: Request) -> dict[str, Any]:
    """Return the options of a build, for the manifest."""
    options = dataclasses.asdict(request)
    given = {name: options.pop(name) for name in ("source", "licence", "built_from")}
    return {**given["built_from"], **options}
