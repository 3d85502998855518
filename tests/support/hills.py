"""A model of one small picture, and another beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

DOCUMENT = "kind: picture\npictures: [photo.png]\npatch: 5\nfinest: 24\nsteps: 4\n"
FLAT = "kind: gaussian\nshape: [3, 8, 8]\nmean: 0\nvariance: 0.1\n"


def write_hills(root: Path) -> Path:
    """Write the models ``hills``, of ``photo.png``, and ``flat``; return the root."""
    row, col = np.mgrid[0:20, 0:24]
    waves = [np.sin(row / 3 + c) + np.cos(col / (2 + c)) for c in range(3)]
    pixels = np.clip(np.stack(waves, -1) * 60 + 128, 0, 255).astype(np.uint8)
    for name, document in (("hills", DOCUMENT), ("flat", FLAT)):
        (root / name).mkdir()
        (root / name / "model.yaml").write_text(document)
    Image.fromarray(pixels).save(root / "hills" / "photo.png")
    return root
