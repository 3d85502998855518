"""The denoiser and the sampler of pictures, against matrix products over patches in float64."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import picture_reference
from torch import Tensor

from els_kernels import FoldedAttention
from els_service.denoisers.base import concatenate, make_query
from els_service.denoisers.levels import MAX_SIGMA, from_sigma
from els_service.denoisers.noise import seeded_noise
from els_service.denoisers.originality import distances_to
from els_service.denoisers.picture import PictureDenoiser
from els_service.denoisers.picture_banks import PictureBank, picture_bank
from els_service.denoisers.pyramids import PyramidPlan, asked_sizes, scale_count, scale_sizes
from els_service.denoisers.samplers import (
    Options,
    Resume,
    Step,
    Trajectory,
    options_for,
    sample,
)
from els_service.denoisers.samplers.pyramid import pyramid
from els_service.errors import InvalidArgumentError

PATCH, RHO, STEPS = 5, 0.2, 6


def picture(height: int = 20, width: int = 24, channels: int = 3) -> Tensor:
    """A smooth picture: a hill of another colour and place in each channel, and stripes."""
    row, col = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    hills = [
        torch.exp(-4 * ((row - 0.3 * c) ** 2 + (col + 0.2 * c) ** 2)) - 0.4 for c in range(channels)
    ]
    stripes = 0.3 * torch.sin(9 * row + 5 * col)
    return (torch.stack(hills) + stripes).clamp(-1, 1)


def bank(*pictures: Tensor) -> PictureBank:
    return picture_bank(pictures or (picture(),), coarsest=8, scales=2, source="hills")


def denoiser(of: PictureBank | None = None, **options: Any) -> PictureDenoiser:
    of = of or bank()
    kernel = options.pop("kernel", "auto")
    given = {"patch": PATCH, "fold": RHO, "steps": STEPS, **options}
    return PictureDenoiser(FoldedAttention(of.images, implementation=kernel), of, **given)


def options(model: PictureDenoiser, size: tuple[int, int], **chosen: Any) -> Options:
    plan = {key: chosen.pop(key) for key in ("tileable", "symmetric", "mask") if key in chosen}
    sizes = asked_sizes(model.info.scales, size, PATCH)
    return options_for(model.info, steps=STEPS, pyramid=PyramidPlan(sizes, PATCH, **plan), **chosen)


def draw(model: PictureDenoiser, size: tuple[int, int], **chosen: Any) -> list[Step]:
    given = {key: chosen.pop(key) for key in ("count", "first", "seed") if key in chosen}
    taken = sample(model, sampler="pyramid", options=options(model, size, **chosen), **given)
    return list(taken)


def test_a_pyramid_has_the_ratio_nearest_to_two_and_the_coarsest_side_asked_for() -> None:
    assert scale_count((64, 96), 14) == 3
    assert scale_sizes((64, 96), 14, 3) == ((14, 21), (30, 45), (64, 96))
    assert scale_count((12, 96), 14) == 1
    assert scale_sizes((12, 96), 14, 1) == ((12, 96),)
    assert asked_sizes(((14, 21), (64, 96)), (64, 192), 9) == ((14, 42), (64, 192))
    assert asked_sizes(((14, 21), (64, 96)), (9, 192), 9) == ((9, 42), (9, 192))


@pytest.mark.parametrize("label", [-1, 0, 1])
@pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0, MAX_SIGMA])
def test_the_answer_is_the_fold_of_the_mean_patches_of_a_scale(label: int, sigma: float) -> None:
    of = bank(picture(), picture(11, 13))
    model, images = denoiser(of), of.images
    attended = {-1: images, 0: images[:2], 1: images[2:]}[label]
    noise = torch.randn(3, 9, 17, generator=torch.Generator().manual_seed(0))
    x = picture(9, 17) + sigma * noise
    mean = model.denoise(make_query(x[None], from_sigma([sigma]), label)).mean[0].double()
    expected = picture_reference.denoise(x, attended, 1.0, sigma, PATCH, RHO)
    # At the highest level the logits of the formula still differ by 1e-6.
    assert (mean - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("tileable", [False, True])
@pytest.mark.parametrize("size", [(20, 24), (12, 40)])
def test_steps_are_those_of_the_formulas_in_float64(size: tuple[int, int], tileable: bool) -> None:
    model = denoiser()
    steps = draw(model, size, seed=3, tileable=tileable)
    sizes = asked_sizes(model.info.scales, size, PATCH)
    images = bank().images
    expected = picture_reference.draw(
        [[images[0]], [images[1]]], sizes, seed=3, patch=PATCH, rho=RHO, steps=STEPS,
        tileable=tileable,
    )  # fmt: skip
    assert len(steps) == len(expected) == 2 * STEPS
    for step, x in zip(steps, expected, strict=True):
        assert (step.x[0] - x).norm() < 1e-3 * x.norm(), step.index
    assert [step.scale for step in steps] == [0] * STEPS + [1] * STEPS
    assert steps[-1].x.shape == (1, 3, *size)


def test_alpha_bar_rises_to_one_within_each_scale() -> None:
    steps = draw(denoiser(), (20, 24))
    for scale in range(2):
        levels = [step.alpha_bar for step in steps if step.scale == scale]
        assert levels == sorted(levels)
        assert levels[-1] == 1
    assert {step.scales for step in steps} == {2}


@pytest.mark.slow
def test_an_image_has_the_same_bits_alone_and_in_company() -> None:
    model = denoiser()
    together = draw(model, (20, 24), count=3, seed=5)[-1].x
    for image in range(3):
        alone = draw(model, (20, 24), first=image, seed=5)[-1].x
        assert torch.equal(alone[0], together[image])
    assert not torch.equal(together[0], together[1])


def test_levels_and_scales_mix_in_a_batch_without_changing_bits() -> None:
    model = denoiser()
    x = torch.randn(1, 3, 10, 11, generator=torch.Generator().manual_seed(1))
    asked = [
        make_query(x, from_sigma([sigma]), label)
        for sigma, label in [(0.2, 0), (MAX_SIGMA, 1), (1.0, 1), (MAX_SIGMA, 0)]
    ]
    together = model.denoise(concatenate(asked)).pixels
    for index, query in enumerate(asked):
        np.testing.assert_array_equal(model.denoise(query).pixels[0], together[index])


def finished(model: PictureDenoiser, trajectory: Trajectory) -> list[Step]:
    """The steps of a trajectory that the model answers."""
    answer: Tensor | None = None
    steps: list[Step] = []
    while True:
        try:
            event = trajectory.send(answer)
        except StopIteration:
            return steps
        if isinstance(event, Step):
            answer = None
            steps.append(event)
        else:
            query = make_query(event.x.float(), event.level, event.label or 0)
            answer = model.denoise(query).mean.double()


@pytest.mark.parametrize("mode", ["new", "tileable", "from a start"])
@pytest.mark.slow
def test_a_trajectory_resumed_at_any_step_ends_in_the_same_bits(mode: str) -> None:
    model, size = denoiser(), (14, 16)
    chosen: dict[str, Any] = {"tileable": mode == "tileable"}
    if mode == "from a start":
        chosen |= {"start": picture(*size)[None].double(), "start_time": 0.6}
    given, noise = options(model, size, **chosen), seeded_noise(7, 1, (3, *size))
    steps = finished(model, pyramid(noise, given))
    for step in steps[:-1]:
        again = finished(model, pyramid(noise, given, Resume(step.index, step.state)))
        assert torch.equal(again[-1].x, steps[-1].x), step.index


@pytest.mark.slow
def test_the_edges_of_a_tileable_picture_meet_as_smoothly_as_half_of_its_inside() -> None:
    for x in draw(denoiser(), (20, 24), seed=2, count=8, tileable=True)[-1].x:
        for axis in (1, 2):
            inside = x.diff(dim=axis).abs().mean(dim=(0, 3 - axis))
            wrapped = (x.select(axis, 0) - x.select(axis, -1)).abs().mean()
            assert wrapped <= inside.median()


def test_a_tileable_picture_of_rolled_noise_is_rolled_at_every_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = import_module("els_service.denoisers.samplers.pyramid")
    # The edges that it chooses are its own.
    monkeypatch.setattr(sampler, "with_smooth_edges", lambda x: x)
    model, sizes = denoiser(), ((8, 10), (20, 24))
    given, shifts = options(model, sizes[1], tileable=True), ((2, 5), (5, 12))

    def rolled(scale: int) -> Tensor:
        numbers = seeded_noise(7, 1, (3, *sizes[1]))(scale).flatten()
        count = 3 * math.prod(sizes[scale])
        part = numbers[:count].view(3, *sizes[scale]).roll(shifts[scale], (1, 2))
        return torch.cat([part.flatten(), numbers[count:]]).view(1, 3, *sizes[1])

    plain = finished(model, pyramid(seeded_noise(7, 1, (3, *sizes[1])), given))
    other = finished(model, pyramid(rolled, given))
    for one, two in zip(plain, other, strict=True):
        assert (one.x.roll(shifts[one.scale], (2, 3)) - two.x).abs().max() < 1e-3


def test_a_symmetric_picture_equals_its_mirror_image() -> None:
    for width in (24, 23):
        x = draw(denoiser(), (20, width), seed=2, symmetric=True)[-1].x
        assert torch.equal(x, x.flip(3))


def test_pixels_that_a_mask_keeps_are_those_of_the_start() -> None:
    start, mask = picture()[None].double(), torch.zeros(1, 1, 20, 24, dtype=torch.float64)
    mask[..., 6:14, 8:17] = 1
    x = draw(denoiser(), (20, 24), seed=1, start=start, mask=mask)[-1].x
    kept = (mask == 0).expand_as(x)
    assert torch.equal(x[kept], start[kept])
    assert not torch.equal(x[~kept], start[~kept])


def mean_step(x: Tensor, mask: Tensor) -> float:
    """The mean step across the border of a mask, as a multiple of that elsewhere."""
    across, other = [], []
    for axis in (2, 3):
        step, border = x.diff(dim=axis).abs().mean(1, keepdim=True), mask.diff(dim=axis) != 0
        across.append(step[border])
        other.append(step[~border])
    return float(torch.cat(across).mean() / torch.cat(other).mean())


@pytest.mark.slow
def test_what_is_painted_joins_its_surroundings_without_a_seam() -> None:
    start, mask = picture()[None].double(), torch.zeros(1, 1, 20, 24, dtype=torch.float64)
    mask[..., 6:14, 8:17] = 1
    given = {"count": 4, "start": start.expand(4, -1, -1, -1), "mask": mask}
    painted = draw(denoiser(), (20, 24), **given)[-1].x
    # New pictures pasted there have a seam.
    pasted = torch.where(mask > 0, draw(denoiser(), (20, 24), count=4)[-1].x, start)
    joined, cut = ([mean_step(x[None], mask) for x in images] for images in (painted, pasted))
    assert float(np.mean(joined)) < 1.4
    assert float(np.mean(cut)) > 2


def test_a_start_with_little_noise_keeps_the_picture_and_more_noise_changes_more() -> None:
    start = picture()[None].double()
    distances = [
        (draw(denoiser(), (20, 24), seed=1, start=start, start_time=time)[-1].x - start).norm()
        for time in (0.2, 1.0)
    ]
    assert distances[0] < 0.5 * distances[1]


def test_a_picture_smaller_than_a_patch_is_rejected_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="patch: expected at most 8, the shortest side"):
        denoiser(patch=9)


def test_times_are_rejected_for_a_pyramid() -> None:
    with pytest.raises(InvalidArgumentError, match="times: expected none for pyramid"):
        draw(denoiser(), (20, 24), times=(0.5,) * STEPS)


def test_images_of_several_sizes_are_compared_by_size() -> None:
    of = picture_bank([picture(), picture(11, 13)], coarsest=8, scales=2, names=["a.png", "b.png"])
    same, every, _ = distances_to(of.image(3), of)
    assert same.tolist() == [3]
    assert every.tolist() == [0]
    assert not len(distances_to(np.zeros((3, 5, 5), np.float32), of)[0])
    for index, extent in enumerate(of.extents.tolist()):
        assert np.array_equal(of.image(index), of.images[index].numpy())
        assert list(of.image(index).shape[1:]) == extent
    assert of.labels.tolist() == [0, 0, 1, 1]
    assert of.file_names is not None
    assert list(of.file_names) == ["a.png", "b.png"] * 2
    assert of.size == sum(image.numel() for image in of.images)


def test_without_a_label_every_scale_is_a_source_and_products_are_differences() -> None:
    model = denoiser()
    x = torch.randn(1, 3, 7, 9, generator=torch.Generator().manual_seed(3))
    query = make_query(x, from_sigma([0.8]))
    found = model.explain(query, 4)
    assert (found.shares[0] > 0).all()
    assert found.shares.sum() == pytest.approx(1)
    assert np.abs(found.pixels - model.denoise(query).pixels).max() <= 1e-5
    assert np.array_equal(found.variance, model.variance(query))
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    ahead, behind = (
        model.denoise(make_query(x + d * 2e-3 * u, from_sigma([0.8]))).pixels for d in (1, -1)
    )
    product = model.jvp(query, u.numpy()).product
    # D is float32 here: its rounding, divided by the step.
    assert np.abs(product - (ahead - behind) / 4e-3).max() <= 1e-3 * np.abs(product).max() + 5e-4
    for seconds in (
        model.predict_explain_seconds(query),
        model.predict_product_seconds(query, "vjp"),
    ):
        assert seconds > model.predict_seconds(query)
