"""Folders of diffusers in other layouts than a pipeline's of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.denoisers import random_images
from tests.support.pretrained import SHAPE, conditional_unet, scheduler, unet, write_folder

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.errors import LoadError
from els_service.repository import ModelRepository

DOCUMENT = "kind: diffusers\n"


def answer(root: Path, name: str) -> Any:
    level = from_sigma([0.5, 2.0])
    query = make_query(random_images((2, *SHAPE)), level, [-1, -1])
    return ModelRepository(root).load(name).denoise(query).mean


@pytest.fixture
def expected(tmp_path: Path) -> Any:
    write_folder(tmp_path / "usual", DOCUMENT, unet=unet(), scheduler=scheduler())
    return answer(tmp_path, "usual")


def test_files_of_network_and_scheduler_may_lie_in_one_folder(
    tmp_path: Path, expected: Any
) -> None:
    # As the first pipelines of DDPM are published, such as those of CIFAR-10 and LSUN.
    flat = write_folder(tmp_path / "flat", DOCUMENT)
    unet().save_pretrained(flat)
    scheduler().save_pretrained(flat)
    np.testing.assert_array_equal(answer(tmp_path, "flat"), expected)
    below = write_folder(tmp_path / "below", f"{DOCUMENT}folder: cats\n")
    unet().save_pretrained(below / "cats")
    scheduler().save_pretrained(below / "cats")
    np.testing.assert_array_equal(answer(tmp_path, "below"), expected)


def test_the_network_of_a_checkpoint_is_named_by_its_path(tmp_path: Path, expected: Any) -> None:
    document = f"{DOCUMENT}network: checkpoint-500/unet_ema\n"
    folder = write_folder(tmp_path / "trained", document, scheduler=scheduler())
    unet(dropout=0.1).save_pretrained(folder / "unet")
    unet().save_pretrained(folder / "checkpoint-500" / "unet_ema")
    np.testing.assert_array_equal(answer(tmp_path, "trained"), expected)


@pytest.mark.parametrize("network", ["../usual/unet", "/usual", "a b"])
def test_a_path_that_leaves_the_folder_is_refused_with_its_pattern(
    tmp_path: Path, expected: Any, network: str
) -> None:
    write_folder(tmp_path / "other", f"{DOCUMENT}network: {network}\n", scheduler=scheduler())
    with pytest.raises(LoadError, match=r"network: string should match pattern '\^\[A-Za|found no"):
        ModelRepository(tmp_path).load("other")


def test_without_any_network_the_usual_place_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "none", DOCUMENT, scheduler=scheduler())
    with pytest.raises(LoadError, match=r"unet/config\.json: expected a file, found none"):
        ModelRepository(tmp_path).load("none")


def test_a_network_of_text_names_the_kind_that_takes_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "text", DOCUMENT, unet=conditional_unet(), scheduler=scheduler())
    with pytest.raises(LoadError, match="got 'UNet2DConditionModel'; kind latent takes it"):
        ModelRepository(tmp_path).load("text")
