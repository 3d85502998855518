"""Adapters speak the units and shapes of their library, which need not be installed for most."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from tests.support.denoisers import random_images
from tests.support.models_folder import DOCUMENTS, SHAPE, write_models

from els_client import torch as adapters
from els_client.torch import (
    AzulaDenoiser,
    DeepinvDenoiser,
    DiffusersUNet,
    KDenoiser,
    LocalDenoiser,
    SmallDenoiser,
)

X = random_images((3, *SHAPE), 1)
SIGMA = torch.tensor([0.3, 1.0, 4.0])
CLIENT: Any = None
COLUMN = SIGMA.view(3, 1, 1, 1)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> LocalDenoiser:
    root = tmp_path_factory.mktemp("adapters") / "models"
    return LocalDenoiser(write_models(root, {"zeros": DOCUMENTS["zeros"]}) / "zeros")


def test_the_public_names_are_sorted_and_there() -> None:
    assert adapters.__all__ == sorted(adapters.__all__)
    assert all(hasattr(adapters, name) for name in adapters.__all__)


def test_deepinv_has_pixels_and_levels_of_half_the_size(denoiser: LocalDenoiser) -> None:
    model = DeepinvDenoiser(denoiser)
    want = (denoiser(X, SIGMA) + 1) / 2
    for level in (SIGMA / 2, COLUMN / 2, (SIGMA / 2).tolist(), (SIGMA / 2).double().numpy()):
        torch.testing.assert_close(model((X + 1) / 2, level), want, rtol=0, atol=1e-5)
    x = ((X + 1) / 2).requires_grad_()
    (got,) = torch.autograd.grad(model(x, 0.5, some_option=1).sum(), x)
    y = X.clone().requires_grad_()
    (same,) = torch.autograd.grad(denoiser(y, 1.0).sum(), y)
    torch.testing.assert_close(got, same, rtol=0, atol=1e-5)


def test_deepinv_images_of_other_units_are_rejected(denoiser: LocalDenoiser) -> None:
    model, dark = DeepinvDenoiser(denoiser), torch.full((2, *SHAPE), -1.0)
    for images in (dark, 255 * torch.rand(2, *SHAPE)):
        with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\] plus noise of sigma"):
            model(images, 0.05)
    pulled = torch.func.vjp(lambda x: model(x, torch.tensor(0.05)), dark.abs())[1]
    assert pulled(dark)[0].isfinite().all()
    # Also with noise, and with a few pixels of an iterate that overshoot.
    noisy = torch.rand(2, *SHAPE) + torch.randn(2, *SHAPE)
    noisy[0, 0, 0, :2] = 40.0
    assert model(noisy, 1.0).isfinite().all()
    assert DeepinvDenoiser(denoiser, check_units=False)(dark, 0.05).isfinite().all()
    assert denoiser(255 * X, 0.05).isfinite().all()


def test_k_diffusion_gets_images_and_the_levels_of_heun(denoiser: LocalDenoiser) -> None:
    model = KDenoiser(denoiser)
    assert torch.equal(model(X, SIGMA), denoiser(X, SIGMA))
    assert torch.equal(model(X, SIGMA, label=[0, 1, 2]), denoiser(X, SIGMA, [0, 1, 2]))
    sigmas = model.get_sigmas(5)
    assert (float(sigmas[0]), float(sigmas[-2])) == pytest.approx((80.2, 0.002), rel=1e-3)
    assert (sigmas.shape, sigmas.dtype, float(sigmas[-1])) == ((6,), torch.float32, 0.0)
    assert KDenoiser(denoiser, sigma_min=0.1, sigma_max=10).get_sigmas(2).tolist() == (
        pytest.approx([10, 0.1, 0])
    )


def test_k_diffusion_needs_the_highest_level_of_a_network_with_its_own(
    denoiser: LocalDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "info", replace(denoiser.info, schedule="timesteps"))
    with pytest.raises(ValueError, match="sigma_max: expected the highest level that zeros"):
        KDenoiser(denoiser)


def test_smalldiffusion_gets_the_noise(denoiser: LocalDenoiser) -> None:
    model = SmallDenoiser(denoiser)
    torch.testing.assert_close(model(X, COLUMN), (X - denoiser(X, SIGMA)) / COLUMN)
    assert model.rand_input(4).shape == (4, *model.input_dims) == (4, *SHAPE)
    labels, level = torch.tensor([0, 1, 2]), torch.tensor(1.0)
    given, none = model(X, level, labels), model.predict_eps(X, level)
    assert torch.equal(model.predict_eps_cfg(X, level, labels, 0), given)
    assert torch.equal(model.predict_eps_cfg(X, level, None, 2), none)
    want = given + 2 * (given - none)
    torch.testing.assert_close(model.predict_eps_cfg(X, level, labels, 2), want)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusers_gets_what_its_scheduler_takes(denoiser: LocalDenoiser, prediction: str) -> None:
    scheduler = DDIMScheduler(50, prediction_type=prediction, clip_sample=False)
    unet = DiffusersUNet(denoiser, scheduler=scheduler)
    scheduler.set_timesteps(50)
    t = torch.tensor([0, 20, 49])
    x0 = denoiser(X, alpha_bar=scheduler.alphas_cumprod[t].double())
    found = unet(X, t).sample
    for image, time, mean, output in zip(X, t, x0, found, strict=True):
        got = scheduler.step(output, int(time), image).pred_original_sample
        torch.testing.assert_close(got, mean, rtol=0, atol=1e-4)
    assert torch.equal(unet(X, t, return_dict=False)[0], found)
    (half,) = unet(X.half(), 20, return_dict=False)
    torch.testing.assert_close(half.float(), unet(X, 20).sample, rtol=0, atol=1e-2)
    assert (unet.config.in_channels, unet.config.sample_size) == (1, (6, 5))
    assert (unet.dtype, unet.to(torch.float16).dtype) == (torch.float32, torch.float16)


# Of diffusers beside numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_diffusers_levels_between_timesteps_are_those_of_its_euler(denoiser: LocalDenoiser) -> None:
    scheduler = EulerDiscreteScheduler(50, timestep_spacing="linspace")
    scheduler.set_timesteps(4)
    levels = DiffusersUNet(denoiser, scheduler=scheduler)._levels(scheduler.timesteps)
    torch.testing.assert_close((1 / levels - 1).sqrt().float(), scheduler.sigmas[:-1])


def test_what_diffusers_does_not_fit_is_rejected(denoiser: LocalDenoiser) -> None:
    scheduler = DDIMScheduler(50)
    unet = DiffusersUNet(denoiser, scheduler=scheduler)
    for timestep in (50, -1, torch.tensor([0, 3, 50])):
        with pytest.raises(ValueError, match="timestep: expected 0 to 49, got"):
            unet(X, timestep)
    with pytest.raises(ValueError, match="expected one with alphas_cumprod, got FlowMatch"):
        DiffusersUNet(denoiser, scheduler=FlowMatchEulerDiscreteScheduler())
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match=r"prediction_type: expected one of epsilon.* got flow"):
        DiffusersUNet(denoiser, scheduler=scheduler)


def test_an_adapter_takes_a_model_or_a_denoiser_not_both(denoiser: LocalDenoiser) -> None:
    assert torch.equal(KDenoiser(denoiser.client, "zeros", 1)(X, SIGMA), denoiser(X, SIGMA, 1))
    with pytest.raises(TypeError, match="model: expected the name of a model, got None"):
        SmallDenoiser(denoiser.client)
    with pytest.raises(TypeError, match="expected none beside a denoiser"):
        SmallDenoiser(denoiser, "zeros")


MISSING: dict[str, tuple[str, Callable[[], object], str]] = {
    "torch": ("torch", lambda: import_module("els_client.torch"), "els_client.torch needs torch"),
    "azula": ("azula", lambda: AzulaDenoiser(CLIENT, "zeros"), "AzulaDenoiser needs azula"),
    "diffusers": (
        "diffusers",
        lambda: DiffusersUNet(CLIENT, "zeros", scheduler=None),
        "DiffusersUNet needs diffusers",
    ),
    "server": (
        "els_service.config",
        lambda: LocalDenoiser("zeros"),
        "LocalDenoiser needs the packages of the server",
    ),
}


@pytest.mark.parametrize("extra", MISSING)
def test_without_an_extra_the_error_names_it(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, call, text = MISSING[extra]
    for name in [name for name in sys.modules if name.startswith("els_client.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as raised:
        call()
    assert str(raised.value) == f"{text}: pip install 'els-denoise[{extra}]'"
