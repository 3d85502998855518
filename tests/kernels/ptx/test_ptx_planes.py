"""The compiled kernels by displacement, interpreted: the fold and its moments, small cases."""

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


def outcome_of(name: str) -> tuple[str, int, float]:
    """Return the faults of a case, binaries that its warm-up missed, and its error in budgets."""
    from tests.kernels.ptx.planes import PLANES

    found = PLANES[name]()
    return found.faults, found.new, max(found.errors)


# "moments" have no operation that those of a fold lack: ``python -m tests.kernels.ptx`` has them.
@pytest.mark.parametrize("name", ["fold", "moments of a fold"])
def test_planes_are_right_in_bounds_free_of_races_and_compiled_by_the_warm_up(
    compiler: ProcessPoolExecutor, name: str
) -> None:
    faults, new, error = compiler.submit(outcome_of, name).result()
    assert (faults, new) == ("", 0)
    assert error <= 1
