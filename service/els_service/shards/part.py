"""The part of a bank that one process has: its slices of the bank's file, and what they answer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from els_kernels.blocked_moments import Level, MomentPass, block_answers
from els_kernels.blocks import Blocks
from els_kernels.geometry import Geometry
from els_kernels.native import Native
from els_kernels.native.block_sums import block_sums
from els_kernels.native.moments_call import MomentCall
from els_service.denoisers.bank_parts import BankReader, is_in_parts
from els_service.denoisers.banks import pixels_from
from els_service.errors import LoadError
from els_service.shards.messages import Array, Message

_DTYPES = {"U8": np.uint8, "F32": np.float32}
_MOST_HEADER = 100 << 20


@dataclass(frozen=True)
class PartSpec:
    """Bank of one process: a file and the process's blocks of it.

    Attributes:
        path: of a bank of images of one size: a file, or the manifest of its parts.
        blocks: of the process.
        digests: SHA-256 (hex) of the stored images of each of these blocks.
        threads: of a computation.
    """

    path: str
    blocks: Blocks
    digests: list[str]
    threads: int

    @property
    def fields(self) -> dict[str, Any]:
        """Values of a message."""
        return asdict(self)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> PartSpec:
        """Return the specification in a message."""
        blocks = Blocks(**fields["blocks"])
        return cls(fields["path"], blocks, fields["digests"], fields["threads"])


def mapped_images(path: str | Path) -> NDArray[Any]:
    """Return the images of a bank's file, [N, C, H, W] uint8 or float32, mapped read-only.

    Raises:
        LoadError: The file is no bank of images of one size.
        OSError: It cannot be read.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            raise LoadError(path, f"header: expected at most {_MOST_HEADER} bytes, got {length}")
        try:
            entry = json.loads(file.read(length))["images"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            offset = 8 + length + entry["data_offsets"][0]
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(path, f"not a bank: {error}") from error
    if len(shape) != 4:
        raise LoadError(path, f"images: expected shape [N, C, H, W], got {list(shape)}")
    return np.memmap(path, dtype, "r", offset, shape)


def digest(images: NDArray[Any]) -> str:
    """Return SHA-256 (hex) of stored images."""
    return hashlib.sha256(np.ascontiguousarray(images).reshape(-1).view(np.uint8).data).hexdigest()


class ImagesInParts:
    """Images of a bank in parts, as those of a file: read and verified by range.

    Args:
        path: of the manifest or its folder.

    Raises:
        LoadError: The manifest is damaged; a range, that its part is.
    """

    def __init__(self, path: str | Path) -> None:
        self._reader = BankReader(path)
        self.shape = len(self._reader.labels), *self._reader.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, images: slice) -> NDArray[Any]:
        return self._reader.images(images.start, images.stop)


class BankPart:
    """Blocks of a bank, packed, and the operations on them; one at a time.

    Args:
        spec: what it loads.

    Raises:
        LoadError: The file is no bank, or has other images than the server loaded.
        OSError: The file cannot be read.
    """

    def __init__(self, spec: PartSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._blocks = spec.blocks
        self._images: NDArray[Any] | ImagesInParts = (
            ImagesInParts(spec.path) if is_in_parts(Path(spec.path)) else mapped_images(spec.path)
        )
        if len(self._images) != spec.blocks.images:
            expected = f"expected {spec.blocks.images} images, as the server has loaded"
            raise LoadError(spec.path, f"{expected}, got {len(self._images)}")
        limits = spec.blocks.limits
        pixels = np.empty((sum(hi - lo for lo, hi in limits), *self._images.shape[1:]), np.float32)
        at = 0
        for (lo, hi), expected in zip(limits, spec.digests, strict=True):
            block = self._images[lo:hi]
            if digest(block) != expected:
                raise LoadError(
                    spec.path, f"images {lo} to {hi - 1}: changed since they were loaded"
                )
            pixels[at : at + hi - lo] = pixels_from(block)
            at += hi - lo
        self._pixels: Tensor | None = torch.from_numpy(pixels)
        self._native: Native | None = None
        self._operations: dict[str, Callable[[Message], Message]] = {
            "sums": self._sums,
            "prepare": self._prepare,
            "rows": self._rows,
            "moments": self._moments,
            "exact": self._exact,
            "answers": self._answers,
            "norm": self._norm,
        }

    def answer(self, message: Message) -> Message:
        """Return the answer to an operation.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The memory does not suffice.
        """
        began = time.perf_counter()
        found = self._operations[message.op](message)
        fields = found.fields | {"seconds": time.perf_counter() - began}
        return Message("answer", fields, found.arrays, message.number)

    @property
    def _packed(self) -> Native:
        assert self._native is not None, "prepare comes first"
        return self._native

    def _sums(self, message: Message) -> Message:
        """Answer sums of the pixels of each block, [K, 1 + C]."""
        assert self._pixels is not None
        return reply(torch.stack(block_sums(self._pixels, self._blocks)))

    def _prepare(self, message: Message) -> Message:
        """Answer the largest |pixel| and the squares of each block, [K]; packs the bank."""
        assert self._pixels is not None
        centre = torch.from_numpy(message.arrays[0])
        self._native = Native(self._pixels, blocks=self._blocks, centre=centre)
        self._pixels = None
        squares = torch.tensor(self._native.block_squares(), dtype=torch.float64)
        return reply(squares, largest=self._native.largest)

    def _rows(self, message: Message) -> Message:
        fields = message.fields
        x = torch.from_numpy(message.arrays[0])
        ranges = [(lo, hi) for lo, hi in fields["ranges"]]
        rows = self._packed.rows(
            x, fields["a"], fields["s"], fields["window"], ranges, geometry_of(fields)
        )
        return reply(*rows)

    def _moments(self, message: Message) -> Message:
        fields = message.fields
        inputs = {
            name: torch.from_numpy(array)
            for name, array in zip(fields["inputs"], message.arrays, strict=True)
        }
        lo, hi = fields["limits"]
        call = MomentCall(
            fields["kind"],
            geometry_of(fields),
            fields["window"],
            fields["top"],
            (lo, hi),
            fields["numbers"],
            inputs,
        )
        return reply(*self._packed.moment_rows(call))

    def _exact(self, message: Message) -> Message:
        x, a, s, window, geometry = level_of(message)
        lo, hi = message.fields["limits"]
        found = self._packed.exact_parts(x, a, s, window, (lo, hi), geometry)
        return reply(*(torch.cat([mean, log_sum[None]]) for mean, log_sum in found))

    def _answers(self, message: Message) -> Message:
        fields = message.fields
        lo, hi = fields["limits"]
        inputs = tuple(torch.from_numpy(array) for array in message.arrays[1:])
        each = MomentPass(fields["kind"], (lo, hi), inputs, fields["top"])
        found = block_answers(self._stored, self._blocks, level_of(message), each)
        return reply(*(tensor for answer in found for tensor in answer), blocks=len(found))

    def _norm(self, message: Message) -> Message:
        return reply(norm=self._packed.square_norm(message.fields["window"]))

    def _stored(self, lo: int, hi: int) -> Tensor:
        """Return a copy of stored images of the whole bank, [n, C, H, W]."""
        return torch.from_numpy(np.array(self._images[lo:hi]))


def reply(*tensors: Tensor, **fields: Any) -> Message:
    """Return an answer of tensors and values."""
    return Message("answer", fields, [array_of(tensor) for tensor in tensors])


def array_of(tensor: Tensor) -> Array:
    """Return a tensor as an array."""
    array: Array = tensor.contiguous().numpy()
    return array


def level_fields(level: Level) -> dict[str, Any]:
    """Return the fields of a query in a message, beside its pixels."""
    return {"a": level.a, "s": level.s, "window": level.window} | geometry_fields(level.geometry)


def level_of(message: Message) -> Level:
    """Return the query in a message; its pixels are the first array."""
    fields = message.fields
    x = torch.from_numpy(message.arrays[0])
    return Level(x, fields["a"], fields["s"], fields["window"], geometry_of(fields))


def geometry_fields(geometry: Geometry) -> dict[str, Any]:
    """Return the fields of a geometry in a message."""
    return {"geometry": [geometry.sources, geometry.padding, geometry.whole]}


def geometry_of(fields: dict[str, Any]) -> Geometry:
    """Return the geometry in a message."""
    sources, padding, whole = fields["geometry"]
    return Geometry(sources, padding, whole)
