"""A driver of Triton that interprets what Triton has compiled, under its own launcher.

Arguments, their specialisation and the cache of binaries are Triton's own; only the launch itself
runs here. Needs a process in which ``TRITON_INTERPRET`` was not set when Triton was imported.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.kernels.ptx.faults import Faults
from tests.kernels.ptx.machine import Machine
from tests.kernels.ptx.matrix import Rounding
from tests.kernels.ptx.program import Program, parse
from tests.kernels.ptx.threads import Array
from triton.runtime import driver as drivers
from triton.runtime.cache import get_cache_manager

from els_kernels.triton import attention, tuning
from els_kernels.triton.targets import CHIPS, TargetDriver

_MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One launch of a binary."""

    kernel: str
    hash: str
    """Triton's name of the binary in its cache."""
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    executed: Counter[str]
    """Operation → number of times that a warp executed it."""


class InterpretingDriver(TargetDriver):
    """Driver of a chip whose launches are interpreted.

    Args:
        chip: a key of ``CHIPS``.
        rounding: of the matrix units.
        mutate: changes the PTX of a kernel before it runs, given its name and its text.
        dry: whether launches compute nothing, and only the binaries are of interest.
    """

    def __init__(
        self,
        chip: str,
        rounding: Rounding = "exact",
        mutate: Callable[[str, str], str] | None = None,
        *,
        dry: bool = False,
    ) -> None:
        super().__init__(chip)
        self.faults = Faults()
        self.launches: list[Launch] = []
        self.rounding, self._mutate, self._dry = rounding, mutate, dry
        self._arch = CHIPS[chip].arch
        self._programs: dict[str, Program] = {}
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the launcher of a binary."""

        def launch(*arguments: Any) -> None:
            x, y, z = arguments[:3]
            # After the grid: stream, function, two kinds of metadata, two hooks.
            values = dict(zip(source.signature, arguments[9:], strict=True))
            # Triton keeps a binary with its launcher longer than this driver may be the active one.
            drivers.active._launch(source, metadata, (x, y, z), values)

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return module, function, registers, spills and largest number of threads."""
        return object(), 0, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Forget a module."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the limits of the chip."""
        return {"max_shared_mem": tuning.SHARED_BYTES[self._arch]}

    def _launch(
        self, source: Any, metadata: Any, grid: tuple[int, int, int], values: dict[str, Any]
    ) -> None:
        if not all(1 <= n <= most for n, most in zip(grid, _MAX_GRID, strict=True)):
            raise ValueError(f"grid: expected from 1 to {_MAX_GRID}, got {grid}")
        executed: Counter[str] = Counter()
        if not self._dry:
            executed = self._run(source, metadata, grid, values)
        constants = {
            name: values[name] for name, kind in source.signature.items() if kind == "constexpr"
        }
        launch = Launch(metadata.name, metadata.hash, grid, constants, executed)
        self.launches.append(launch)

    def _run(
        self, source: Any, metadata: Any, grid: tuple[int, int, int], values: dict[str, Any]
    ) -> Counter[str]:
        given = [values[name] for name, kind in source.signature.items() if kind != "constexpr"]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        owners = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        storages = [_bytes_of(storage) for storage in owners.values()]
        machine = Machine(
            self._program(metadata),
            grid,
            metadata.num_warps,
            metadata.shared,
            storages,
            self.rounding,
            self.faults,
        )
        number = {pointer: i for i, pointer in enumerate(owners)}
        machine.run(
            [
                machine.memory.address(number[value.untyped_storage().data_ptr()])
                + int(value.storage_offset()) * value.element_size()
                if isinstance(value, torch.Tensor)
                else int(value)
                for value in given
            ]
        )
        for i, data in enumerate(storages):
            data[:] = machine.memory.content(i, len(data))
        return machine.executed

    def _program(self, metadata: Any) -> Program:
        if metadata.hash not in self._programs:
            path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
            text = Path(path).read_text()
            if self._mutate is not None:
                text = self._mutate(metadata.name, text)
            self._programs[metadata.hash] = parse(text)
        return self._programs[metadata.hash]


def _bytes_of(storage: Any) -> Array:
    """Return a storage's memory, not a copy."""
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return np.frombuffer(memory, np.uint8)


@contextmanager
def interpreting(device: InterpretingDriver, chip: str) -> Iterator[None]:
    """Let kernels run by a driver within the context, on banks on the CPU.

    New tensors are filled with NaN, so that what a kernel leaves out is seen.
    """
    before, architecture = drivers._active, vars(attention)["architecture"]
    drivers.set_active(device)
    vars(attention)["architecture"] = lambda _: CHIPS[chip].arch
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        vars(attention)["architecture"] = architecture
        drivers._active = before
