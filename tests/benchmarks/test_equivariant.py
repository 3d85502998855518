"""The equivariant machine is compared with torch's transforms before it is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import equivariant
from benchmarks.record import ROOT


def test_every_shape_is_timed_beside_torch(tmp_path: Path) -> None:
    out = tmp_path / "equivariant.json"
    equivariant.main(
        ["--images", "3", "--rounds", "2", "--batch", "2", "--dirty", "--out", str(out)]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [tuple(row["shape"]) for row in rows] == list(equivariant.SHAPES)
    assert all(row["native_ms"] > 0 and row["torch_over_native"] > 0 for row in rows)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = equivariant.Subject.mean

    def wrong(self: equivariant.Subject, s: float) -> torch.Tensor:
        return right(self, s) + torch.rand(1)

    monkeypatch.setattr(equivariant.Subject, "mean", wrong)
    with pytest.raises(ValueError, match="expected answers within"):
        equivariant.main(["--images", "3", "--rounds", "1", "--dirty"])


@pytest.mark.slow
def test_another_checkout_answers_in_a_process_of_its_own() -> None:
    with equivariant.another_build(ROOT, (1, 4, 4), 2, 2) as seconds:
        assert seconds() > 0
