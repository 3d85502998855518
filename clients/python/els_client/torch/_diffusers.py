"""A served model in place of a ``UNet2DModel`` of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from els_client._types import Integers
from els_client.torch._denoiser import RemoteDenoiser, checked, library, served
from els_client.torch._functions import Denoises

_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DiffusersUNet(nn.Module):
    """``UNet2DModel`` of diffusers: ``unet(sample, timestep)`` → ``.sample``, ε, v or D(x).

    For pipelines such as ``DDIMPipeline``, and loops over the timesteps of a scheduler.

    Args:
        client: ``Client`` or ``LocalClient``; or a ``RemoteDenoiser``, without the others.
        model: Name of the model.
        label: Of all images or one for each; None for none.
        scheduler: Of diffusers, with ``alphas_cumprod`` and ``config.prediction_type``: timesteps
            have its levels, and what is returned is what it takes.

    Attributes:
        config: ``in_channels``, ``out_channels``, ``sample_size`` and ``prediction_type``.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        ValueError: The scheduler has no levels of x = √ᾱ·x0 + √(1-ᾱ)·ε, or another prediction.

    Example:
        >>> scheduler = diffusers.DDIMScheduler(clip_sample=False)
        >>> unet = DiffusersUNet(client, "fashion-els", scheduler=scheduler)
        >>> images = diffusers.DDIMPipeline(unet, scheduler)(num_inference_steps=20).images
    """

    def __init__(
        self,
        client: Denoises | RemoteDenoiser,
        model: str | None = None,
        label: Integers | None = None,
        *,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self._output = library("diffusers.models.unets.unet_2d", type(self).__name__).UNet2DOutput
        frozen = library("diffusers.configuration_utils", type(self).__name__).FrozenDict
        self.denoiser = served(client, model, label)
        if getattr(scheduler, "alphas_cumprod", None) is None:
            expected = "scheduler: expected one with alphas_cumprod"
            raise ValueError(f"{expected}, got {type(scheduler).__name__}")
        prediction = scheduler.config.get("prediction_type", "epsilon")
        if prediction not in _PREDICTIONS:
            expected = f"prediction_type: expected one of {', '.join(_PREDICTIONS)}"
            raise ValueError(f"{expected}, got {prediction}")
        alpha_bar = scheduler.alphas_cumprod.double().cpu()
        self._sigmas = (1 / alpha_bar - 1).sqrt()
        channels, height, width = self.denoiser.info.shape
        self.config = frozen(
            in_channels=channels,
            out_channels=channels,
            sample_size=height if height == width else (height, width),
            prediction_type=prediction,
        )
        # Follows ``to``: pipelines draw their noise of its dtype and on its device.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    _place: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Type that the module was moved to."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Device that the module was moved to."""
        return self._place.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return ``UNet2DOutput``, or a tuple of its sample, like ``sample`` [B, C, H, W].

        Args:
            sample: Images √ᾱ·x0 + √(1-ᾱ)·ε, x0 in [-1, 1].
            timestep: One or one for each image; between two whole ones σ is interpolated, as
                diffusers does it.
            class_labels: In place of the module's label.
            return_dict: Whether ``.sample`` is returned, not a tuple.

        Raises:
            ValueError: A timestep is not among those of the scheduler.
        """
        alpha_bar = self._levels(timestep)
        # Halves have too few digits for the difference that ε is.
        half = checked(sample).dtype in (torch.float16, torch.bfloat16)
        x = sample.float() if half else sample
        x0 = self.denoiser(x, label=class_labels, alpha_bar=alpha_bar)
        a, s = (each.to(x).view(-1, 1, 1, 1) for each in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
        found = x0
        if self.config.prediction_type != "sample":
            eps = (x - a * x0) / s
            found = eps if self.config.prediction_type == "epsilon" else a * eps - s * x0
        found = found.to(sample.dtype)
        return self._output(sample=found) if return_dict else (found,)

    def _levels(self, timestep: Tensor | float) -> Tensor:
        """Return ᾱ of timesteps, float64 [1 or B]."""
        given = torch.as_tensor(timestep).detach().double().cpu().reshape(-1)
        last = len(self._sigmas) - 1
        if not ((given >= 0) & (given <= last)).all():
            raise ValueError(f"timestep: expected 0 to {last}, got {given.tolist()}")
        below = given.floor().long()
        above = (below + 1).clamp(max=last)
        sigma = torch.lerp(self._sigmas[below], self._sigmas[above], given - below)
        return 1 / (1 + sigma**2)
