"""Work of the host for a batch on a GPU: few operations an image, and no wait for the device."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.kernels.cases import NAMES
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)

BATCH = 16
MOST = 30
"""Operations an image."""
WAITS = "aten._local_scalar_dense.default"
"""Reads a number of the device, as ``item`` and ``float`` do."""


class _NoKernel:
    """A kernel that is launched without effect."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: None


def operations_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the operations of torch in one batch of one level, window and range."""
    from els_kernels.triton import launch
    from els_kernels.triton.attention import TritonAttention

    for form in ("direct", "diagonal", "same_place", "merge"):
        monkeypatch.setattr(launch, f"{form}_kernel", _NoKernel())
    attention = TritonAttention(torch.rand(20, 3, 8, 8))
    counted: Counter[str] = Counter()

    def dispatch(mode: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counted[str(function)] += 1
        return function(*args, **(kwargs or {}))

    # torch's class is not annotated.
    base: Any = TorchDispatchMode
    x, levels = torch.rand(BATCH, 3, 8, 8), [1.0] * BATCH
    with type("Mode", (base,), {"__torch_dispatch__": dispatch})():
        attention(x, levels, levels, [5] * BATCH, [(0, 20)] * BATCH, NAMES[name])
    return counted


@pytest.mark.parametrize("name", ["els-circular", "els-zeros", "els-valid", "local-zeros"])
def test_a_batch_takes_few_operations_an_image_and_waits_for_none(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    operations = operations_of(name, monkeypatch)
    assert operations.total() <= MOST * BATCH
    assert operations[WAITS] == 0
