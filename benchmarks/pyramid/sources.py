"""Error of a part of the patches of large photographs against all of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gallery import PHOTOGRAPHS, photo_of
from els_service.denoisers.picture_subset import PROBED, SubsetDenoiser
from els_service.repository import ModelRepository

PHOTOS = ("coffee", "chelsea", "gravel", "retina")
SIDE = 400
"""Long side of the photographs, in pixels."""
SOURCES = (5_000, 20_000, 50_000)


def rows(side: int) -> Iterator[dict[str, Any]]:
    """Yield the errors of each photograph and number of patches, at each α of ``PROBED``."""
    for photograph in PHOTOGRAPHS:
        if photograph.name not in PHOTOS:
            continue
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, photograph.name)
            folder.mkdir()
            photo_of(photograph, side).save(folder / "photo.png")
            for sources in SOURCES:
                document = {"kind": "picture", "pictures": ["photo.png"], "finest": side}
                document |= {"patch": photograph.patch, "sources": sources}
                (folder / "model.yaml").write_text(json.dumps(document))
                model = ModelRepository(Path(root)).load(photograph.name)
                assert isinstance(model, SubsetDenoiser)
                _, height, width = model.info.shape
                patches = (height - photograph.patch + 1) * (width - photograph.patch + 1)
                yield {
                    "photograph": photograph.name,
                    "size": [height, width],
                    "patch": photograph.patch,
                    "sources": sources,
                    "patches": patches,
                    "share": round(model.counts[-1] / patches, 4),
                    "alpha": list(PROBED),
                    "errors": [round(error, 4) for error in model.errors()],
                }
