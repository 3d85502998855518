"""ctypes binding of the C++ library; ctypes releases the GIL during a call.

The library is loaded when the first bank is prepared, not on import.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from els_kernels.blocks import Blocks
from els_kernels.control import ComputationStoppedError, Control

LIBRARY = Path(__file__).with_name("libels_native.so")

_SOURCES = {"same": 0, "every": 1}
_PADDING = {"zeros": 0, "circular": 1, "valid": 2}
NO_MEMORY, STOPPED = 1, 2
"""Return codes of ``els_attend`` and ``els_fold``; 0 means success."""


class BlocksArgument(ctypes.Structure):
    """``ElsBlocks`` of blocks.hpp."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("images", ctypes.c_int64),
    )

    @classmethod
    def of(cls, blocks: Blocks) -> BlocksArgument:
        """Return the argument for the blocks of a process."""
        return cls(blocks.size, blocks.first, blocks.stride, blocks.images)


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
    library.els_attend.argtypes = [ctypes.c_void_p]
    library.els_attend.restype = ctypes.c_int32
    library.els_merge.argtypes = [ctypes.c_void_p]
    library.els_merge.restype = ctypes.c_int32
    library.els_moments.argtypes = [ctypes.c_void_p]
    library.els_moments.restype = ctypes.c_int32
    library.els_fold.argtypes = [ctypes.c_void_p]
    library.els_fold.restype = ctypes.c_int32
    library.els_fold_normalisers.argtypes = [ctypes.c_void_p]
    library.els_fold_normalisers.restype = None
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
