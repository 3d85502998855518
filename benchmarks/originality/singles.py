"""Pictures from single photographs at default settings: how much of them is one copied region."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.gallery import PHOTOGRAPHS, photo_of
from benchmarks.originality.served import served
from els_client import Client
from els_client import _pictures as pictures

if TYPE_CHECKING:
    from els_client import Originality

GOAL = 0.95
"""Least share of pictures that are not memorised."""


def rows(names: Sequence[str], seeds: int, side: int) -> Iterator[dict[str, Any]]:
    """Yield the row of each photograph, and of all together.

    Args:
        names: of photographs of the gallery.
        seeds: 0 to ``seeds`` - 1, for each photograph.
        side: long side of the photographs, in pixels.
    """
    chosen = [one for one in PHOTOGRAPHS if one.name in names]
    kept: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for photograph in chosen:
            write_model(Path(folder), photograph.name, photo_of(photograph, side))
        with served(Path(folder)) as client:
            for photograph in chosen:
                row = _row(client, photograph.name, seeds)
                kept.append(row["not_memorised"])
                yield row
    yield {
        "model": "all photographs",
        "seeds": seeds,
        "not_memorised": float(np.mean(kept)),
        "within_goal": min(kept) >= GOAL,
    }


def write_model(root: Path, name: str, photo: Image.Image) -> None:
    """Write the model folder of a photograph, with the default of every key."""
    folder = root / name
    folder.mkdir()
    pictures.save(photo, folder / "photo.png")
    text = json.dumps({"kind": "picture", "pictures": ["photo.png"]})
    (folder / "model.yaml").write_text(text)


def _row(client: Client, model: str, seeds: int) -> dict[str, Any]:
    began = time.perf_counter()
    found: list[Originality] = []
    for seed in range(seeds):
        options: dict[str, Any] = {"sampler": "pyramid", "seed": seed, "want": ()}
        *_, last = client.sample(model=model, originality=True, **options)
        found += last.originality
    regions = np.array([one.largest_region for one in found])
    described = client.model(model)
    return {
        "model": model,
        "size": [described.height, described.width],
        "seeds": seeds,
        "not_memorised": float(np.mean([not one.copied for one in found])),
        "largest_region_quartiles": np.quantile(regions, [0.25, 0.5, 0.75]).round(4).tolist(),
        "largest_region_most": round(float(regions.max()), 4),
        "in_place_median": round(float(np.median([one.in_place for one in found])), 4),
        "seconds": round(time.perf_counter() - began, 1),
    }
