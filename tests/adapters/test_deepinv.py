"""deepinv restores a picture by a served model no worse than by its own closed-form denoiser."""

from __future__ import annotations

import deepinv
import pytest
import torch
from clients.examples import deepinv_restoration as example

from els_client import Client
from els_client.torch import DeepinvDenoiser

GAIN_DB, SLACK_DB = 3.0, 0.05
Pictures = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def closed_form(pictures: Pictures) -> torch.nn.Module:
    model: torch.nn.Module = deepinv.models.MMSE(pictures["bank"], device=torch.device("cpu"))
    return model


def test_the_machine_of_whole_images_is_the_closed_form_denoiser(
    client: Client, pictures: Pictures, closed_form: torch.nn.Module
) -> None:
    sigma = torch.tensor([1.0, 3.0])
    x = pictures["bank"][:2] + sigma.view(2, 1, 1, 1) * torch.randn(2, 1, 28, 28)
    x.requires_grad_()
    along = torch.randn(2, 1, 28, 28)
    found = []
    for denoiser in (DeepinvDenoiser(client, "ideal"), closed_form):
        denoised = denoiser(x, sigma)
        found.append((denoised.detach(), torch.autograd.grad(denoised, x, along)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("task", ["deblurring (plug-and-play)", "inpainting (DPS)"])
def test_a_picture_is_restored_no_worse_than_by_the_closed_form_denoiser(
    client: Client, pictures: Pictures, closed_form: torch.nn.Module, task: str
) -> None:
    picture = pictures["picture"]
    physics, restore = example.tasks(picture)[task]
    measured, restored = example.restoration(
        picture, physics, restore, DeepinvDenoiser(client, "els")
    )
    by_closed_form = restore(measured, physics, closed_form)
    gained = example.psnr(restored, picture) - example.psnr(measured, picture)
    print(f"{task}: {gained:.1f} dB")
    assert gained >= GAIN_DB
    assert example.psnr(restored, picture) >= example.psnr(by_closed_form, picture) - SLACK_DB


def test_pseudoinverse_guidance_differentiates_by_torch_func(
    client: Client, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "STEPS", 20)
    picture = pictures["picture"]
    physics, _ = example.tasks(picture)["inpainting (DPS)"]
    denoiser = DeepinvDenoiser(client, "els")
    measured, restored = example.restoration(
        picture, physics, example.pseudoinverse_guided, denoiser
    )
    assert example.psnr(restored, picture) >= example.psnr(measured, picture) + GAIN_DB


def test_red_and_score_priors_get_the_residual(client: Client, pictures: Pictures) -> None:
    denoiser, x, sigma = DeepinvDenoiser(client, "els"), pictures["picture"], 0.2
    residual = x - denoiser(x, sigma)
    torch.testing.assert_close(deepinv.optim.RED(denoiser).grad(x, sigma), residual)
    score = deepinv.optim.ScorePrior(denoiser).grad(x, sigma)
    torch.testing.assert_close(score, residual / sigma**2)


def test_pictures_in_minus_one_to_one_are_rejected(client: Client, pictures: Pictures) -> None:
    denoiser = DeepinvDenoiser(client, "els")
    prior = deepinv.optim.PnP(denoiser)
    with pytest.raises(ValueError, match="as denoisers of deepinv take them"):
        prior.prox(2 * pictures["picture"] - 1, 0.05)
