import pytest
from tests.kernels.cases import NAMES

from els_kernels import IMPLEMENTATIONS, Geometry

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
"""What is judged against the specification: every implementation that is not the specification."""


@pytest.fixture(scope="session", params=FAST)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=list(IMPLEMENTATIONS))
def any_implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(NAMES))
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return NAMES[request.param]
