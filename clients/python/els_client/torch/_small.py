"""A served model for the samplers of smalldiffusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from els_client._types import Integers
from els_client.torch._denoiser import RemoteDenoiser, served
from els_client.torch._functions import Denoises


class SmallDenoiser(nn.Module):
    """Model of smalldiffusion: ``model(x, sigma, cond=None)`` → ε = (x - D(x))/σ.

    Images are x = x0 + σ·ε in [-1, 1], σ has one value or is [B, 1, 1, 1], ``cond`` has labels.

    Args:
        client: ``Client`` or ``LocalClient``; or a ``RemoteDenoiser``, without the others.
        model: Name of the model.
        label: Of all images or one for each; None for none.

    Attributes:
        input_dims: (C, H, W) of the model.

    Example:
        >>> sigmas = smalldiffusion.ScheduleLogLinear(200, 0.01, 20).sample_sigmas(20)
        >>> *_, drawn = smalldiffusion.samples(SmallDenoiser(client, "fashion-els"), sigmas)
    """

    def __init__(
        self,
        client: Denoises | RemoteDenoiser,
        model: str | None = None,
        label: Integers | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = served(client, model, label)
        self.input_dims = self.denoiser.info.shape

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return ε, like x [B, C, H, W]."""
        eps: Tensor = (x - self.denoiser(x, sigma, cond)) / sigma
        return eps

    def predict_eps(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return ε, like x."""
        return self.forward(x, sigma, cond)

    def predict_eps_cfg(
        self, x: Tensor, sigma: Tensor, cond: Tensor | None, cfg_scale: float
    ) -> Tensor:
        """Return ε(cond) + w·(ε(cond) - ε(no label)) with w = ``cfg_scale``, in one call."""
        if cond is None or cfg_scale == 0:
            return self.forward(x, sigma, cond)
        both = torch.cat([cond, torch.full_like(cond, -1)])
        given, none = self.forward(torch.cat([x, x]), sigma, both).chunk(2)
        return given + cfg_scale * (given - none)

    def rand_input(self, batchsize: int, **kwargs: Any) -> Tensor:
        """Return standard normal noise [batchsize, C, H, W]."""
        return torch.randn(batchsize, *self.input_dims, **kwargs)
