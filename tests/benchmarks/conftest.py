"""Servers of benchmarks are forked from a process that has imported torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from benchmarks.service import servers
from tests.support.preloaded import forked_by


@pytest.fixture(autouse=True)
def _forked_servers() -> Iterator[None]:
    with forked_by(servers):
        yield
