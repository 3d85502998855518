from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from tests.support.preloaded import FORKS


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton compiles; in this one it interprets the source."""
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=_compile_for_real) as pool:
        yield pool


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
