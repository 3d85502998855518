"""Banks in parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from els_service.denoisers.bank_files import save_bank
from els_service.denoisers.bank_parts import MANIFEST, Manifest, Part
from els_service.denoisers.banks import Bank


def write_parts(folder: Path, bank: Bank, bounds: Sequence[int]) -> Path:
    """Write a bank in parts that begin and end at ``bounds``; return its folder."""
    folder.mkdir()
    parts = []
    for number, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        names = None if bank.file_names is None else bank.file_names.part(lo, hi)
        labels = bank.labels[lo:hi]
        label_names = bank.label_names[: labels[-1] + 1]
        part = Bank(bank.images[lo:hi], labels, label_names, bank.source, bank.licence, names)
        save_bank(part, folder / f"{number}.safetensors")
        parts.append(Part(f"{number}.safetensors", hi - lo, part.fingerprint))
    values, counts = np.unique(bank.labels, return_counts=True)
    manifest = Manifest(
        dtype=bank.dtype.name,
        shape=bank.shape,
        labels=tuple(zip(values.tolist(), counts.tolist(), strict=True)),
        parts=tuple(parts),
        fingerprint=bank.fingerprint,
        label_names=bank.label_names,
        source=bank.source,
        licence=bank.licence,
    )
    (folder / MANIFEST).write_bytes(manifest.encode())
    return folder
