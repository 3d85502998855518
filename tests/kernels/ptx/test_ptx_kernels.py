"""The compiled kernels, interpreted: right, within their memory, and without a race."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest

# The project has to work without triton.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("triton") is None,
        reason="triton is not installed: pip install 'els-denoise[gpu]'",
    ),
]


def interpret_all() -> tuple[dict[str, str], set[str]]:
    """Return the faults of each case, and the kernels that ran."""
    from tests.kernels.ptx.cases import FAST, outcome

    found = [outcome(shape) for shape in FAST]
    kernels = {launch.kernel for one in found for launch in one.launches}
    return {one.shape: one.excess + one.faults for one in found}, kernels


def interpret_mutations() -> dict[str, str]:
    """Return the changes of which the interpreter does not report what it should, and what it does.

    A changed kernel whose answer is wrong exceeds its budget.
    """
    from tests.kernels.ptx.cases import outcome
    from tests.kernels.ptx.mutations import MUTATIONS, WRONG_ANSWER

    missed = {}
    for mutation in MUTATIONS:
        one = outcome(mutation.shape, mutation)
        only_answer = mutation.found == WRONG_ANSWER
        if not one.excess if only_answer else mutation.found not in one.faults:
            missed[mutation.name] = one.excess + one.faults
    return missed


def launched(name: str) -> tuple[set[str], set[str], set[str]]:
    """Return the binaries of a warm-up, those of requests, and those of the compile tool.

    The bank has an odd number of pixels, so that parts of it are not aligned.
    """
    import torch
    from tests.kernels.cases import NAMES, random_bank
    from tests.kernels.ptx.driver import InterpretingDriver, interpreting

    from els_kernels.triton.attention import TritonAttention
    from els_kernels.triton.binaries import binaries, compiled

    device = InterpretingDriver("sm90", dry=True)
    geometry, ranges = NAMES[name], [(0, 5), (1, 3), (3, 4)]
    windows = [1] if geometry.whole else [3, 5, 7]
    with interpreting(device, "sm90"):
        attention = TritonAttention(random_bank((5, 1, 9, 9), of_bytes=True))
        attention.warm_up(windows, geometry)
        warm = {launch.hash for launch in device.launches}
        for k in windows:
            for s in (0.1, 1e5):
                x = torch.ones(3, 1, 9, 9)
                attention(x, [1.0] * 3, [s] * 3, [k] * 3, ranges, geometry)
    constants = [(launch.kernel, launch.constants) for launch in device.launches]
    tool = {
        compiled(binary).hash
        for binary in binaries("sm90", (1,))
        if (binary.kernel.__name__, binary.constants) in constants
    }
    return warm, {launch.hash for launch in device.launches}, tool


@pytest.mark.parametrize("name", ["els-zeros", "local-circular"])
def test_requests_compile_nothing_after_the_warm_up_nor_the_warm_up_after_the_compile_tool(
    compiler: ProcessPoolExecutor, name: str
) -> None:
    warm, all_of_them, tool = compiler.submit(launched, name).result()
    assert len(warm) > 1
    assert all_of_them - warm == set()
    assert all_of_them - tool == set()


def test_every_kernel_is_right_in_bounds_and_free_of_races(compiler: ProcessPoolExecutor) -> None:
    wrong, kernels = compiler.submit(interpret_all).result()
    assert {name: text for name, text in wrong.items() if text} == {}
    forms = {"direct", "diagonal", "hopper", "same_place", "merge"}
    assert kernels == {f"{form}_kernel" for form in forms}


def test_every_fault_put_into_a_kernel_is_found(compiler: ProcessPoolExecutor) -> None:
    assert compiler.submit(interpret_mutations).result() == {}
