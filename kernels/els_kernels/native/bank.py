"""A bank packed for the native kernel, and its calls: answers, or sums by block.

Sums of blocks of several processes, merged, have the bits of the answers of one: see ``blocks``.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from els_kernels.arguments import ends
from els_kernels.blocks import Blocks
from els_kernels.control import Control, current
from els_kernels.geometry import Geometry, Posterior
from els_kernels.moment_queries import exact_posterior, merge_posteriors
from els_kernels.native.attend_call import AttendCall, Merge, PreparedCall, Rows, empty_rows
from els_kernels.native.binding import (
    _PADDING,
    _SOURCES,
    BlocksArgument,
    _library,
    kernel_index,
)
from els_kernels.native.block_sums import block_sums, centre_of, largest_window, squares_of
from els_kernels.native.far_queries import MOST_ERROR, float_error, is_far
from els_kernels.native.moments_call import MomentCall, MomentRows, moment_rows

Arguments = tuple[Tensor, list[float], list[float], list[int], list[tuple[int, int]], Geometry]


class Native:
    """A centred bank, packed with one image for each lane of a SIMD vector."""

    def __init__(
        self,
        bank: Tensor,
        *,
        instruction_set: str | None = None,
        blocks: Blocks | None = None,
        centre: Tensor | None = None,
    ) -> None:
        """Prepare a bank.

        Args:
            bank: [N, C, H, W] float32 on the CPU.
            instruction_set: one of ``instruction_sets()``; None for the best.
            blocks: of the bank's images, if they are not a whole bank.
            centre: of the whole bank, [C] float64; None to compute it from the images.

        Raises:
            ValueError: The bank is not on the CPU, or the instruction set is unknown.
            RuntimeError: The library was not built, or cannot be loaded.
        """
        self.kernel = kernel_index(bank.device, instruction_set)
        """Index of the instruction set in the library."""
        self.shape = bank.shape
        """[N, C, H, W] of the images of this process."""
        self.blocks = blocks or Blocks.whole(len(bank))
        """Blocks of this process."""
        bank = bank.contiguous()
        self.centre = centre_of(block_sums(bank, self.blocks)) if centre is None else centre
        """[C] float64: what is subtracted from the bank, as float32."""
        self._allocate()
        self._pack(0, bank)
        self.largest = self._largest()
        """Largest |pixel| of the centred bank."""

    @classmethod
    def of_blocks(cls, pixels: Iterable[Tensor], blocks: Blocks, centre: Tensor) -> Native:
        """Return the packed bank of blocks, of which one is in memory unpacked at a time.

        Args:
            pixels: of each block, [n, C, H, W] float32.
            blocks: of the process.
            centre: of the whole bank, [C] float64.

        Raises:
            RuntimeError: The library was not built, or cannot be loaded.
        """
        native = cls.__new__(cls)
        native.kernel = kernel_index(torch.device("cpu"), None)
        native.blocks, native.centre = blocks, centre
        images = sum(hi - lo for lo, hi in blocks.limits)
        first = 0
        for block in pixels:
            if not first:
                native.shape = torch.Size((images, *block.shape[1:]))
                native._allocate()
            # A block before another one is whole vectors.
            native._pack(first // native.lanes, block)
            first += len(block)
        native.largest = native._largest()
        return native

    def _allocate(self) -> None:
        images, *image = self.shape
        self.lanes = int(_library().els_kernel_lanes(self.kernel))
        """Images of a vector."""
        tiles = -(-images // self.lanes)
        # Aligned to cache lines, which torch's allocator does not guarantee.
        numbers = tiles * math.prod(image) * self.lanes
        memory = torch.empty(numbers + 16, dtype=torch.float32, device="cpu")
        aligned = -memory.data_ptr() % 64 // 4
        self.packed = memory[aligned : aligned + numbers].view(tiles, *image, self.lanes)
        """[tiles, C, H, W, lanes]: the centred bank; lanes past the last image are 0."""

    def _pack(self, tile: int, pixels: Tensor) -> None:
        """Write images [n, C, H, W] float32, in C order, from a tile on."""
        _library().els_pack(
            self.kernel,
            pixels.data_ptr(),
            self.centre.data_ptr(),
            *pixels.shape,
            self.packed[tile:].data_ptr(),
        )

    def _largest(self) -> float:
        return max(abs(float(end)) for end in self.packed.aminmax())

    def __call__(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posteriors, computed by ``torch.get_num_threads()`` threads.

        Those of queries far from the bank are computed in float64 where float32 does not resolve
        their logits: see ``far_queries``.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        far = self._unresolved(x, a, s, window, geometry)
        if not far:
            return self.attend(x, a, s, window, ranges, geometry)
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        near = [b for b in range(len(x)) if b not in far]
        if near:
            answer.mean[near], answer.log_evidence[near] = self.attend(
                x[near],
                [a[b] for b in near],
                [s[b] for b in near],
                [window[b] for b in near],
                [ranges[b] for b in near],
                geometry,
            )
        for b in far:
            parts = self.exact_parts(x[b], a[b], s[b], window[b], ranges[b], geometry)
            answer.mean[b], answer.log_evidence[b] = merge_posteriors(parts)
        return answer

    def images(self, first: int, last: int) -> Tensor:
        """Return images ``first`` to ``last`` - 1 of this process, [n, C, H, W] float64.

        Exact for bytes v as v/127.5 - 1; else but for the rounding of the centred bank.
        """
        lanes = self.lanes
        tiles = self.packed[first // lanes : -(-last // lanes)]
        start = first % lanes
        centred = tiles.movedim(4, 1).flatten(0, 1)[start : start + last - first]
        images = centred.double() + self.centre.float().double()[:, None, None]
        decoded = ((images + 1) * 127.5).round_().float().div_(127.5).sub_(1).double()
        return decoded if (decoded - images).abs().amax() <= 2.0**-22 else images

    def exact_parts(
        self,
        x: Tensor,
        a: float,
        s: float,
        window: int,
        limits: tuple[int, int],
        geometry: Geometry,
    ) -> list[tuple[Tensor, Tensor]]:
        """Return mean and log evidence of one image over each block, float64.

        Args:
            x: image [C, H, W].
            a: signal scale.
            s: noise scale.
            window: odd side of the patch; 1 where ``geometry.whole``.
            limits: range of images of the whole bank.
            geometry: window shape, sources and padding.
        """
        found = []
        for lo, hi in self.blocks.runs(*limits):
            first = self.blocks.local(lo)
            local = first, first + hi - lo
            found.append(exact_posterior(self.images, x, a, s, window, local, geometry))
        return found

    def moment_rows(self, call: MomentCall) -> MomentRows:
        """Return the results of a pass of moments over the blocks of this process.

        Raises:
            ComputationStoppedError: The current ``Control`` was stopped.
            MemoryError: The partial results do not fit in memory.
        """
        return moment_rows(self, call)

    def square_norm(self, window: int) -> float:
        """Return the largest squared norm of a patch of the centred bank, or a bound of it."""
        return max(largest_window(squares_of(tiles), window) for tiles in self._block_tiles())

    def block_squares(self) -> list[float]:
        """Return the sum of the squared pixels of each block of the centred bank."""
        return [
            float(squares_of(tiles).sum((1, 2), dtype=torch.float64).sum())
            for tiles in self._block_tiles()
        ]

    def _block_tiles(self) -> Iterator[Tensor]:
        """Yield the packed tiles of each block."""
        tiles = self.blocks.size // self.lanes
        yield from torch.split(self.packed, tiles)

    @cached_property
    def _offset(self) -> float:
        """Largest |number| of the centre."""
        return float(self.centre.abs().amax())

    def _unresolved(
        self, x: Tensor, a: list[float], s: list[float], window: list[int], geometry: Geometry
    ) -> list[int]:
        """Return the images [B] that are far from the bank and have too coarse logits."""
        found = []
        channels, height, width = self.shape[1:]
        for b, (low, high) in enumerate(ends(x)):
            # Most queries are near by the first bound, which costs least.
            if not is_far(max(-low, high) + a[b] * self._offset, self.largest, a[b], s[b]):
                continue
            size = float((x[b].double() - a[b] * self.centre[:, None, None]).abs().amax())
            sides = (height, width) if geometry.whole else (window[b], window[b])
            depth = channels * min(sides[0], height) * min(sides[1], width)
            error = float_error(size, self.largest, depth, a[b], s[b])
            if is_far(size, self.largest, a[b], s[b]) and error > MOST_ERROR:
                found.append(b)
        return found

    def attend(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posteriors that the library computes, of a process with all blocks."""
        x = x.contiguous()
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        self._prepared(x, a, s, window, ranges, geometry, answer._asdict()).run("els_attend")
        return answer

    def rows(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
        memory: Tensor | None = None,
    ) -> Rows:
        """Return the sums of each image over its range: see ``Blocks.rows``.

        With ``memory``, uint8 [bytes] aligned to 8 bytes, they are in it, if it is large enough.
        """
        count = sum(len(self.blocks.rows(*limits)) for limits in ranges)
        rows = empty_rows(count, self.shape[1:], memory)
        if count:
            call = self._prepared(x.contiguous(), a, s, window, ranges, geometry, {})
            call.run("els_attend", rows.addresses())
        return rows

    def merging(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Merge:
        """Return the merge of the rows of a whole bank into posteriors: the bits of ``attend``.

        Args:
            x: images [B, C, H, W].
            a: signal scale of each image.
            s: noise scale of each image.
            window: odd side of each image's patch; 1 where ``geometry.whole``.
            ranges: of images of the whole bank.
            geometry: window shape, sources and padding.
        """
        x = x.contiguous()
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        call = self._prepared(x, a, s, window, ranges, geometry, answer._asdict())
        return Merge(call, answer)

    @property
    def _grouped(self) -> bool:
        """Whether a row is of a group of blocks."""
        return self.blocks.grouped

    def _prepared(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
        results: dict[str, Tensor],
    ) -> PreparedCall:
        """Return a call of the library.

        Args:
            x: in C order.
            a: as of ``attend``, like the next.
            s: of each image.
            window: of each image.
            ranges: of each image.
            geometry: of all.
            results: that are written, by the names of ``AttendCall``.
        """
        # Arrays of ctypes take a tenth of the time of tensors.
        scales = (ctypes.c_double * (2 * len(a)))(*a, *s)
        windows = (ctypes.c_int64 * len(window))(*window)
        limits = (ctypes.c_int64 * (2 * len(ranges)))(*itertools.chain.from_iterable(ranges))
        at = ctypes.addressof(scales)
        control = current() or Control()
        call = AttendCall(
            kernel=self.kernel,
            threads=torch.get_num_threads(),
            bank=self.packed.data_ptr(),
            centre=self.centre.data_ptr(),
            images=self.shape[0],
            channels=self.shape[1],
            height=self.shape[2],
            width=self.shape[3],
            sources=_SOURCES[geometry.sources],
            padding=_PADDING[geometry.padding],
            whole=geometry.whole,
            blocks=BlocksArgument.of(self.blocks),
            grouped=self._grouped,
            batch=len(x),
            x=x.data_ptr(),
            a=at,
            s=at + 8 * len(a),
            window=ctypes.addressof(windows),
            ranges=ctypes.addressof(limits),
            control=control.address,
            **{name: result.data_ptr() for name, result in results.items()},
        )
        # Keeps the buffers alive until the library returns.
        return PreparedCall(call, control, (self, x, scales, windows, limits, results))
