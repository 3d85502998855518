"""The kernels by displacement compiled for real, without a GPU: no spills, no overrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import get_args

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

# Those that need most registers. The compile tool makes all of them.
NAMES = ["fold C=3 k≤17"]


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_compile_for_real) as pool:
        yield pool


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def faults_of(arch: Arch, name: str) -> list[str]:
    from els_kernels.triton.compile import binaries, build, faults

    (binary,) = (binary for binary in binaries(arch) if binary.name == name)
    return faults(binary, build(binary))


def test_plane_kernels_neither_spill_nor_overrun_and_use_the_matrix_units(
    compilers: ProcessPoolExecutor,
) -> None:
    reports = [compilers.submit(faults_of, arch, name) for arch in get_args(Arch) for name in NAMES]
    assert [fault for report in reports for fault in report.result()] == []
