"""Models with kernels in Triton: compiled before the first request, predicted as a GPU's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.denoisers import SHAPE, random_images

from els_kernels import FoldedAttention, FoldedMoments, PatchAttention, PatchMoments
from els_service.denoisers.analytic import AnalyticDenoiser
from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.folded import FoldedDenoiser
from els_service.denoisers.levels import from_time
from els_service.denoisers.windows import WindowTable

# The project has to work without triton.
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install 'els-denoise[gpu]'"
)

TABLE = WindowTable((0.5, 2.0), (3, 5))


@pytest.fixture
def bank() -> Bank:
    pixels = ((random_images((20, *SHAPE), 1).clamp(-1, 1) + 1) * 127.5).round()
    return make_bank(pixels.to(torch.uint8).numpy(), np.zeros(20, np.int64))


def folded(bank: Bank, implementation: str) -> FoldedDenoiser:
    attention = FoldedAttention(bank.pixels(), implementation=implementation)
    return FoldedDenoiser(
        FoldedMoments(attention), bank, machine="els", padding="inside", fold=0.2, window=TABLE
    )


def plain(bank: Bank, implementation: str) -> AnalyticDenoiser:
    attention = PatchAttention(bank.pixels(), implementation=implementation)
    return AnalyticDenoiser(attention, bank, machine="els", window=TABLE)


def test_a_fold_on_a_gpu_is_predicted_to_take_less_than_one_on_a_cpu(bank: Bank) -> None:
    query = make_query(random_images((1, *SHAPE), 5), from_time([0.5]))
    on_gpu, on_cpu = (folded(bank, name).predict_seconds(query) for name in ("triton", "torch"))
    assert 0 < on_gpu < on_cpu


def test_moments_on_a_gpu_are_predicted_from_a_denoise_there(bank: Bank) -> None:
    query = make_query(random_images((1, *SHAPE), 5), from_time([0.5]))
    model = plain(bank, "triton")
    once = model.predict_seconds(query)
    for seconds in (
        model.predict_explain_seconds(query),
        model.predict_product_seconds(query, "vjp"),
    ):
        assert once < seconds < 0.01


def test_a_model_compiles_the_kernels_of_its_windows_for_all_that_it_answers(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, int, int]] = []

    def recorded(self: Any, windows: Any, geometry: object) -> None:
        compiled.append((type(self).__name__, min(windows), max(windows)))

    for kind in (PatchAttention, PatchMoments, FoldedAttention, FoldedMoments):
        monkeypatch.setattr(kind, "warm_up", recorded)
    plain(bank, "triton").warm_up()
    folded(bank, "triton").warm_up()
    expected = ["PatchAttention", "PatchMoments", "FoldedAttention", "FoldedMoments"]
    assert compiled == [(name, 3, 5) for name in expected]
