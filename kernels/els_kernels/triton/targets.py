"""Chips that Triton compiles for where there is none: drivers that can compile but not launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from els_kernels.triton.tuning import Arch


class Chip(NamedTuple):
    """A chip and the tiles that it takes."""

    arch: Arch
    target: GPUTarget


CHIPS: dict[str, Chip] = {
    "sm80": Chip("sm80", GPUTarget("cuda", 80, 32)),
    "sm86": Chip("sm80", GPUTarget("cuda", 86, 32)),
    "sm89": Chip("sm80", GPUTarget("cuda", 89, 32)),
    "sm90": Chip("sm90", GPUTarget("cuda", 90, 32)),
    "sm100": Chip("sm100", GPUTarget("cuda", 100, 32)),
    "sm120": Chip("sm80", GPUTarget("cuda", 120, 32)),
    "gfx942": Chip("gfx942", GPUTarget("hip", "gfx942", 64)),
}


class TargetDriver:
    """Driver of one chip, as far as Triton needs one to compile.

    Triton keeps the binaries of each device by its number, so that each chip has one of its own.
    """

    def __init__(self, chip: str) -> None:
        self._target = CHIPS[chip].target
        self._device = list(CHIPS).index(chip)

    def get_current_target(self) -> GPUTarget:
        """Return the chip."""
        return self._target

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


@contextmanager
def compiling_for(chip: str) -> Iterator[None]:
    """Let kernels that are warmed up within the context be compiled for a chip."""
    before = driver._active
    driver.set_active(TargetDriver(chip))
    try:
        yield
    finally:
        driver._active = before
