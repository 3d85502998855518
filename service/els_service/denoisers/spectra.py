"""Mean and principal axes of a set of images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from els_service.denoisers.banks import Bank

MAX_DIMENSIONS = 4096
"""Maximum C·H·W of a bank: the covariance and its eigenvectors grow with its square."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Mean [D], eigenvectors [D, R] and eigenvalues ≥ 0 [R] of D numbers, all float64."""

    mean: Tensor
    vectors: Tensor
    values: Tensor


def check_dimensions(dimensions: int) -> None:
    """Raise ValueError if the images of a bank have more than ``MAX_DIMENSIONS`` numbers."""
    if dimensions > MAX_DIMENSIONS:
        raise ValueError(f"bank: expected at most {MAX_DIMENSIONS} dimensions, got {dimensions}")


def spectrum_of(images: Tensor) -> Spectrum:
    """Return the spectrum of the covariance (1/N) Σ (x - μ)(x - μ)ᵀ of images [N, D].

    Computed in float64; with fewer images than dimensions the remaining axes have no variance.
    """
    exact = images.double()
    mean = exact.mean(0)
    centred = exact - mean
    if len(images) < images.shape[1]:
        _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
        values, vectors = singular.square() / len(images), axes.T
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(images))
    return Spectrum(mean, vectors.contiguous(), values.clamp(min=0))


def count_numbers(bank: Bank) -> int:
    """Return how many numbers the eigenvectors of a bank and of each of its labels have."""
    dimensions = math.prod(bank.shape)
    counts = [len(bank.labels), *np.unique_counts(bank.labels).counts.tolist()]
    return sum(dimensions * min(count, dimensions) for count in counts)
