"""Settled before anything is imported; marks and examples of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, as the server does: threads that spin starve those of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch.compile would start processes that import torch, for a compilation of seconds.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from tests.support.rows import all_rows, kept

# Without a GPU Triton's kernels are interpreted. Triton asks when it is imported, which may be by
# torch, long before the tests of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tests/support/examples.py scales its numbers by max_examples.
settings.register_profile("ci", max_examples=50, deadline=None)
settings.register_profile("fast", max_examples=10, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile("ci")

FOLDERS = Path(__file__).parent
MARKED_FOLDERS = {FOLDERS / "e2e": "e2e", FOLDERS / "fuzz": "fuzz"}
"""Every test in the folder has the mark."""
THREADED = FOLDERS / "kernels" / "test_native.py"
"""Tests of work that is split among threads, beside those that set their number."""
CORES = torch.get_num_threads()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without looking for garbage: there is none, and it takes a third of the time.

    Afterwards what was collected is never looked at: it lives as long as the process.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for folder, mark in MARKED_FOLDERS.items():
            if folder in item.path.parents:
                item.add_marker(mark)
    if all_rows():
        return
    rows = kept(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in rows])
    items[:] = [item for item in items if item in rows]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give the tests of each of several workers one thread, as commands may have set others.

    The tensors of tests are small: two threads take half as much CPU time again as one.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(CORES if item.path == THREADED else 1)
