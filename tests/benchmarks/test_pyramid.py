"""The sampler of pictures beside its matmul form: compared before it is timed, part by part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks.pyramid import __main__ as benchmark
from benchmarks.pyramid import matmul

from els_service.denoisers.base import Query

TINY = ["--dirty", "--repeats", "1", "--seeds", "2", "--size", "24", "32"]


@pytest.fixture(autouse=True)
def _denormals(monkeypatch: pytest.MonkeyPatch) -> None:
    # A setting of the process, which other tests share.
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: on)


@pytest.mark.slow
def test_parts_of_one_day_and_commit_are_collected_in_one_record(tmp_path: Path) -> None:
    out = tmp_path / "pyramid.json"
    for part in ("small", "table", "seeds"):
        benchmark.main([*TINY, "--only", part, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in rows] == ["small", *["table"] * 3, "seeds"]
    assert rows[0]["difference"] <= benchmark.BUDGET
    assert rows[0]["whole_s"] > 0
    assert rows[-1]["alike"] == rows[-1]["seeds"] == 2


@pytest.mark.slow
def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = matmul.MatmulDenoiser.denoise

    def wrong(self: matmul.MatmulDenoiser, query: Query) -> object:
        answer = right(self, query)
        answer.pixels += 0.01
        return answer

    monkeypatch.setattr(matmul.MatmulDenoiser, "denoise", wrong)
    out = tmp_path / "pyramid.json"
    benchmark.main([*TINY, "--only", "small", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["refused"] == "difference above 0.001"
    assert "whole_s" not in row
