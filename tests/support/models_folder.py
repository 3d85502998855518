"""A small folder of models: every kind, over banks so tiny that an answer takes no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from els_service.denoisers.banks import Bank, make_bank, save_bank

SHAPE = (1, 6, 5)
RGB = (3, 32, 32)
LABELS = 3

_BANK = "bank: ../_banks/tiny.safetensors\n"
DOCUMENTS = {
    "circular": f"kind: analytic\nmachine: els\npadding: circular\n{_BANK}",
    "equivariant": f"kind: analytic\nmachine: equivariant\n{_BANK}",
    "gaussian": "kind: gaussian\nshape: [3, 32, 32]\nmean: [0.1, 0.0, -0.1]\nvariance: 0.25\n",
    "ideal": f"kind: analytic\nmachine: ideal\n{_BANK}",
    "local": f"kind: analytic\nmachine: local\n{_BANK}window: 3\n",
    "valid": (
        f"kind: analytic\nmachine: els\npadding: valid\n{_BANK}"
        "window: {sigma: [0.1, 10.0], k: [1, 5]}\n"
    ),
    "wiener": f"kind: wiener\n{_BANK}",
    "zeros": f"kind: analytic\nmachine: els\n{_BANK}",
}
"""name → model.yaml; all but ``gaussian`` answer 1×6×5 images of three labels."""

LABELLED = sorted(DOCUMENTS.keys() - {"gaussian"})
WITH_EVIDENCE = sorted(DOCUMENTS.keys() - {"gaussian", "wiener"})


def tiny_bank(images: int = 12, seed: int = 0, *, named: bool = False) -> Bank:
    """Return a labelled bank of 1×6×5 images, with names of files if ``named``."""
    pixels = np.random.default_rng(seed).integers(0, 256, (images, *SHAPE)).astype(np.uint8)
    return make_bank(
        pixels,
        np.arange(images) % LABELS,
        label_names=("dot", "dash", "gap"),
        source="tests",
        licence="MIT",
        file_names=[f"{i}.png" for i in range(images)] if named else None,
    )


def write_models(root: Path, documents: dict[str, str] | None = None) -> Path:
    """Write a models root and return it."""
    (root / "_banks").mkdir(parents=True)
    save_bank(tiny_bank(), root / "_banks" / "tiny.safetensors")
    for name, document in (DOCUMENTS if documents is None else documents).items():
        (root / name).mkdir()
        (root / name / "model.yaml").write_text(document)
    return root


def write_slow_models(root: Path, models: int = 60) -> Path:
    """Write models that take a few tenths of a second each to load, and return their root."""
    document = "kind: wiener\nbank: ../_banks/wide.safetensors\n"
    write_models(root, {f"slow-{i}": document for i in range(models)})
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1, 32, 32)).astype(np.uint8)
    save_bank(make_bank(pixels), root / "_banks" / "wide.safetensors")
    return root
