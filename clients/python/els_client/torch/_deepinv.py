"""A served model as a denoiser of deepinv."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from els_client._types import Integers, Levels
from els_client.torch._denoiser import RemoteDenoiser, checked, served
from els_client.torch._functions import Denoises

_MARGIN, _DEVIATIONS, _SHARE = 0.5, 6.0, 0.1


class DeepinvDenoiser(nn.Module):
    """Denoiser of deepinv: ``denoiser(x, sigma)`` → D(x), with pixels and σ in units of [0, 1].

    For its plug-and-play and RED priors, score priors, diffusion solvers and data fidelities, those
    that call ``torch.func.vjp`` among them. The server is asked for 2x - 1 at 2σ.

    Args:
        client: ``Client`` or ``LocalClient``; or a ``RemoteDenoiser``, without the others.
        model: Name of the model.
        label: Of all images or one for each; None for none.
        check_units: Whether to reject images that are not in [0, 1].

    Example:
        >>> prior = deepinv.optim.PnP(DeepinvDenoiser(client, "fashion-ideal"))
    """

    def __init__(
        self,
        client: Denoises | RemoteDenoiser,
        model: str | None = None,
        label: Integers | None = None,
        *,
        check_units: bool = True,
    ) -> None:
        super().__init__()
        # A denoiser that is given may be used beside this one, in its own units.
        self.denoiser = copy.copy(served(client, model, label))
        self.denoiser._check = _check_units if check_units else None

    def forward(
        self,
        x: Tensor,
        sigma: Levels | Tensor,
        label: Integers | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return D(x) in [0, 1], like x [B, C, H, W].

        Args:
            x: Images in [0, 1], to which noise was added.
            sigma: Level in the same unit: one, or one for each image.
            label: In place of the denoiser's.
            **kwargs: Ignored, as by denoisers of deepinv: its solvers pass on what they are given.

        Raises:
            ValueError: A tenth of the pixels of an image are further outside [0, 1] than 0.25 and
                six deviations of the noise; or as ``RemoteDenoiser``.
        """
        level = torch.as_tensor(sigma)
        denoised: Tensor = self.denoiser(2 * checked(x) - 1, 2 * level, label)
        return (denoised + 1) / 2


def _check_units(x: Tensor, level: Tensor) -> None:
    """Raise ValueError if images are not in [-1, 1] up to noise; half of both in units of deepinv.

    Iterates of a solver overshoot in a few pixels, images of other units in most.
    """
    sigma = level.reshape(-1, 1).to(x.device)
    outside = x.detach().flatten(1).abs() - 1 - _MARGIN > _DEVIATIONS * sigma
    share = float(outside.float().mean(1).max())
    if share > _SHARE:
        raise ValueError(
            f"x: expected pixels in [0, 1] plus noise of sigma {float(sigma.max()) / 2:g}, as "
            f"denoisers of deepinv take them, got {share:.0%} of an image outside, from "
            f"{float(x.min() + 1) / 2:g} to {float(x.max() + 1) / 2:g}"
        )
