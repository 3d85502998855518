"""ctypes binding of the C++ library; ctypes releases the GIL during a call.

The library is loaded when the first bank is prepared, not on import.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from els_kernels.control import ComputationStoppedError, Control, current
from els_kernels.geometry import Geometry, Posterior
from els_kernels.native.far_queries import MOST_ERROR, exact_posterior, float_error, is_far

LIBRARY = Path(__file__).with_name("libels_native.so")

_SOURCES = {"same": 0, "every": 1}
_PADDING = {"zeros": 0, "circular": 1, "valid": 2}
NO_MEMORY, STOPPED = 1, 2
"""Return codes of ``els_attend`` and ``els_fold``; 0 means success."""


class _Call(ctypes.Structure):
    """``ElsCall`` of library.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("bank", ctypes.c_void_p),
        ("centre", ctypes.c_void_p),
        ("images", ctypes.c_int64),
        ("channels", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("sources", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("whole", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("s", ctypes.c_void_p),
        ("window", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("log_evidence", ctypes.c_void_p),
        ("control", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        RuntimeError: It was not built, or not from these sources, or cannot be loaded.
    """
    if not LIBRARY.exists():
        raise RuntimeError(
            f"native: {LIBRARY.name} was not built, as no working C++ compiler was at hand when "
            "els-denoise was installed; install one and reinstall, or use 'torch'"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise RuntimeError(f"native: {LIBRARY.name} does not load: {error}") from error
    if not _is_of_these_sources(library):
        # A newer checkout beside an older build: torch is slower, but right.
        raise RuntimeError(
            f"native: {LIBRARY.name} was built from older sources; "
            "reinstall els-denoise, or run 'python kernels/native_build.py'"
        )
    library.els_kernel_name.argtypes = [ctypes.c_int32]
    library.els_kernel_name.restype = ctypes.c_char_p
    library.els_kernel_lanes.argtypes = [ctypes.c_int32]
    library.els_kernel_lanes.restype = ctypes.c_int32
    pointer, size = ctypes.c_void_p, ctypes.c_int32
    library.els_pack.argtypes = [
        size, pointer, pointer, ctypes.c_int64, size, size, size, pointer,
    ]  # fmt: skip
    library.els_pack.restype = None
    library.els_attend.argtypes = [ctypes.POINTER(_Call)]
    library.els_attend.restype = ctypes.c_int32
    library.els_moments.argtypes = [ctypes.c_void_p]
    library.els_moments.restype = ctypes.c_int32
    library.els_fold.argtypes = [ctypes.c_void_p]
    library.els_fold.restype = ctypes.c_int32
    library.els_fold_moments.argtypes = [ctypes.c_void_p]
    library.els_fold_moments.restype = ctypes.c_int32
    return library


def _is_of_these_sources(library: ctypes.CDLL) -> bool:
    """Return whether a library was built from the sources beside it; a wheel has none."""
    if not hasattr(library, "els_sources"):
        return False
    library.els_sources.restype = ctypes.c_char_p
    found = hashlib.sha256()
    paths = sorted(LIBRARY.with_name("src").glob("*.[ch]pp"))
    for path in paths:
        found.update(path.read_bytes())
    return not paths or library.els_sources() == found.hexdigest().encode()


def instruction_sets() -> list[str]:
    """Return the instruction sets of the kernels that this processor can run, best first.

    Raises:
        RuntimeError: The library was not built, or cannot be loaded.
    """
    names: list[str] = []
    while (name := _library().els_kernel_name(len(names))) is not None:
        names.append(name.decode())
    return names


def kernel_index(device: torch.device, instruction_set: str | None) -> int:
    """Return the index of an instruction set in the library, that of the best for None.

    Raises:
        ValueError: The device is not the CPU, or the instruction set is unknown.
        RuntimeError: The library was not built, or cannot be loaded.
    """
    if device.type != "cpu":
        raise ValueError(f"native: expected a bank on the CPU, got one on {device}")
    known = instruction_sets()
    name = known[0] if instruction_set is None else instruction_set
    if name not in known:
        raise ValueError(f"instruction_set: expected one of {', '.join(known)}, got {name!r}")
    return known.index(name)


class Native:
    """A centred bank, packed with one image for each lane of a SIMD vector."""

    def __init__(self, bank: Tensor, *, instruction_set: str | None = None) -> None:
        """Prepare a bank.

        Args:
            bank: [N, C, H, W] float32 on the CPU.
            instruction_set: one of ``instruction_sets()``; None for the best.

        Raises:
            ValueError: The bank is not on the CPU, or the instruction set is unknown.
            RuntimeError: The library was not built, or cannot be loaded.
        """
        self.kernel = kernel_index(bank.device, instruction_set)
        """Index of the instruction set in the library."""
        self.shape = bank.shape
        """[N, C, H, W]."""
        self.centre = bank.mean((0, 2, 3), dtype=torch.float64)
        """[C] float64: what is subtracted from the bank, as float32."""
        images, *image = bank.shape
        lanes = _library().els_kernel_lanes(self.kernel)
        tiles = -(-images // lanes)
        # Aligned to cache lines, which torch's allocator does not guarantee.
        numbers = tiles * math.prod(image) * lanes
        memory = bank.new_empty(numbers + 16)
        aligned = -memory.data_ptr() % 64 // 4
        self.packed = memory[aligned : aligned + numbers].view(tiles, *image, lanes)
        """[tiles, C, H, W, lanes]: the centred bank; lanes past the last image are 0."""
        bank = bank.contiguous()
        _library().els_pack(
            self.kernel,
            bank.data_ptr(),
            self.centre.data_ptr(),
            *bank.shape,
            self.packed.data_ptr(),
        )
        self.largest = max(abs(float(end)) for end in self.packed.aminmax())
        """Largest |pixel| of the centred bank."""

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
            return self._attend(x, a, s, window, ranges, geometry)
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        near = [b for b in range(len(x)) if b not in far]
        if near:
            answer.mean[near], answer.log_evidence[near] = self._attend(
                x[near],
                [a[b] for b in near],
                [s[b] for b in near],
                [window[b] for b in near],
                [ranges[b] for b in near],
                geometry,
            )
        for b in far:
            answer.mean[b], answer.log_evidence[b] = exact_posterior(
                self.images, x[b], a[b], s[b], window[b], ranges[b], geometry
            )
        return answer

    def images(self, first: int, last: int) -> Tensor:
        """Return images ``first`` to ``last`` - 1 of the bank, [n, C, H, W] float64.

        Exact for bytes v as v/127.5 - 1; else but for the rounding of the centred bank.
        """
        lanes = self.packed.shape[-1]
        tiles = self.packed[first // lanes : -(-last // lanes)]
        start = first % lanes
        centred = tiles.movedim(4, 1).flatten(0, 1)[start : start + last - first]
        images = centred.double() + self.centre.float().double()[:, None, None]
        decoded = ((images + 1) * 127.5).round_().float().div_(127.5).sub_(1).double()
        return decoded if (decoded - images).abs().amax() <= 2.0**-22 else images

    def _unresolved(
        self, x: Tensor, a: list[float], s: list[float], window: list[int], geometry: Geometry
    ) -> list[int]:
        """Return the images [B] that are far from the bank and have too coarse logits."""
        found = []
        offset = float(self.centre.abs().amax())
        channels, height, width = self.shape[1:]
        for b, ends in enumerate(torch.stack(x.flatten(1).aminmax(dim=1), dim=1).tolist()):
            size = max(map(abs, ends))
            # Most queries are near by the first bound, which costs least.
            if not is_far(size + a[b] * offset, self.largest, a[b], s[b]):
                continue
            size = float((x[b].double() - a[b] * self.centre[:, None, None]).abs().amax())
            sides = (height, width) if geometry.whole else (window[b], window[b])
            depth = channels * min(sides[0], height) * min(sides[1], width)
            error = float_error(size, self.largest, depth, a[b], s[b])
            if is_far(size, self.largest, a[b], s[b]) and error > MOST_ERROR:
                found.append(b)
        return found

    def _attend(
        self,
        x: Tensor,
        a: list[float],
        s: list[float],
        window: list[int],
        ranges: list[tuple[int, int]],
        geometry: Geometry,
    ) -> Posterior:
        """Return the posteriors that the library computes."""
        x = x.contiguous()
        answer = Posterior(torch.empty_like(x), x.new_empty(len(x), *x.shape[2:]))
        scales = torch.tensor([a, s], dtype=torch.float64, device="cpu")
        windows = torch.tensor(window, dtype=torch.int64, device="cpu")
        limits = torch.tensor(ranges, dtype=torch.int64, device="cpu")
        control = current() or Control()
        call = _Call(
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
            batch=len(x),
            x=x.data_ptr(),
            a=scales[0].data_ptr(),
            s=scales[1].data_ptr(),
            window=windows.data_ptr(),
            ranges=limits.data_ptr(),
            mean=answer.mean.data_ptr(),
            log_evidence=answer.log_evidence.data_ptr(),
            control=control.address,
        )
        # Keeps the buffers alive until the library returns.
        alive = (self, x, scales, windows, limits, answer)
        run_apart(_library().els_attend, call, control, alive, "this batch")
        return answer


def run_apart(
    function: Callable[[object], int],
    call: ctypes.Structure,
    control: Control,
    alive: object,
    task: str,
) -> None:
    """Call a library function; Ctrl-C ends it after running tiles.

    Args:
        function: returns 0, ``NO_MEMORY`` or ``STOPPED``.
        call: its argument.
        control: of the call.
        alive: what the buffers of the call belong to.
        task: what the call computes, for errors.

    Raises:
        ComputationStoppedError: The control was stopped.
        MemoryError: The partial results do not fit in memory.
    """
    status = _status(function, call, control, alive)
    if status == STOPPED:
        raise ComputationStoppedError("native: stopped between two tiles")
    if status == NO_MEMORY:
        raise MemoryError(f"native: no memory for the partial results of {task}")


def _status(
    function: Callable[[object], int], call: ctypes.Structure, control: Control, alive: object
) -> int:
    # Signals reach Python in the main thread alone, and only while that is not inside the library.
    if threading.current_thread() is not threading.main_thread():
        return int(function(ctypes.byref(call)))
    said: list[int] = []

    def work(alive: object) -> None:
        said.append(function(ctypes.byref(call)))

    worker = threading.Thread(target=work, args=((control, alive),), name="els-native")
    try:
        worker.start()
        worker.join()
    except BaseException:
        control.stop()
        raise
    return said[0]
