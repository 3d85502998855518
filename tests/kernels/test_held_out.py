"""Leave-one-out means at sampled pixels, against the float64 reference on the bank without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.kernels.cases import NAMES
from tests.support.rows import latin
from torch import Tensor

from els_kernels import ComputationStoppedError, Control, PatchAttention, max_window
from els_kernels.held_out import HeldOut, leave_one_out

WINDOWED = {name: geometry for name, geometry in NAMES.items() if not geometry.whole}
LEVELS = (0.08, 0.4, 2.0, 40.0)


def bank_of(count: int = 7, channels: int = 3, height: int = 6, width: int = 8) -> Tensor:
    numbers = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, height, width, generator=numbers) * 2 - 1


def every_pixel(bank: Tensor, images: list[int], ranges: list[tuple[int, int]]) -> HeldOut:
    """Return all pixels of some images, each image under one noise."""
    _, channels, height, width = bank.shape
    numbers = torch.Generator().manual_seed(1)
    noise = torch.randn(len(images), channels, height, width, generator=numbers)
    pixels = height * width
    place = torch.arange(pixels).repeat(len(images))
    return HeldOut(
        torch.tensor(images).repeat_interleave(pixels),
        place // width,
        place % width,
        noise.repeat_interleave(pixels, 0),
        [limits for limits in ranges for _ in range(pixels)],
    )


def by_definition(
    bank: Tensor, held: HeldOut, sigma: float, window: int, name: str, image: int
) -> Tensor:
    """Return the reference's mean, [C, H, W], on the bank without the image."""
    q = held.images.tolist().index(image)
    lo, hi = held.ranges[q]
    rest = torch.cat([bank[lo:image], bank[image + 1 : hi]])
    x = bank[image] + sigma * held.noise[q]
    attention = PatchAttention(rest, implementation="reference")
    return attention(
        x[None],
        a=torch.ones(1),
        s=torch.tensor([sigma], dtype=torch.float64),
        window=torch.tensor([window]),
        geometry=WINDOWED[name],
    ).mean[0]


@latin(2, "name", "channels")
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.slow
def test_it_is_the_reference_on_the_bank_without_the_image(name: str, channels: int) -> None:
    bank = bank_of(channels=channels)
    images = [0, 3, 6]
    held = every_pixel(bank, images, [(0, 7), (0, 7), (5, 7)])
    windows = [k for k in (1, 3, 5, 7, 15) if k <= max_window(WINDOWED[name], 6, 8)]
    cells = [(sigma, k) for sigma in LEVELS for k in windows]
    found = leave_one_out(bank, held, cells, WINDOWED[name])
    assert set(found) == set(cells)
    for (sigma, k), mean in found.items():
        got = mean.view(len(images), 6, 8, channels).movedim(-1, 1)
        for i, image in enumerate(images):
            wanted = by_definition(bank, held, sigma, k, name, image).double()
            error = (got[i] - wanted).norm() / wanted.norm()
            assert error <= 1e-4, (sigma, k, image, float(error))


def test_the_image_that_is_left_out_has_no_effect_but_through_the_query() -> None:
    bank = bank_of()
    held = every_pixel(bank, [2], [(0, 7)])
    copies = bank.clone()
    copies[4] = copies[2]
    sigma, k = 0.05, 3
    geometry = WINDOWED["els-zeros"]
    clean = bank[2].movedim(0, -1).flatten(0, 1).double()
    with_copy = leave_one_out(copies, held, [(sigma, k)], geometry)[sigma, k]
    without = leave_one_out(bank, held, [(sigma, k)], geometry)[sigma, k]
    assert (with_copy - clean).abs().max() < 0.05 < (without - clean).abs().max()


def test_tiles_of_the_bank_do_not_change_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of()
    held = every_pixel(bank, [1, 5], [(0, 7), (4, 7)])
    cells = [(0.4, 3), (2.0, 5)]
    geometry = WINDOWED["els-zeros"]
    one_tile = leave_one_out(bank, held, cells, geometry)
    monkeypatch.setattr("els_kernels.held_out._TILE", 1)
    reports: list[tuple[int, int]] = []
    tiles = leave_one_out(bank, held, cells, geometry, lambda *work: reports.append(work))
    for cell in cells:
        torch.testing.assert_close(one_tile[cell], tiles[cell], rtol=0, atol=2e-6)
    total = 48 * (7 + 3)
    assert len(reports) == 7
    assert reports[-1] == (total, total)


def test_a_stopped_control_ends_it() -> None:
    bank = bank_of()
    control = Control()
    control.stop()
    with control, pytest.raises(ComputationStoppedError):
        leave_one_out(bank, every_pixel(bank, [0], [(0, 7)]), [(1.0, 3)], WINDOWED["els-zeros"])


def test_invalid_arguments_are_rejected_by_name() -> None:
    bank = bank_of()
    held = every_pixel(bank, [0], [(0, 7)])
    geometry = WINDOWED["els-zeros"]
    for cells, message in (
        ([(1.0, 4)], "window: expected odd from 1 to 15, got 4"),
        ([(1.0, 17)], "window: expected odd from 1 to 15, got 17"),
        ([(0.0, 3)], "sigma: expected finite and > 0"),
        ([], "cells and held: expected some"),
    ):
        with pytest.raises(ValueError, match=message):
            leave_one_out(bank, held, cells, geometry)
    for wrong, message in (
        (replace(held, ranges=[(1, 7)] * 48), "ranges: expected the image 0 and another"),
        (replace(held, ranges=[(0, 1)] * 48), "ranges: expected the image 0 and another"),
        (replace(held, rows=held.rows + 1), "rows: expected"),
        (replace(held, noise=held.noise[:1]), "noise: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            leave_one_out(bank, wrong, [(1.0, 3)], geometry)
    with pytest.raises(ValueError, match="geometry: expected one with a window"):
        leave_one_out(bank, held, [(1.0, 1)], NAMES["ideal-zeros"])
