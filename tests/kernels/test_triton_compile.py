"""The kernels compiled for real, without a GPU: no spills, no overrun, matrix units in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from typing import get_args

import pytest
from tests.support.preloaded import FORKS
from tests.support.rows import all_rows

from els_kernels.triton.tuning import Arch

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]

# 22 binaries with the one that spills: of each form the smallest and the largest. The compile tool
# makes all of them.
NAMES = [
    "direct C=3 k=3",
    "diagonal C=1 k≤25",
    "diagonal C=3 k≤25",
    "diagonal C=3 k≤25 floats",
    "same place C=3",
]
LARGEST = "diagonal C=3 k≤25 floats"
"""The one of them that needs most registers."""
# Of those for Hopper the one that most calls take, and the one with the widest products.
HOPPER = ["diagonal C=3 k≤11", "diagonal C=3 k≤19 floats"]
# The one by displacement that needs most registers, for chips whose binaries are not interpreted
# either (``ptx/test_ptx_planes.py``).
OTHERS = {"sm80": ["fold C=3 k≤17"], "gfx942": ["fold C=3 k≤17"], "sm90": HOPPER}
Facts = tuple[list[str], dict[str, float] | None]


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=FORKS, initializer=_compile_for_real) as pool:
        yield pool


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def facts(arch: Arch, name: str, **tile: int) -> Facts:
    """Return the faults of a binary and its inner loop; ``tile`` replaces what is tuned."""
    from els_kernels.triton.binaries import binaries
    from els_kernels.triton.compile import build, faults

    (binary,) = (binary for binary in binaries(arch) if binary.name == name)
    binary = replace(binary, config=replace(binary.config, **tile))
    report = build(binary)
    return faults(binary, report), report.loop


def always(arch: Arch) -> list[str]:
    """Return the binaries of a chip that every run compiles: the largest, and others in turn."""
    return [
        *NAMES[get_args(Arch).index(arch) :: len(get_args(Arch))],
        LARGEST,
        *OTHERS.get(arch, []),
    ]


@pytest.mark.parametrize("arch", get_args(Arch))
def test_tuned_kernels_neither_spill_nor_overrun_and_use_the_matrix_units(
    compilers: ProcessPoolExecutor, arch: Arch
) -> None:
    names = [*NAMES, *OTHERS.get(arch, [])] if all_rows() else sorted({*always(arch)})
    # Hopper takes the diagonal form from k = 3 on.
    names = [name for name in names if arch != "sm90" or not name.startswith("direct")]
    reports = [compilers.submit(facts, arch, name) for name in names]
    assert [fault for report in reports for fault in report.result()[0]] == []


def test_a_tile_that_spills_is_told(compilers: ProcessPoolExecutor) -> None:
    # One warp instead of four, for the same tile: four times the registers, if there were any.
    wrong, _ = compilers.submit(facts, "sm100", "diagonal C=1 k≤25", num_warps=1).result()
    assert "sm100 diagonal C=1 k≤25: expected no spills, got " in wrong[0]
    # Four warps make the group that the chip's own instruction needs.
    assert wrong[1] == "sm100 diagonal C=1 k≤25: expected UTCHMMA, got HMMA"


def test_the_static_roofline_reads_one_exp2_a_pair_and_allows_the_target(
    compilers: ProcessPoolExecutor,
) -> None:
    _, loop = compilers.submit(facts, "sm90", "diagonal C=3 k≤25").result()
    assert loop is not None
    assert 1 <= loop["exp2"] <= 1.25
    # 5e11 pairs a second leave 59 lane instructions a pair to an H200.
    assert loop["all"] < 59


def pipeline(name: str) -> tuple[list[str], float]:
    """Return the order of products, exp2, waits in each block of PTX, and instructions a pair."""
    import re

    from els_kernels.triton import sass
    from els_kernels.triton.binaries import binaries, compiled
    from els_kernels.triton.counts import step_of

    (binary,) = (binary for binary in binaries("sm90") if binary.name == name)
    code = compiled(binary).asm
    kinds = {f"wgmma.mma_async.sync.aligned.m64n{binary.config.block_n}k16": "p"}
    kinds |= {"ex2.approx": "e", "wgmma.wait_group": "w"}
    pattern = "|".join(map(re.escape, kinds))
    blocks = re.split(r"^\$L__BB\w+:", code["ptx"], flags=re.MULTILINE)
    step = step_of(sass.instructions(code["cubin"]))
    each = binary.config.num_warps * 32 / binary.pairs * (step.product + step.softmax)
    return ["".join(kinds[one] for one in re.findall(pattern, block)) for block in blocks], each


def test_the_products_of_a_row_run_under_the_softmax_of_the_row_before(
    compilers: ProcessPoolExecutor,
) -> None:
    blocks, each = compilers.submit(pipeline, HOPPER[0]).result()
    # All products of the next row, then every exp2 of this one, and only then a wait; the loop ends
    # with the wait of a step without a softmax.
    assert sorted(filter(None, blocks)) == ["e" * 66 + "w", "p" * 12, "w"]
    assert each <= 13
