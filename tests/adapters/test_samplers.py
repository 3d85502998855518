"""Samplers of k-diffusion, smalldiffusion and azula draw the images that the server draws."""

from __future__ import annotations

import math

import azula.denoise
import azula.guidance
import azula.linalg.covariance
import azula.sample
import pytest
import smalldiffusion
import torch
from k_diffusion import sampling
from torch import Tensor

from els_client import Client
from els_client._types import Sampler
from els_client.torch import AzulaDenoiser, KDenoiser, SmallDenoiser

STEPS, COUNT = 8, 2
MODEL = "ideal"


def drawn(client: Client, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Return noise and images of the server."""
    steps = client.sample(model=MODEL, sampler=sampler, steps=STEPS, count=COUNT, want=["noise"])
    first, *_, last = steps
    return torch.from_numpy(first.noise), torch.from_numpy(last.x)


def close(got: Tensor, want: Tensor, budget: float) -> None:
    torch.testing.assert_close(got.to(want), want, rtol=0, atol=budget)


@pytest.mark.parametrize("sampler", ["heun", "euler"])
def test_k_diffusion_draws_the_images_of_the_server(client: Client, sampler: Sampler) -> None:
    noise, want = drawn(client, sampler)
    model = KDenoiser(client, MODEL)
    sigmas = model.get_sigmas(STEPS)
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    draw = {"heun": sampling.sample_heun, "euler": sampling.sample_euler}[sampler]
    close(draw(model, x, sigmas, disable=True), want, 1e-3)
    own = sampling.get_sigmas_karras(STEPS, model.sigma_min, model.sigma_max)
    close(own, sigmas, 1e-4)


def test_k_diffusion_passes_extra_arguments(client: Client) -> None:
    model, sigmas = KDenoiser(client, "els"), torch.tensor([1.0, 0.0])
    x = torch.randn(1, 1, 28, 28)
    got = sampling.sample_euler(model, x, sigmas, extra_args={"window": 3}, disable=True)
    close(got, torch.from_numpy(client.denoise(x, model="els", sigma=1.0, window=3)), 1e-5)


def test_smalldiffusion_draws_the_images_of_euler(client: Client) -> None:
    noise, want = drawn(client, "euler")
    sigmas = KDenoiser(client, MODEL).get_sigmas(STEPS)
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    *_, got = smalldiffusion.samples(SmallDenoiser(client, MODEL), sigmas, xt=x)
    close(got, want, 1e-3)
    shapes = [image.shape for image in smalldiffusion.samples(SmallDenoiser(client, MODEL), sigmas)]
    assert shapes == [(1, 1, 28, 28)] * STEPS


class Cosine(azula.noise.Schedule):
    """The schedule ``cosine`` of the server."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * math.pi / (2 * 1.008)
        return torch.cos(angle), torch.sin(angle)


def test_azula_draws_the_images_of_ddim(client: Client) -> None:
    noise, want = drawn(client, "ddim")
    denoiser = AzulaDenoiser(client, MODEL, schedule=Cosine())
    sampler = azula.sample.DDIMSampler(denoiser, steps=STEPS, silent=True, dtype=torch.float64)
    close(sampler(noise.double()), want, 1e-3)


def test_azula_gets_posteriors_with_a_variance(client: Client) -> None:
    denoiser = AzulaDenoiser(client, MODEL, variance=True)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([0.3, 0.7])
    alpha, sigma = (each.view(2, 1, 1, 1) for each in denoiser.schedule(t))
    posterior = denoiser(x, t)
    assert isinstance(posterior, azula.denoise.GaussianPosterior)
    mean, variance = client.denoise_with_variance(
        (x / alpha).numpy(), model=MODEL, sigma=(sigma / alpha).numpy()
    )
    close(posterior.mean, torch.from_numpy(mean), 1e-5)
    close(posterior.var, torch.from_numpy(variance), 1e-5)
    assert posterior.log_prob(x).shape == x.shape


class Exact(azula.denoise.Denoiser):
    """The posterior mean over a bank in [-1, 1], differentiated by torch."""

    def __init__(self, bank: Tensor, schedule: azula.noise.Schedule) -> None:
        super().__init__()
        self.bank, self.schedule = bank.flatten(1), schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: object) -> azula.denoise.DiracPosterior:
        alpha, sigma = self.schedule(t)
        differences = x_t.flatten(1)[:, None] - alpha * self.bank
        weights = torch.softmax(-differences.square().sum(-1) / (2 * sigma**2), 1)
        return azula.denoise.DiracPosterior((weights @ self.bank).view_as(x_t))


def test_azula_s_moment_matching_is_that_of_the_formula(
    client: Client, pictures: dict[str, Tensor]
) -> None:
    picture, t = 2 * pictures["picture"] - 1, torch.tensor(0.97)
    draw = torch.Generator().manual_seed(0)
    mask = (torch.rand(picture.shape, generator=draw) < 0.5).float()
    served = AzulaDenoiser(client, MODEL)
    exact = Exact(2 * pictures["bank"] - 1, served.schedule)
    alpha, sigma = served.schedule(t)
    x = alpha * picture + sigma * torch.randn(picture.shape, generator=draw)
    covariance = azula.linalg.covariance.IsotropicCovariance(torch.tensor(0.01))

    def measure(x: Tensor) -> Tensor:
        # Solvers of azula take norms along the last axis.
        return (mask * x).flatten(1)

    found = [
        azula.guidance.MMPSDenoiser(one, measure(picture), measure, covariance, iterations=3)(
            x, t
        ).mean.detach()
        for one in (served, exact)
    ]
    close(found[0], found[1], 2e-3)
    assert float((found[1] - exact(x, t).mean).abs().max()) > 0.05
