"""The bank of a data set is built and served by the commands that operators use."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from benchmarks import full_bank
from PIL import Image

SHAPE = (40, 12, 12)


@pytest.mark.slow
def test_a_data_set_becomes_a_bank_in_parts_whose_steps_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    header = struct.pack(">IIII", 0x803, *SHAPE)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    tiny = full_bank.DataSet("tiny", "npm", "images-idx3-ubyte")
    monkeypatch.setitem(full_bank.DATA_SETS, "tiny", tiny)
    out, pictures = tmp_path / "out.json", tmp_path / "pictures"
    full_bank.main(
        [
            *("tiny", "--data", str(tmp_path), "--shard-size", "16", "--steps", "2"),
            *("--picture", str(pictures), "--dirty", "--out", str(out)),
        ]
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["data_set"], row["build"]["images"], row["build"]["parts"]) == ("tiny", 40, 3)
    assert list(map(float, row["seconds_an_image_and_step_by_sigma"])) == list(full_bank.SIGMAS)
    with Image.open(pictures / "tiny.png") as picture:
        assert picture.size == (8 * SHAPE[2], 8 * SHAPE[1])
