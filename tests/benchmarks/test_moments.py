"""Moments beside a plain denoise: compared with the float64 form before they are timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.moments import __main__ as benchmark
from tests.kernels.conftest import missing
from torch import Tensor

from els_kernels.native.moments_binding import NativeQuery

TINY = ["--dirty", "--rounds", "1", "--shapes", "5,1,11,11"]
pytestmark = pytest.mark.skipif(
    missing("native-baseline") is not None,
    reason="the native kernel was not built: install a C++ compiler and els-denoise again",
)


@pytest.fixture(autouse=True)
def _denormals(monkeypatch: pytest.MonkeyPatch) -> None:
    # A setting of the process, which other tests share.
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: on)


@pytest.mark.slow
def test_every_padding_and_level_is_timed_beside_a_plain_denoise(tmp_path: Path) -> None:
    out = tmp_path / "moments.json"
    benchmark.main([*TINY, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == len(benchmark.PADDINGS) * len(benchmark.LEVELS)
    for row in rows:
        assert row["difference"] <= benchmark.BUDGET
        for name in ("statistics", "sources", "all", "jvp", "vjp"):
            low, high = row[f"{name}_extremes"]
            assert 0 < low <= row[name] <= high


@pytest.mark.slow
def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeQuery.vjp

    def wrong(self: NativeQuery, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        mean, product = right(self, cotangent)
        return mean, product + 0.01

    monkeypatch.setattr(NativeQuery, "vjp", wrong)
    out = tmp_path / "moments.json"
    benchmark.main([*TINY, "--out", str(out)])
    for row in json.loads(out.read_text())["rows"]:
        assert row["refused"] == "difference above 0.0001"
        assert "vjp" not in row
