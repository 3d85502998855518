"""The kernels by displacement compiled for real, without a GPU: no spills, no overrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import pytest

from els_kernels.triton.tuning import Arch

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]

# That which needs most registers, for chips whose binaries are not interpreted either
# (``ptx/test_ptx_planes.py``). The compile tool makes all of them.
NAME = "fold C=3 k≤17"
ARCHS: tuple[Arch, ...] = ("sm80", "gfx942")


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_compile_for_real) as pool:
        yield pool


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def faults_of(arch: Arch) -> list[str]:
    from els_kernels.triton.binaries import binaries
    from els_kernels.triton.compile import build, faults

    (binary,) = (binary for binary in binaries(arch) if binary.name == NAME)
    return faults(binary, build(binary))


def test_plane_kernels_neither_spill_nor_overrun_and_use_the_matrix_units(
    compilers: ProcessPoolExecutor,
) -> None:
    reports = [compilers.submit(faults_of, arch) for arch in ARCHS]
    assert [fault for report in reports for fault in report.result()] == []
