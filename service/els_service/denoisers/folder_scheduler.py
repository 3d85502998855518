"""Steps of the scheduler in a diffusers folder, for requests that ask for its pictures.

A sampler then visits the timesteps that the scheduler class of its name would with the folder's
fields: ``ddim`` those of DDIMScheduler, ``ddpm`` of DDPMScheduler, ``euler`` of
EulerDiscreteScheduler, ``dpmpp_2m`` of DPMSolverMultistepScheduler. Fields that the file lacks have
the defaults of the folder's own class. Where a scheduler of diffusers contradicts itself, its steps
are not repeated:

- DDIMScheduler takes timestep - T // n for the next step's level, which is another one under
  ``linspace``, and under ``trailing`` if n does not divide T. Here it is the next step's.
- DDPMScheduler adds noise of β after the last step if ``variance_type`` is ``fixed_large`` and the
  last timestep is not 0, and NaN if it is ``fixed_large_log``. Here the last step adds none, and
  ``fixed_large_log`` means β.
- EulerDiscreteScheduler ends a Karras ramp at the last of the spacing's levels, which under
  ``trailing`` is far from clean. Here it ends at the lowest trained level.
- DPMSolverMultistepScheduler rounds the timesteps of a Karras ramp but not its levels. Here the
  network gets the timestep of the level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from els_service.denoisers.levels import Floats, Pair
from els_service.errors import InvalidArgumentError

SPACINGS = ("leading", "linspace", "trailing")
_EXPLODING = ("euler", "dpmpp_2m")
_SAMPLERS = ("ddim", "ddpm", *_EXPLODING)
_RHO = 7.0
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
_RAMPS: dict[str, tuple[object, ...]] = {
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "final_sigmas_type": ("zero",),
}
_ONLY: dict[str, dict[str, tuple[object, ...]]] = {
    "ddim": {"set_alpha_to_one": (True, False)},
    "ddpm": {"variance_type": (*_VARIANCES, None)},
    "euler": _RAMPS
    | {"interpolation_type": ("linear",), "sigma_min": (None,), "sigma_max": (None,)},
    "dpmpp_2m": _RAMPS
    | {
        "algorithm_type": ("dpmsolver++", "deis"),  # "deis" is replaced by the first
        "solver_order": (2,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # likewise
        "lambda_min_clipped": (-math.inf,),
        "use_lu_lambdas": (False, None),
    },
}
"""Sampler → field → values whose steps are known; a field that is absent is as if known."""


@dataclass(frozen=True, eq=False)
class FolderScheduler:
    """Fields of a folder's scheduler that determine its steps, and its trained levels."""

    name: str
    """Class of the scheduler."""
    sigma: Floats = field(repr=False)
    """[T], s/a of each timestep, increasing."""
    spacing: str = "leading"
    """One of ``SPACINGS``."""
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    """Whether DDIM ends at ᾱ = 1, not at that of timestep 0."""
    clip: float | None = None
    """D is clipped to ±clip by ddim and ddpm."""
    variance_type: str = "fixed_small"
    karras: bool = False
    """Whether euler and dpmpp_2m visit a ramp of Karras et al. 2022."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Sampler → field with its value for which the sampler's steps are not known."""

    @property
    def large_variance(self) -> bool:
        """Whether a step of DDPM adds noise of variance β, not β̃."""
        return self.variance_type.startswith("fixed_large")

    @property
    def samplers(self) -> tuple[str, ...]:
        """Samplers that can take its steps."""
        return tuple(name for name in _SAMPLERS if name not in self.unsupported)

    def clipped(self, mean: Tensor) -> Tensor:
        """Return D clipped as the scheduler does."""
        return mean if self.clip is None else mean.clamp(-self.clip, self.clip)

    def check(self, sampler: str, steps: int) -> None:
        """Check that the scheduler has such steps.

        Raises:
            InvalidArgumentError: Not one of ``ddim``, ``ddpm``, ``euler`` and ``dpmpp_2m``, a
                field whose steps are not known, or too many steps.
        """
        if sampler not in _SAMPLERS:
            expected = f"one of {', '.join(_SAMPLERS)} with the folder's timesteps"
            raise InvalidArgumentError("sampler", expected, sampler)
        if sampler in self.unsupported:
            expected = f"a folder whose scheduler is supported for {sampler}"
            raise InvalidArgumentError("timesteps", expected, self.unsupported[sampler])
        if self.karras and sampler in _EXPLODING:
            return
        chosen = self._timesteps(sampler, steps) if steps <= len(self.sigma) else np.zeros(0)
        falls = len(chosen) == steps and (np.diff(chosen) < 0).all()
        if not falls or not 0 <= chosen[-1] <= chosen[0] <= len(self.sigma) - 1:
            expected = f"distinct timesteps from 0 to {len(self.sigma) - 1} in the folder's spacing"
            raise InvalidArgumentError("steps", expected, steps)

    def preserving(self, steps: int, *, clean: bool = False) -> list[Pair]:
        """Return (a, s) of each step of ddim or ddpm and of the end.

        Args:
            steps: number of steps.
            clean: whether the end is ᾱ = 1 in any case.
        """
        chosen = self._timesteps("ddim", steps).astype(np.int64)
        sigma = self.sigma[chosen]
        a = 1 / np.sqrt(1 + sigma**2)
        lowest = float(self.sigma[0])
        a_end = (1 + lowest**2) ** -0.5
        end = (1.0, 0.0) if clean or self.set_alpha_to_one else (a_end, lowest * a_end)
        return [*zip(a.tolist(), (sigma * a).tolist(), strict=True), end]

    def exploding(self, sampler: str, steps: int) -> list[float]:
        """Return σ of each step of euler or dpmpp_2m, and 0."""
        if self.karras and sampler == "dpmpp_2m":
            top, bottom = self.sigma[-1], self.sigma[0]
        else:
            timesteps = self._timesteps(sampler, steps)
            sigma = np.interp(timesteps, np.arange(len(self.sigma)), self.sigma)
            if not self.karras:
                return [*sigma.tolist(), 0.0]
            top, bottom = sigma[0], self.sigma[0] if self.spacing == "trailing" else sigma[-1]
        ramp = np.linspace(0, 1, steps)
        high, low = top ** (1 / _RHO), bottom ** (1 / _RHO)
        return [*((high + ramp * (low - high)) ** _RHO).tolist(), 0.0]

    def begin(self, sampler: str, sigma: float) -> float:
        """Return the scale of the noise that euler or dpmpp_2m starts from at ``sigma``."""
        if sampler == "euler" and self.spacing != "leading":
            return sigma
        return float(np.sqrt(1 + sigma**2))

    def _timesteps(self, sampler: str, steps: int) -> Floats:
        """Return the timesteps of the steps, falling; whole numbers but for euler's linspace."""
        count = len(self.sigma)
        if self.spacing == "trailing":
            # As diffusers computes it, less what rounding may append.
            return np.round(np.arange(count, 0, -count / steps)[:steps]) - 1
        # DPMSolverMultistepScheduler leaves the last of steps + 1 timesteps out.
        spaced = steps + (sampler == "dpmpp_2m")
        if self.spacing == "linspace":
            even = np.linspace(0, count - 1, spaced, dtype=np.float64)
            rounded = even if sampler == "euler" else np.rint(even)
        else:
            rounded = np.arange(spaced) * float(count // spaced) + self.steps_offset
        return rounded[::-1][:steps]


def scheduler_of(
    name: str, fields: Mapping[str, Any], sigma: Floats, clip: float | None
) -> FolderScheduler:
    """Return the scheduler of a folder.

    Args:
        name: its class.
        fields: fields of the file, and the defaults of the class.
        sigma: [T], s/a of each timestep, increasing.
        clip: D is clipped to ±clip by ddim and ddpm; None for not.
    """
    spacing, offset = fields.get("timestep_spacing", "leading"), fields.get("steps_offset", 0)
    unsupported = {
        sampler: f"{field} {fields[field]!r:.80}"
        for sampler, only in _ONLY.items()
        for field, allowed in only.items()
        if field in fields and fields[field] not in allowed
    }
    if spacing not in SPACINGS:
        unsupported = dict.fromkeys(_SAMPLERS, f"timestep_spacing {spacing!r:.80}")
    if not isinstance(offset, int) or not 0 <= offset < len(sigma):
        unsupported = dict.fromkeys(_SAMPLERS, f"steps_offset {offset!r:.80}")
        offset = 0
    return FolderScheduler(
        name=name,
        sigma=sigma,
        spacing=str(spacing),
        steps_offset=offset,
        set_alpha_to_one=fields.get("set_alpha_to_one") is not False,
        clip=clip,
        variance_type=str(fields.get("variance_type") or _VARIANCES[0]),
        karras=fields.get("use_karras_sigmas") is True,
        unsupported=unsupported,
    )
