"""The part of a bank that one process has: its slices of the bank's file, and what they answer."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from els_kernels.blocked_moments import MomentPass, block_answers
from els_kernels.blocks import Blocks
from els_kernels.native import Native
from els_kernels.native.block_sums import block_sums
from els_kernels.native.moments_call import MomentCall
from els_service.denoisers.bank_parts import digest
from els_service.denoisers.banks import pixels_from
from els_service.errors import LoadError
from els_service.shards.fold_messages import FoldPart
from els_service.shards.mapped_images import MappedImages
from els_service.shards.messages import Message
from els_service.shards.values import geometry_of, level_of, reply


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


class BankPart:
    """Blocks of a bank and the operations on them; one at a time.

    Args:
        spec: what it loads.
        memory: for the sums of blocks, uint8 [bytes]; the next answer overwrites it.

    Raises:
        LoadError: The file is no bank, or has other images than the server loaded.
        OSError: The file cannot be read.
    """

    def __init__(self, spec: PartSpec, memory: Tensor | None = None) -> None:
        torch.set_num_threads(spec.threads)
        self._blocks, self._memory = spec.blocks, memory
        self._images = MappedImages(spec.path)
        if len(self._images) != spec.blocks.images:
            expected = f"expected {spec.blocks.images} images, as the server has loaded"
            raise LoadError(spec.path, f"{expected}, got {len(self._images)}")
        for (lo, hi), expected in zip(spec.blocks.limits, spec.digests, strict=True):
            if digest(self._images[lo:hi]) != expected:
                raise LoadError(
                    spec.path, f"images {lo} to {hi - 1}: changed since they were loaded"
                )
        self._native: Native | None = None
        self._operations: dict[str, Callable[[Message], Message]] = {
            "sums": self._sums,
            "prepare": self._prepare,
            "ready": lambda message: reply(),
            "rows": self._rows,
            "moments": self._moments,
            "exact": self._exact,
            "answers": self._answers,
            "norm": self._norm,
            **FoldPart(self._images, spec.blocks).operations,
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

    def _decoded(self) -> Iterator[Tensor]:
        """Yield the pixels of each block, [n, C, H, W] float32."""
        for lo, hi in self._blocks.limits:
            yield torch.from_numpy(pixels_from(self._images[lo:hi]))

    def _sums(self, message: Message) -> Message:
        """Answer sums of the pixels of each block, [K, 1 + C]."""
        sums = [block_sums(pixels, self._blocks)[0] for pixels in self._decoded()]
        self._release()
        return reply(torch.stack(sums))

    def _prepare(self, message: Message) -> Message:
        """Answer the largest |pixel| and the squares of each block, [K]; packs the bank once."""
        if self._native is None:
            centre = torch.from_numpy(message.arrays[0])
            self._native = Native.of_blocks(self._decoded(), self._blocks, centre)
        squares = torch.tensor(self._native.block_squares(), dtype=torch.float64)
        self._release()
        return reply(squares, largest=self._native.largest)

    def _release(self) -> None:
        """Give up the memory of stored images and of what they were decoded to."""
        self._images.release()
        # Of the arena of this thread, which glibc keeps otherwise: more than a slice of a bank.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))

    def _rows(self, message: Message) -> Message:
        fields = message.fields
        x = torch.from_numpy(message.arrays[0])
        ranges = [(lo, hi) for lo, hi in fields["ranges"]]
        rows = self._packed.rows(
            x, fields["a"], fields["s"], fields["window"], ranges, geometry_of(fields), self._memory
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
