"""Memory of a bank on a GPU while it is loaded, and of the states of a batch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tests.kernels.cases import NAMES, random_bank, random_case
from tests.support.tensor_memory import TensorMemory, nbytes

from els_kernels import PatchAttention

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)


def bytes_of(bank: torch.Tensor) -> torch.Tensor:
    return ((bank + 1) * 127.5).round().to(torch.uint8)


def test_a_bank_of_bytes_loads_within_a_third_more_than_its_final_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from els_kernels.triton import precision

    bank = bytes_of(random_bank((64, 3, 32, 32), of_bytes=True))
    # 1.28 million images of 64 × 64 are converted in four thousand blocks.
    monkeypatch.setattr(precision, "_BLOCK_ELEMENTS", bank.numel() // 64)
    with TensorMemory() as memory:
        memory.add(bank)
        attention: Any = PatchAttention(bank, implementation="triton")
    final = nbytes(attention.prepared._keys.terms, attention.prepared._values)
    assert memory.peak <= 1.3 * final
    # Only the bank and its mean remain beside them, and belong to the caller.
    assert memory.live - final - bank.numel() < 1024


def test_a_bank_of_floats_loads_beside_its_own_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from els_kernels.triton import precision

    bank = random_bank((64, 3, 32, 32))
    monkeypatch.setattr(precision, "_BLOCK_ELEMENTS", bank.numel() // 64)
    with TensorMemory() as memory:
        attention: Any = PatchAttention(bank, implementation="triton")
    final = nbytes(attention.prepared._keys.terms, attention.prepared._values)
    assert memory.peak <= nbytes(bank) + 1.1 * final


@pytest.mark.parametrize("implementation", ["triton", "torch", "reference"])
@pytest.mark.slow
def test_bytes_and_their_pixels_are_the_same_bank(implementation: str) -> None:
    case = random_case(NAMES["local-zeros"], (9, 3, 5, 4), [3], of_bytes=True)
    of_bytes = PatchAttention(bytes_of(case.bank), implementation=implementation)
    of_pixels = PatchAttention(case.bank, implementation=implementation)
    for got, want in zip(case.ask(of_bytes), case.ask(of_pixels), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["els-zeros", "els-circular"])
@pytest.mark.slow
def test_the_memory_of_states_does_not_grow_with_the_number_of_slabs(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from els_kernels.triton import launch
    from els_kernels.triton.attention import TritonAttention

    slots: list[int] = []
    merge = launch.merged

    def recorded(peak: torch.Tensor, *rest: Any) -> Any:
        slots.append(peak.shape[1])
        return merge(peak, *rest)

    monkeypatch.setattr(launch, "merged", recorded)
    # Two images a slab.
    monkeypatch.setattr(launch, "_SLAB_BYTES", 2048)

    def slots_of(images: int) -> list[int]:
        slots.clear()
        attention = TritonAttention(random_bank((images, 1, 4, 5)), form="diagonal")
        x = torch.ones(1, 1, 4, 5)
        attention(x, [1.0], [1.0], [5], [(0, images)], NAMES[name])
        return list(slots)

    assert slots_of(6) == slots_of(2)
