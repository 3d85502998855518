"""A small labelled bank, and a denoiser of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.denoisers import KINDS, SHAPE, build, random_images

from els_service.denoisers.banks import Bank, make_bank
from els_service.denoisers.base import Denoiser


@pytest.fixture(scope="session")
def labelled() -> Bank:
    """Nine images of the labels 0 and 2; label 1 has a name but no image."""
    labels = np.array([0, 2, 0, 0, 2, 2, 0, 2, 0])
    return make_bank(
        random_images((9, *SHAPE)).numpy(),
        labels,
        label_names=("shirt", "none", "boot"),
        source="random",
        licence="CC0",
    )


@pytest.fixture(scope="session")
def unlabelled() -> Bank:
    return make_bank(random_images((7, *SHAPE), 3).numpy())


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def denoiser(kind: str, labelled: Bank) -> Denoiser:
    return build(kind, labelled)
