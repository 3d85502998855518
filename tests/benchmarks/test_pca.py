"""PCA-locality is checked against float64 before it is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import pca

from els_service.denoisers.base import Denoised, Query
from els_service.denoisers.pca import PcaDenoiser


def test_every_level_is_timed_and_one_without_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pca.SHAPES, "grey", (1, 12, 12))
    out = tmp_path / "pca.json"
    options = ["--images", "30", "--rounds", "1", "--only", "grey", "--dirty", "--out", str(out)]
    pca.main(options)
    rows = json.loads(out.read_text())["rows"]
    assert [row["sigma"] for row in rows[:-1]] == list(pca.SIGMAS)
    assert rows[-1]["threshold"] == "dense"
    assert all(row["step_s"] > 0 for row in rows)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = pca.noise_bank((1, 12, 12), 30)
    monkeypatch.setattr(pca, "noise_bank", lambda shape, images: bank)
    denoise = PcaDenoiser.denoise

    def wrong(self: PcaDenoiser, query: Query) -> Denoised:
        answer = denoise(self, query)
        answer.pixels[0, 0, 0, 0] += 0.1
        return answer

    monkeypatch.setattr(PcaDenoiser, "denoise", wrong)
    with pytest.raises(SystemExit, match="coordinate 0 at"):
        next(pca.measured("grey", 30, 1))
