"""Which GPUs take which tiles, and which take none."""

from __future__ import annotations

import importlib
import logging
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from els_kernels.attention import fastest
from els_kernels.triton.chips import architecture, unsuited

GPU = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)


def nvidia(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


def amd(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm80"),
        ((8, 9), "sm80"),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((11, 0), "sm100"),
        # Consumer chips of Blackwell have neither tcgen05 nor wgmma.
        ((12, 0), "sm80"),
        ((12, 1), "sm80"),
    ],
)
def test_a_chip_takes_the_tiles_of_the_matrix_units_that_it_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], tiles: str
) -> None:
    nvidia(monkeypatch, *capability)
    assert unsuited(GPU) is None
    assert architecture(GPU) == tiles


@needs_triton
@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_auto_takes_torch_on_a_chip_too_old_for_the_kernels_and_logs_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
) -> None:
    nvidia(monkeypatch, *capability)
    on_gpu: Any = SimpleNamespace(device=GPU)
    with caplog.at_level(logging.WARNING):
        assert fastest(on_gpu) == "torch"
    major, minor = capability
    assert f"expected a GPU of compute capability 8.0 or newer, got {major}.{minor}" in caplog.text
    with pytest.raises(ValueError, match=f"got {major}.{minor}"):
        architecture(GPU)


def test_an_amd_chip_without_matrix_units_is_not_taken_for_one_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    amd(monkeypatch, "gfx942:sramecc+:xnack-")
    assert architecture(GPU) == "gfx942"
    amd(monkeypatch, "gfx1100")
    assert unsuited(GPU) == "expected a GPU with matrix units (gfx942, gfx950), got gfx1100"


@needs_triton
class TestHopper:
    """Which queries Hopper's own kernel serves."""

    @staticmethod
    def served(shape: tuple[int, int, int, int] = (1, 3, 32, 32), window: int = 11) -> bool:
        from els_kernels.triton.hopper_launch import serves
        from els_kernels.triton.launch import Queries

        # Shapes alone count.
        terms = torch.empty(2, *shape, dtype=torch.float16, device="meta")
        batch = Queries(terms, *(torch.empty(shape[0], device="meta") for _ in range(3)))
        return serves("sm90", batch, window, 1)

    @pytest.fixture
    def compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Gluon is imported before, as the process was started.
        importlib.import_module("els_kernels.triton.hopper_launch")
        from triton import knobs

        monkeypatch.setattr(knobs.runtime, "interpret", False)

    @pytest.mark.usefixtures("compiled")
    def test_it_serves_windows_up_to_19_of_colour_images_and_75_of_gray_ones(self) -> None:
        assert all(self.served(window=k) for k in range(3, 20, 2))
        assert not self.served(window=21)
        assert self.served((4, 1, 80, 80), 75)
        assert not self.served((4, 1, 80, 80), 77)

    @pytest.mark.usefixtures("compiled")
    def test_it_leaves_what_its_tile_or_its_offsets_do_not_hold(self) -> None:
        assert self.served((1, 4, 8, 8), 3)
        assert not self.served((1, 5, 8, 8), 3)
        assert self.served((1, 3, 800, 800))
        assert not self.served((1, 3, 900, 900))

    def test_the_interpreter_of_the_source_takes_the_kernel_of_all_chips(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from triton import knobs

        monkeypatch.setattr(knobs.runtime, "interpret", True)
        assert not self.served()

    @pytest.mark.usefixtures("compiled")
    def test_an_older_triton_takes_the_kernel_of_all_chips(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from triton.experimental.gluon.language.nvidia.ampere import async_copy

        monkeypatch.delattr(async_copy, "async_load")
        assert not self.served()
