import pytest
import torch
from tests.kernels.cases import NAMES

from els_kernels import IMPLEMENTATIONS, Geometry, PatchAttention


def is_there(name: str) -> bool:
    """Return whether an implementation can be had: the native one needs a compiler to be built."""
    try:
        PatchAttention(torch.zeros(1, 1, 1, 1), implementation=name)
    except RuntimeError:
        return False
    return True


THERE = [name for name in IMPLEMENTATIONS if is_there(name)]
FAST = [name for name in THERE if name != "reference"]
"""What is judged against the specification: every implementation that is not the specification."""


@pytest.fixture(scope="session", params=FAST)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=THERE)
def any_implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(NAMES))
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return NAMES[request.param]
