"""Networks as denoisers: what they predict becomes D(x), whatever the architecture and batch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from tests.support.denoisers import random_images
from tests.support.networks import LABELS, SHAPE, WIDTHS, config, denoiser
from torch import Tensor

from els_service.denoisers.base import Query, concatenate, make_query
from els_service.denoisers.levels import (
    NoiseLevel,
    cosine,
    cosine_time,
    from_alpha_bar,
    from_sigma,
    from_time,
)
from els_service.denoisers.networks import PREDICTIONS, build_network, parametrise
from els_service.denoisers.networks.denoiser import count_flops
from els_service.denoisers.samplers import Options, sample
from els_service.errors import InvalidArgumentError

SIGMA = [0.01, 0.1, 0.5, 1.0, 3.0, 20.0]


def query(batch: int = 6, label: int = -1) -> Query:
    x = random_images((batch, *SHAPE), 4)
    labels = [label if label >= 0 else i % (LABELS + 1) - 1 for i in range(batch)]
    return make_query(x, from_sigma(np.resize(SIGMA, batch)), labels)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest over images."""
    difference = (got.double() - want.double()).flatten(1).norm(dim=1)
    return float((difference / want.double().flatten(1).norm(dim=1)).max())


def exact_outputs(prediction: str, x0: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """What a perfect network of a parametrisation would put out, from the definitions."""
    a, s = (torch.tensor(v).view(-1, 1, 1, 1) for v in (level.a, level.s))
    noise, norm, sigma = (x - a * x0) / s, (a**2 + s**2).sqrt(), s / a
    if prediction == "edm":
        c_skip = 0.25 / (sigma**2 + 0.25)
        return (x0 - c_skip * x / a) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())
    return {"eps": noise, "x0": x0, "v": (a * noise - s * x0) / norm, "flow": noise - x0}[
        prediction
    ]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("convention", [from_sigma, cosine, lambda s: from_alpha_bar(1 / (1 + s))])
def test_a_perfect_prediction_becomes_the_clean_image(prediction: str, convention: object) -> None:
    assert callable(convention)
    level = convention(np.array([0.05, 0.3, 0.9, 0.99]))
    x0 = random_images((4, *SHAPE)).double()
    noise = random_images(x0.shape, 1).double()
    a, s = (torch.tensor(v).view(-1, 1, 1, 1) for v in (level.a, level.s))
    x = a * x0 + s * noise
    p = parametrise(prediction, level, sigma_data=0.5)
    skip, out = (torch.from_numpy(v).view(-1, 1, 1, 1) for v in (p.c_skip, p.c_out))
    got = skip * x + out * exact_outputs(prediction, x0, x, level)
    torch.testing.assert_close(got, x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_network_sees_inputs_of_the_size_it_was_trained_on(prediction: str) -> None:
    level = from_sigma(SIGMA)
    c_in = parametrise(prediction, level, sigma_data=0.5).c_in
    if prediction == "flow":  # (1 - t)·x0 + t·ε
        np.testing.assert_allclose(c_in, 1 / (1 + level.s), rtol=1e-12)
        return
    size = 0.5 if prediction == "edm" else 1.0
    np.testing.assert_allclose(c_in, 1 / np.sqrt(level.s**2 + size**2), rtol=1e-12)


def test_the_time_of_the_cosine_schedule_inverts_it() -> None:
    time = np.linspace(0.001, 1, 50)
    np.testing.assert_allclose(cosine_time(cosine(time).sigma), time, rtol=1e-12)
    np.testing.assert_allclose(parametrise("eps", cosine(time), 0.5).time, time, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_coefficients_of_one_image_have_the_bits_of_a_batch(prediction: str) -> None:
    sigma = np.geomspace(1e-4, 1e6, 300)
    together = NoiseLevel(np.linspace(0.1, 1, 300), sigma * np.linspace(0.1, 1, 300))
    want = parametrise(prediction, together, 3)
    for image in range(300):
        got = parametrise(prediction, together[image : image + 1], 3)
        for name in ("c_in", "c_skip", "c_out", "sigma", "scale", "time"):
            assert getattr(got, name) == getattr(want, name)[image], name
        assert np.array_equal(got.rows[:, 0], want.rows[:, image])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_beyond_the_trained_levels_answers_stay_of_the_size_of_images(prediction: str) -> None:
    model = denoiser(config(prediction=prediction))
    highest = float(cosine(np.ones(1)).sigma[0])
    unit = random_images((1, *SHAPE))
    at_top = model.denoise(make_query(unit * highest, from_sigma([highest]), 1)).mean
    beyond = model.denoise(make_query(unit * 1e6, from_sigma([1e6]), 1)).mean
    assert relative_error(beyond, at_top) < 1e-4


@pytest.mark.parametrize("architecture", WIDTHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_variance_preserving_and_exploding_levels_are_one_problem(
    architecture: str, prediction: str
) -> None:
    model, exploding = denoiser(config(architecture, prediction=prediction)), query()
    alpha_bar = exploding.level.alpha_bar
    x = exploding.x * torch.from_numpy(np.sqrt(alpha_bar)).float().view(-1, 1, 1, 1)
    preserving = make_query(x, from_alpha_bar(alpha_bar), exploding.labels.tolist())
    got, want = model.denoise(preserving).mean, model.denoise(exploding).mean
    assert relative_error(got, want) < 1e-4


@pytest.mark.parametrize("architecture", WIDTHS)
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_an_answer_is_that_of_the_module_itself(architecture: str, padding: str) -> None:
    of = config(architecture, padding=padding, prediction="x0")
    torch.manual_seed(0)
    network, question = build_network(of), query()
    rows = np.where(question.labels < 0, LABELS, question.labels)
    time = cosine_time(question.level.sigma)
    scale = torch.from_numpy(1 / np.hypot(1, question.level.s)).float().view(-1, 1, 1, 1)
    with torch.no_grad():
        want = network(question.x * scale, torch.from_numpy(time).float(), torch.from_numpy(rows))
    got = denoiser(of).denoise(question)
    assert got.log_evidence is None
    assert relative_error(got.mean, want) < 1e-5


@pytest.mark.parametrize("architecture", WIDTHS)
def test_labels_and_levels_are_those_of_each_image(architecture: str) -> None:
    model, question = denoiser(config(architecture)), query()
    together = model.denoise(question).mean
    for i in range(len(question)):
        alone = model.denoise(question[i : i + 1]).mean
        assert relative_error(together[i : i + 1], alone) < 1e-5
    other = make_query(question.x, question.level, 2)
    assert relative_error(model.denoise(other).mean, together) > 1e-4


@pytest.mark.parametrize("architecture", ["resnet", "unet"])
def test_a_circular_network_commutes_with_shifts(architecture: str) -> None:
    model, question = denoiser(config(architecture, padding="circular")), query()
    shifted = make_query(question.x.roll((4, 8), (2, 3)), question.level, question.labels.tolist())
    got = model.denoise(shifted).mean
    assert relative_error(got, model.denoise(question).mean.roll((4, 8), (2, 3))) < 1e-5


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_convolutions_pad_as_torch_does_and_keep_the_layout(
    padding: Literal["zeros", "circular"],
) -> None:
    of = config(padding=padding, blocks=1, label_count=0, shape=(1, 5, 4))
    network = build_network(of)
    network.set_layout(torch.channels_last)
    plain = torch.nn.Conv2d(1, 8, 3, padding=1, padding_mode=padding)
    up = network.body.up
    assert isinstance(up, torch.nn.Conv2d)
    plain.load_state_dict(up.state_dict())
    x = random_images((2, 1, 5, 4))
    with torch.no_grad():
        hidden = up(x.clone(memory_format=torch.channels_last))
        torch.testing.assert_close(hidden, plain(x))
    assert hidden.is_contiguous(memory_format=torch.channels_last)


def test_a_resnet_sees_two_pixels_a_conv_and_no_further() -> None:
    model = denoiser(config(shape=(1, 21, 21), blocks=3, prediction="x0"))
    x = random_images((1, 1, 21, 21)).requires_grad_(False)
    far = x.clone()
    far[0, 0, 10 - 6, 10] += 1  # five convs reach five pixels
    near = x.clone()
    near[0, 0, 10 - 5, 10] += 1
    base, beyond, within = (
        model.denoise(make_query(image, from_sigma([1.0]), 0)).mean[0, 0, 10, 10]
        for image in (x, far, near)
    )
    assert base == beyond
    assert base != within


def test_the_paper_s_networks_have_the_paper_s_size() -> None:
    sizes = {}
    for architecture, widths in {"resnet": (256,), "unet": (64, 128, 256)}.items():
        of = config(architecture, widths=widths, shape=(3, 32, 32), label_count=10)
        network = build_network(of, "meta")
        sizes[architecture] = sum(parameter.numel() for parameter in network.parameters())
    assert sizes["resnet"] == pytest.approx(4.0e6, rel=0.05)
    assert sizes["unet"] == pytest.approx(2.0e6, rel=0.05)


def test_an_unconditional_network_refuses_a_label_and_a_conditional_one_may_need_it() -> None:
    question = query(1, label=1)
    with pytest.raises(InvalidArgumentError, match="labels: expected none"):
        denoiser(config(label_count=0)).check(question)
    strict = denoiser(config(null_label=False))
    strict.check(question)
    unlabelled = make_query(question.x, question.level)
    with pytest.raises(InvalidArgumentError, match="labels: expected 0 to 2"):
        strict.check(unlabelled)
    denoiser(config()).check(unlabelled)


def test_a_clipped_answer_stays_within_the_range_of_images_and_has_no_gradient_outside() -> None:
    of = config()
    plain, clipped = denoiser(of), denoiser(of, clip=True)
    noise = np.random.default_rng(0).normal(size=(2, *of.shape)).astype(np.float32)
    query = make_query(noise, NoiseLevel.of([(0.1, 0.995)] * 2), labels=[0, 1])
    free = plain.denoise(query).pixels
    assert np.abs(free).max() > 2
    assert np.array_equal(clipped.denoise(query).pixels, free.clip(-1, 1))
    assert clipped.info.implementation == f"{plain.info.implementation}, clipped"
    outside = (np.abs(free) > 1).astype(np.float32)
    answer = clipped.vjp(query, outside)
    assert np.abs(answer.mean - free.clip(-1, 1)).max() < 1e-4
    assert not answer.product.any()
    assert clipped.vjp(query, 1 - outside).product.any()


def test_a_wrong_shape_a_wrong_label_and_a_window_are_refused() -> None:
    model, level = denoiser(config("unet")), from_sigma([1.0])
    x = torch.zeros(1, *SHAPE)
    for bad, field in (
        (make_query(torch.zeros(1, 2, 7, 12), level), "x"),
        (make_query(x, level, LABELS), "labels"),
        (make_query(x, level, 0, 3), "windows"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"^{field}: expected"):
            model.check(bad)


def test_samplers_drive_a_network() -> None:
    model = denoiser(config(prediction="x0"))
    steps = list(sample(model, count=2, labels=[0, 2], options=Options(3)))
    assert steps[-1].x.shape == (2, *SHAPE)
    assert steps[-1].x.isfinite().all()


def test_information_tells_what_the_network_is() -> None:
    model = denoiser(config("unet", label_names=("a", "b", "c"), padding="circular"))
    info = model.info
    assert (info.kind, info.machine, info.padding) == ("network", "unet", "circular")
    assert (info.shape, info.label_count, info.label_names) == (SHAPE, LABELS, ("a", "b", "c"))
    assert info.memory_bytes == 4 * sum(
        p.numel() for p in build_network(config("unet"), "meta").parameters()
    )
    assert not info.batch_invariant
    assert not info.has_log_evidence


def test_operations_are_counted_for_one_image() -> None:
    of = config(shape=(1, 10, 10), widths=(8,), blocks=2)
    convs = 2 * 100 * 9 * (8 + 2 * 8 * 8 + 8)
    assert count_flops(of) == convs + 2 * 2 * 8 * 8


def test_a_batch_of_times_named_otherwise_is_the_same_query() -> None:
    model = denoiser(config())
    level = from_time([0.3, 0.7])
    x = random_images((2, *SHAPE))
    named = make_query(x, from_alpha_bar(level.alpha_bar), 1)
    got = model.denoise(concatenate([named[:1], named[1:]])).mean
    assert relative_error(got, model.denoise(make_query(x, level, 1)).mean) < 1e-5
