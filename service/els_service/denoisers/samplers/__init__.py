"""Reverse diffusion: samplers as generators that yield denoising calls and steps.

| module          | holds                                                                 |
|-----------------|-----------------------------------------------------------------------|
| ``trajectory``  | what a sampler yields and takes: calls, steps, options                |
| ``preserving``  | ``ddim``, ``ddim_released``, ``ddpm``: variance preserving             |
| ``exploding``   | ``heun``, ``euler``, ``dpmpp_2m``: variance exploding                  |
| ``pyramid``     | ``pyramid``: pictures, coarse to fine                                  |
| ``registry``    | samplers by name, and the loop that drives one                        |
"""

from els_service.denoisers.folder_scheduler import FolderScheduler
from els_service.denoisers.samplers.exploding import dpmpp_2m, euler, heun
from els_service.denoisers.samplers.preserving import ddim, ddim_released, ddpm
from els_service.denoisers.samplers.registry import (
    ALL_SAMPLERS,
    SAMPLERS,
    Sampler,
    check_options,
    evaluations_of,
    options_for,
    sample,
    state_shape,
    steps_of,
    windows_for,
)
from els_service.denoisers.samplers.trajectory import (
    DenoiseCall,
    Options,
    Resume,
    Step,
    Trajectory,
)

__all__ = [
    "ALL_SAMPLERS",
    "SAMPLERS",
    "DenoiseCall",
    "FolderScheduler",
    "Options",
    "Resume",
    "Sampler",
    "Step",
    "Trajectory",
    "check_options",
    "ddim",
    "ddim_released",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "evaluations_of",
    "heun",
    "options_for",
    "sample",
    "state_shape",
    "steps_of",
    "windows_for",
]
