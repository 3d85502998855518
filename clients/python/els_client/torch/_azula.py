"""A served model as a denoiser of azula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from els_client._types import Integers
from els_client.torch._denoiser import RemoteDenoiser, checked, library, served
from els_client.torch._functions import Denoises

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Time [*] → (α, σ) of x = α·x0 + σ·ε, as a ``Schedule`` of azula."""


class AzulaDenoiser(nn.Module):
    """Denoiser of azula: ``denoiser(x_t, t)`` → posterior of x_t = α·x0 + σ·ε, x0 in [-1, 1].

    For its samplers and for guidance that differentiates the mean, such as MMPS. azula's DPS takes
    one norm over the whole batch, so an image in company is another than alone.

    Args:
        client: ``Client`` or ``LocalClient``; or a ``RemoteDenoiser``, without the others.
        model: Name of the model.
        label: Of all images or one for each; None for none.
        schedule: Of azula; by default its ``CosineSchedule``.
        variance: Whether posteriors are a ``GaussianPosterior`` with the variance of each pixel,
            for models with sources; otherwise a ``DiracPosterior``.

    Raises:
        ModuleNotFoundError: azula is not installed.

    Example:
        >>> sampler = azula.sample.DDIMSampler(AzulaDenoiser(client, "fashion-els"), steps=20)
        >>> drawn = sampler(sampler.init((4, 1, 28, 28)))
    """

    def __init__(
        self,
        client: Denoises | RemoteDenoiser,
        model: str | None = None,
        label: Integers | None = None,
        *,
        schedule: Schedule | None = None,
        variance: bool = False,
    ) -> None:
        super().__init__()
        self._posteriors = library("azula.denoise", type(self).__name__)
        self.denoiser = served(client, model, label)
        noise = library("azula.noise", type(self).__name__)
        self.schedule: Schedule = noise.CosineSchedule() if schedule is None else schedule
        self._has_variance = variance

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
        """Return the posterior, its mean and variance like x_t [B, C, H, W].

        Args:
            x_t: Noisy images.
            t: Time in [0, 1], one or one for each image.
            **kwargs: ``label`` and options of a query.
        """
        alpha, sigma = (each.reshape(-1, 1, 1, 1) for each in self.schedule(t))
        x, level = checked(x_t) / alpha.to(x_t), sigma / alpha
        mean = self.denoiser(x, level, **kwargs)
        if self._has_variance:
            variance = self.denoiser.variance(x, level, **kwargs)
            return self._posteriors.GaussianPosterior(mean, variance)
        return self._posteriors.DiracPosterior(mean)
