"""Run by ``tests/e2e/test_adapters.py`` with the Python of ``make adapters``, beside a server.

The server has the models ``ideal`` and ``els`` over one bank of clothes, which does not have the
picture of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from els_client import Client

LIBRARIES = ("azula", "deepinv", "k_diffusion", "smalldiffusion")
collect_ignore_glob = [] if all(map(find_spec, LIBRARIES)) else ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", help="address of the server")
    parser.addoption("--pictures", type=Path, help="file with the bank and the picture")


@pytest.fixture(scope="session")
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(request.config.getoption("target"), timeout_s=60) as client:
        yield client


@pytest.fixture(scope="session")
def pictures(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """``bank`` [N, 1, 28, 28] and ``picture`` [1, 1, 28, 28], in [0, 1]."""
    with np.load(request.config.getoption("pictures")) as file:
        return {name: torch.from_numpy(file[name]).float() / 255 for name in file}
