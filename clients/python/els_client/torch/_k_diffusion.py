"""A served model for the samplers of k-diffusion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from els_client._types import Integers
from els_client.torch._denoiser import RemoteDenoiser, served
from els_client.torch._functions import Denoises

_RHO = 7.0
_COSINE_SIGMA = math.tan(math.pi / (2 * 1.008))
"""σ at t = 1 of the schedule ``cosine``: 80.2."""


class KDenoiser(nn.Module):
    """Model of k-diffusion: ``model(x, sigma, **extra_args)`` → D(x), x = x0 + σ·ε in [-1, 1].

    ``extra_args`` are ``label`` and options of a query, such as ``guidance``. Images have gradients
    as those of ``RemoteDenoiser``, which guidance by a loss needs.

    Args:
        client: ``Client`` or ``LocalClient``; or a ``RemoteDenoiser``, without the others.
        model: Name of the model.
        label: Of all images or one for each; None for none.
        sigma_min: Lowest level of ``get_sigmas``.
        sigma_max: Highest level of ``get_sigmas``; by default 80.2, that of the schedule
            ``cosine``.

    Raises:
        ValueError: ``sigma_max`` is not given, and the model has levels of its own.

    Example:
        >>> model = KDenoiser(client, "fashion-els")
        >>> sigmas = model.get_sigmas(18)
        >>> drawn = k_diffusion.sampling.sample_heun(model, noise * sigmas[0], sigmas)
    """

    def __init__(
        self,
        client: Denoises | RemoteDenoiser,
        model: str | None = None,
        label: Integers | None = None,
        *,
        sigma_min: float = 0.002,
        sigma_max: float | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = served(client, model, label)
        schedule = self.denoiser.info.schedule
        if sigma_max is None and schedule != "cosine":
            raise ValueError(
                f"sigma_max: expected the highest level that {self.denoiser.model} was trained "
                f"at, as its schedule is {schedule}, got None"
            )
        self.sigma_min = sigma_min
        self.sigma_max = _COSINE_SIGMA if sigma_max is None else sigma_max

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """Return D(x), like x [B, C, H, W]; sigma is [B] or has one value."""
        found: Tensor = self.denoiser(x, sigma, **extra_args)
        return found

    def get_sigmas(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """Return n falling levels and 0, float32 [n + 1]: those that ``heun`` visits.

        Karras et al. 2022, "Elucidating the design space of diffusion-based generative models",
        equation 5, ρ = 7.
        """
        high, low = self.sigma_max ** (1 / _RHO), self.sigma_min ** (1 / _RHO)
        ramp = torch.linspace(high, low, n, dtype=torch.float64)
        return torch.cat([ramp**_RHO, ramp.new_zeros(1)]).to(device, torch.float32)
