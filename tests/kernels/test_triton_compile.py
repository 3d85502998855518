"""The kernels compiled for real, without a GPU: no spills, no overrun, matrix units in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import get_args

import pytest

from els_kernels.triton.tuning import SHARED_BYTES, Arch

# The project has to work without triton.
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)

# 24 binaries: of each form the smallest and the largest. The compile tool makes all of them.
NAMES = [
    "direct C=3 k=3",
    "diagonal C=1 k≤25",
    "diagonal C=3 k≤25",
    "same place C=3",
    "shift logits",
    "shift responses",
]
MATRIX = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA", "gfx942": "v_mfma"}
Facts = tuple[int, int, str, dict[str, float] | None]


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    spawn = get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_compile_for_real) as pool:
        yield pool


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def facts(arch: Arch, name: str) -> Facts:
    from els_kernels.triton.compile import binaries, build

    (binary,) = (binary for binary in binaries(arch) if binary.name == name)
    report = build(binary)
    return report.spills, report.shared, report.matrix, report.loop


@pytest.mark.parametrize("arch", get_args(Arch))
def test_tuned_kernels_neither_spill_nor_overrun_and_use_the_matrix_units(
    compilers: ProcessPoolExecutor, arch: Arch
) -> None:
    reports = {name: compilers.submit(facts, arch, name) for name in NAMES}
    for name, report in reports.items():
        spills, shared, matrix, _ = report.result()
        assert spills == 0, name
        assert shared <= SHARED_BYTES[arch], name
        # 32 × 32 tiles are too small for the wide instructions of Hopper and Blackwell.
        expected = "HMMA" if name.startswith("same") and arch != "gfx942" else MATRIX[arch]
        assert expected in matrix, name


def test_the_static_roofline_reads_one_exp2_a_pair_and_allows_the_target(
    compilers: ProcessPoolExecutor,
) -> None:
    *_, loop = compilers.submit(facts, "sm90", "diagonal C=3 k≤25").result()
    assert loop is not None
    assert 1 <= loop["exp2"] <= 1.25
    # 5e11 pairs a second leave 59 lane instructions a pair to an H200.
    assert loop["all"] < 59
