"""Reader of diffusers folders: modules with their weights, and the noise schedule.

    PART/config.json  PART/diffusion_pytorch_model.safetensors  scheduler/scheduler_config.json

Configurations select among the classes listed here: no class is imported by a name from a file,
``model_index.json`` is not read, pickles are rejected and nothing is downloaded. A setting that is
not implemented as in diffusers is rejected by the name of its field.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from els_service.denoisers.folder_scheduler import FolderScheduler, scheduler_of
from els_service.denoisers.networks.folder import read_weights
from els_service.denoisers.pretrained.timesteps import Timesteps
from els_service.errors import LoadError

Only = Mapping[str, tuple[object, ...]]
"""Field → supported values; others are rejected."""
Inside = Callable[[str], Path]
"""Name in the model folder → path; raises LoadError if outside the root or not a file."""

SCHEDULER_FILE = "scheduler/scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
_LEVEL_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_MOST_TIMESTEPS = 100_000
_IMPORTS = threading.Lock()
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_ONLY: Only = {
    "prediction_type": tuple(_PREDICTIONS),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False, None),
    "use_flow_sigmas": (False, None),
    "timestep_type": ("discrete",),
    "variance_type": (
        *("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        None,
    ),
}
"""Scheduler fields that change the meaning of the network's output → supported values."""
_RENAMED = (
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out.0"),
)
"""Names of attention tensors before diffusers 0.15 → current names."""


@dataclass(frozen=True)
class Trained:
    """Training parameters of the network, from the scheduler's configuration."""

    prediction: str
    """One of ``PREDICTIONS``."""
    timesteps: Timesteps
    clip: float | None
    """D is clipped to ±clip, as in diffusers' schedulers with ``clip_sample``."""
    scheduler: FolderScheduler
    """Steps of the scheduler, for requests that ask for them."""


def read_trained(inside: Inside, *, whole: bool) -> Trained:
    """Return the training parameters of the scheduler's configuration, and its steps.

    Args:
        inside: resolver of names in the diffusers folder.
        whole: whether the network takes integer timesteps only.

    Raises:
        LoadError: A field is unknown, invalid or not supported; names it.
    """
    path = inside(SCHEDULER_FILE)
    config = _read_config(path)
    kind = _class_of(config, _SCHEDULERS, path)
    own = _fields(kind)
    known = set().union(*(_fields(_diffusers(name)) for name in _SCHEDULERS))
    for name, value in config.items():
        if name not in known:
            raise LoadError(path, f"{name}: expected no such field")
        _check_value(name, value, _ONLY, path)
    # diffusers ignores the fields of other schedulers, too.
    said = {name: config.get(name, default) for name, default in own.items()}
    clip = said.get("clip_sample_range", 1.0) if said.get("clip_sample") else None
    if not (clip is None or (isinstance(clip, int | float) and clip > 0)):
        raise LoadError(path, f"clip_sample_range: expected a positive number, got {clip!r:.80}")
    timesteps = _timesteps(said, whole, path)
    scheduler = scheduler_of(kind.__name__, {**own, **config}, timesteps.sigma, clip)
    return Trained(_PREDICTIONS[said["prediction_type"]], timesteps, clip, scheduler)


def _timesteps(said: Mapping[str, Any], whole: bool, path: Path) -> Timesteps:
    count = said["num_train_timesteps"]
    if not isinstance(count, int) or not 2 <= count <= _MOST_TIMESTEPS:
        expected = f"2 to {_MOST_TIMESTEPS}"
        raise LoadError(path, f"num_train_timesteps: expected {expected}, got {count!r:.80}")
    levels = {name: said[name] for name in _LEVEL_FIELDS}
    try:
        # Every scheduler of diffusers computes the same levels from these fields.
        schedule: Any = _diffusers("DDPMScheduler")(**levels)
        alpha_bar = schedule.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            return Timesteps(np.sqrt((1 - alpha_bar) / alpha_bar), whole)
    # Exceptions of diffusers' schedulers for an invalid field; the last but one for an unknown
    # schedule.
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise LoadError(path, f"{', '.join(_LEVEL_FIELDS)}: {text}") from error


@dataclass(frozen=True)
class Part:
    """A module of a diffusers folder, without weights until loaded: on torch's ``meta`` device."""

    module: nn.Module
    config: Mapping[str, Any]
    """All fields, defaults included."""
    path: Path
    """Path of the configuration, for errors."""

    def refuse(self, field: str, expected: str) -> LoadError:
        """Return the error for an invalid field."""
        return LoadError(self.path, f"{field}: expected {expected}, got {self.config[field]!r:.80}")


def build_part(inside: Inside, part: str, classes: tuple[str, ...], only: Only) -> Part:
    """Return a part of the folder without reading its weights.

    Args:
        inside: resolver of names in the diffusers folder.
        part: ``unet`` or ``vae``.
        classes: names of the allowed classes of diffusers.
        only: supported values of restricted fields.

    Raises:
        LoadError: The configuration is unreadable or invalid; names the field.
    """
    path = inside(f"{part}/config.json")
    config = _read_config(path)
    kind = _class_of(config, classes, path)
    defaults = _fields(kind)
    for name, value in config.items():
        if name not in defaults:
            raise LoadError(path, f"{name}: expected no such field of {kind.__name__}")
        _check_value(name, value, only, path)
    try:
        with torch.device("meta"):
            module = kind(**config)
    except Exception as error:
        # Validated by diffusers, with a different exception for each field.
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise LoadError(path, f"expected a configuration of {kind.__name__}, got {text}") from error
    return Part(module, {**defaults, **config}, path)


def load_part(inside: Inside, name: str, part: Part, *, variant: str, device: str) -> None:
    """Read the weights of a part into its module, in float32.

    Args:
        inside: resolver of names in the diffusers folder.
        name: ``unet`` or ``vae``.
        part: result of ``build_part``.
        variant: as in ``diffusion_pytorch_model.VARIANT.safetensors``; empty for none.
        device: device of the weights.

    Raises:
        LoadError: The file is missing, a pickle, or of another module; names the tensor.
    """
    path = _weights_path(inside, name, variant)
    expected = part.module.state_dict()
    tensors = read_weights(path, expected, lambda stored: _current_name(stored, expected))
    part.module.load_state_dict(tensors, assign=True)
    unset = [key for key, buffer in part.module.named_buffers() if buffer.is_meta]
    if unset:
        raise LoadError(part.path, f"expected a module whose state is all stored, got {unset[0]}")
    part.module.to(device).eval().requires_grad_(False)


def _weights_path(inside: Inside, part: str, variant: str) -> Path:
    stem = f"{part}/{_WEIGHTS}" + (f".{variant}" if variant else "")
    try:
        return inside(f"{stem}.safetensors")
    except LoadError:
        pickle = f"{part}/{_WEIGHTS}.bin"
        try:
            path = inside(pickle)
        except LoadError:
            path = None
        if path is None:
            raise
        reason = "expected safetensors: a pickle can execute code when it is read"
        raise LoadError(path, reason) from None


def _current_name(stored: str, expected: Mapping[str, object]) -> str:
    if stored in expected:
        return stored
    owner, _, tensor = stored.rpartition(".")
    layer, _, last = owner.rpartition(".")
    for old, new in _RENAMED:
        if last == old and f"{layer}.{new}.{tensor}" in expected:
            return f"{layer}.{new}.{tensor}"
    return stored


def _check_value(name: str, value: object, only: Only, path: Path) -> None:
    if name in only and value not in only[name]:
        allowed = ", ".join(map(str, only[name]))
        raise LoadError(path, f"{name}: expected one of {allowed}, got {value!r:.80}")


def _read_config(path: Path) -> dict[str, Any]:
    """Return the fields of a configuration, without private ones other than the class."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise LoadError(path, f"expected a readable JSON file, got {text}") from error
    if not isinstance(content, dict):
        raise LoadError(path, f"expected a JSON object, got {type(content).__name__}")
    return {
        name: value
        for name, value in content.items()
        if name == "_class_name" or not name.startswith("_")
    }


def _class_of(config: dict[str, Any], classes: tuple[str, ...], path: Path) -> Any:
    name = config.pop("_class_name", None)
    if name not in classes:
        expected = ", ".join(classes)
        raise LoadError(path, f"_class_name: expected one of {expected}, got {name!r:.80}")
    return _diffusers(name)


def _diffusers(name: str) -> Any:
    """Return a class of diffusers, which imports the module of each at its first use."""
    # Models are loaded side by side: two such imports at once wait for each other's modules, and
    # Python ends one of them with "deadlock detected".
    with _IMPORTS:
        import diffusers

        return getattr(diffusers, name)


def _fields(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters
    return {name: field.default for name, field in parameters.items() if name != "self"}
