"""Training parameters of schedulers without betas: flow matching and EDM.

Their grids of levels for sampling (shifts that depend on the resolution, Karras' or exponential
ramps) are not those of ``Sample``, and of no meaning for the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from els_service.denoisers.levels import MAX_SIGMA, MIN_SIGMA
from els_service.denoisers.pretrained.time_inputs import MAX_TIMESTEPS, EdmTime, FlowTime
from els_service.errors import LoadError

FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDMS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
_OFF = {"use_dynamic_shifting": False, "invert_sigmas": False}
"""Fields that change what the network takes → supported value."""


def flow_time(fields: Mapping[str, Any], shift: str, path: Path) -> FlowTime:
    """Return the time input of a flow-matching scheduler.

    Args:
        fields: its configuration, with defaults.
        shift: name of the field of the shift.
        path: path of the configuration, for errors.

    Raises:
        LoadError: A field is invalid or not supported; names it.
    """
    for name, value in _OFF.items():
        if fields.get(name, value) not in (value, None):
            raise LoadError(path, f"{name}: expected {value}, got {fields[name]!r:.80}")
    count = fields["num_train_timesteps"]
    if not isinstance(count, int) or not 2 <= count <= MAX_TIMESTEPS:
        expected = f"2 to {MAX_TIMESTEPS}"
        raise LoadError(path, f"num_train_timesteps: expected {expected}, got {count!r:.80}")
    factor = _number(fields, shift, (1e-3, 1e3), path)
    return FlowTime(float(count), factor)


def edm_time(fields: Mapping[str, Any], path: Path) -> tuple[EdmTime, float]:
    """Return the time input of an EDM scheduler, and its ``sigma_data``.

    Raises:
        LoadError: A field is invalid or not supported; names it.
    """
    if fields["prediction_type"] != "epsilon":
        got = fields["prediction_type"]
        raise LoadError(path, f"prediction_type: expected epsilon for EDM, got {got!r:.80}")
    lowest = _number(fields, "sigma_min", (MIN_SIGMA, MAX_SIGMA), path)
    highest = _number(fields, "sigma_max", (MIN_SIGMA, MAX_SIGMA), path)
    if lowest >= highest:
        raise LoadError(path, f"sigma_max: expected more than sigma_min, got {highest!r:.80}")
    sigma_data = _number(fields, "sigma_data", (1e-3, 1e3), path)
    return EdmTime(lowest, highest, _number(fields, "rho", (1.0, 100.0), path)), sigma_data


def _number(fields: Mapping[str, Any], name: str, ends: tuple[float, float], path: Path) -> float:
    value = fields[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not ends[0] <= value <= ends[1]:
        raise LoadError(path, f"{name}: expected {ends[0]:g} to {ends[1]:g}, got {value!r:.80}")
    return float(value)
