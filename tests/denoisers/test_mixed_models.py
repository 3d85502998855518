"""Models over banks of images of several sizes: answers, sources of originality, and memory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.support.memory import array_bytes

from els_kernels import FOLD_GEOMETRIES, FoldedMoments
from els_kernels.fold_plan import FoldQuery
from els_kernels.reference_fold import FoldReference
from els_service.cli.speed import describe_sizes
from els_service.denoisers.banks import make_bank, save_bank
from els_service.denoisers.base import Denoiser, SizeRange, make_query
from els_service.denoisers.folded import FoldedDenoiser, fold_of
from els_service.denoisers.levels import from_sigma
from els_service.denoisers.mixed_banks import MixedBank, make_mixed_bank
from els_service.denoisers.originality import report
from els_service.denoisers.windows import WindowTable
from els_service.errors import InvalidArgumentError, LoadError
from els_service.repository import ModelRepository

SIZES = [(7, 6), (5, 11), (7, 6), (9, 7), (5, 11), (8, 9)]
LABELS = [1, 0, 0, 1, 1, 0]
ANY = SizeRange((1, 40), (1, 40))
SIGMA = [0.3, 1.0, 4.0]


def pictures(sizes: list[tuple[int, int]] = SIZES, channels: int = 2) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(len(sizes))
    return [random.integers(0, 256, (channels, *size), np.uint8) for size in sizes]


def mixed() -> MixedBank:
    bank = make_mixed_bank(pictures(), LABELS)
    assert isinstance(bank, MixedBank)
    return bank


def machine(bank: MixedBank, **options: Any) -> FoldedDenoiser:
    window = WindowTable.constant(3)
    given = {"machine": "els", "padding": "zeros", "sizes": ANY, "window": window, **options}
    moments = FoldedMoments(fold_of(bank, "cpu", given.pop("kernel", "auto")))
    return FoldedDenoiser(moments, bank, **given)


@pytest.mark.parametrize(
    ("padding", "kernel"),
    [
        *((padding, "auto") for padding in ("zeros", "circular", "valid", "inside")),
        ("inside", "torch"),
    ],
)
@pytest.mark.slow
def test_an_answer_is_that_of_brute_force_over_the_images_of_the_label(
    padding: str, kernel: str
) -> None:
    bank = mixed()
    reference = FoldReference([torch.from_numpy(group) for group in bank.groups])
    x = np.random.default_rng(0).normal(size=(3, 2, 10, 8)).astype(np.float32)
    asked = make_query(x, from_sigma(SIGMA), [-1, 0, 1])
    for fold in (0.0, 0.5):
        model = machine(bank, padding=padding, fold=fold, kernel=kernel)
        model.check(asked)
        got = model.denoise(asked)
        for b, limits in enumerate([(0, 6), (0, 3), (3, 6)]):
            geometry = FOLD_GEOMETRIES["els", padding]
            query = FoldQuery(asked.x[b], 1.0, SIGMA[b], 3, limits, fold, geometry)
            want, _ = reference(query)
            assert np.abs(got.pixels[b] - want.numpy()).max() <= 1e-5


def test_the_model_has_the_shape_of_the_most_images_and_windows_up_to_the_shortest_side() -> None:
    info = machine(mixed()).info
    assert (info.shape, info.max_window) == ((2, 5, 11), 5)
    assert info.bank is not None
    assert info.bank.sizes == SizeRange((5, 9), (6, 11))
    assert (info.bank.images, info.bank.most_pixels) == (6, 8 * 9)
    model = machine(mixed(), window=None)
    large = make_query(np.zeros((1, 2, 30, 30), np.float32), from_sigma([50.0]), windows=7)
    with pytest.raises(InvalidArgumentError, match="windows: expected odd from 1 to 5, got 7"):
        model.check(large)
    model.check(make_query(large.pixels, large.level, windows=5))
    assert model.denoise(make_query(large.pixels, large.level)).pixels.shape == (1, 2, 30, 30)


def test_check_lists_the_sizes_of_a_mixed_bank_and_nothing_for_others() -> None:
    info = machine(mixed()).info
    assert describe_sizes(info) == "; a bank of heights 5 to 9 and widths 6 to 11"
    assert info.bank is not None
    assert describe_sizes(replace(info, bank=replace(info.bank, sizes=None))) == ""


def test_the_estimate_is_about_that_of_the_same_images_one_by_one() -> None:
    bank = mixed()
    asked = make_query(np.zeros((1, 2, 12, 12), np.float32), from_sigma([1.0]))
    whole = machine(bank).predict_seconds(asked)
    wide = machine(make_mixed([(9, 11), (9, 12)])).predict_seconds(asked)
    assert 0 < whole < 6 * wide
    assert machine(bank, fold=math.inf).predict_seconds(asked) < whole


def make_mixed(sizes: list[tuple[int, int]]) -> MixedBank:
    bank = make_mixed_bank(pictures(sizes))
    assert isinstance(bank, MixedBank)
    return bank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": None}, "sizes: expected any, or ranges, as the bank has images of several"),
        (
            {"sizes": None, "machine": "local"},
            "bank: expected images of one size for machine local, as its sources are at the same "
            "place, got heights from 5 to 9 and w",
        ),
        ({"window": WindowTable.constant(7)}, "window: expected at most 5 here, got 7"),
    ],
)
def test_a_machine_that_needs_one_size_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine(mixed(), **options)


def test_distances_of_originality_are_to_the_images_of_the_same_size() -> None:
    bank = mixed()
    image = bank.image(1) + np.float32(1e-3)
    same = np.flatnonzero((bank.extents == bank.extents[1]).all(1))
    found = report(image, bank)
    assert found.nearest.tolist() == [1, *(same[same != 1]).tolist()]
    want = [np.sqrt(np.square(image - bank.image(int(i))).sum()) for i in found.nearest]
    np.testing.assert_allclose(found.distances, want, rtol=1e-6)
    assert found.gap_ratio == pytest.approx(want[0] / want[1], rel=1e-6)
    assert (
        found.absent["carlini_ratio"]
        == "needs a bank of at least 51 images of its size, this has 2"
    )
    other = report(np.zeros((2, 3, 3), np.float32), bank)
    assert (other.nearest.tolist(), other.gap_ratio) == ([], None)
    assert other.absent["gap_ratio"] == "needs a bank of images of its size, 2×3×3"


BANK = "bank: ../_banks/mixed.safetensors\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A models root with banks of 48 images: of several sizes, of bytes, and of floats."""
    even = np.stack(pictures([(32, 32)] * 48, channels=3))
    for name, bank in {
        "mixed": make_mixed_bank(pictures([(32, 32), (24, 40)] * 24, channels=3)),
        "bytes": make_bank(even),
        "floats": make_bank(even.astype(np.float32) / 255),
    }.items():
        save_bank(bank, tmp_path / "_banks" / f"{name}.safetensors")
    return tmp_path


def load(root: Path, document: str) -> Denoiser:
    (root / "model").mkdir(exist_ok=True)
    (root / "model" / "model.yaml").write_text(document)
    return ModelRepository(root).load("model")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            f"kind: analytic\nmachine: {name}\n{BANK}",
            f"bank: expected images of one size for machine {name}, as its {why}, got heights",
        )
        for name, why in (
            ("ideal", "window is the whole image"),
            ("equivariant", "window is the whole image"),
            ("local", "sources are at the same place"),
        )
    ]
    + [
        (
            f"kind: analytic\nmachine: els\n{BANK}fold: 0.2\n",
            "sizes: expected any, or ranges, as the bank has images of several sizes, got none",
        ),
        (f"kind: analytic\nmachine: els\n{BANK}", "sizes: expected any, or ranges"),
        (f"kind: wiener\n{BANK}", "bank: expected images of one size for kind wiener"),
        (
            f"kind: analytic\nmachine: els\n{BANK}sizes: {{height: [1, 9], width: [1, 99]}}\n",
            "sizes.height: expected lowest to highest, with the bank's 32 between them",
        ),
    ],
)
def test_a_model_that_needs_one_size_is_refused_by_its_name(
    root: Path, document: str, message: str
) -> None:
    with pytest.raises(LoadError) as caught:
        load(root, document)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("bank", "keys", "each"),
    [
        ("mixed", "fold: 0.2\nsizes: any\n", 1),
        ("mixed", "sizes: any\n", 1),
        ("bytes", "fold: 0.2\n", 1),
        ("bytes", "padding: inside\nsizes: any\n", 1),
        ("bytes", "sizes: any\n", 5),
        ("floats", "fold: uniform\n", 4),
        ("floats", "sizes: any\n", 8),
    ],
)
def test_a_model_holds_the_memory_that_it_publishes(
    root: Path, bank: str, keys: str, each: int
) -> None:
    document = f"kind: analytic\nmachine: els\nwindow: 3\nbank: ../_banks/{bank}.safetensors\n"
    model = load(root, document + keys)
    x = np.zeros((1, 3, 16, 16), np.float32)
    if "sizes" not in keys:
        x = np.zeros((1, *model.info.shape), np.float32)
    model.denoise(make_query(x, from_sigma([1.0])))
    numbers = 48 * 3 * (32 * 32 if bank != "mixed" else (32 * 32 + 24 * 40) // 2)
    assert model.info.memory_bytes == each * numbers
    assert model.info.memory_bytes <= array_bytes(model) <= 1.05 * model.info.memory_bytes


def test_a_picture_model_holds_the_memory_that_it_publishes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    (tmp_path / "model").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / "model" / name)
    model = load(tmp_path, "kind: picture\npictures: [a.png, b.png]\n")
    assert model.info.memory_bytes <= array_bytes(model) <= 1.01 * model.info.memory_bytes
