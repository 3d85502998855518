"""Reader of diffusers folders: modules with their weights, and the noise schedule.

    PART/config.json  PART/diffusion_pytorch_model….safetensors  scheduler/scheduler_config.json

A folder of one module may have all files itself: PART is ``.``, and there is no ``scheduler/``.

Configurations select among the classes listed here: no class is imported by a name from a file,
``model_index.json`` is not read, pickles are rejected and nothing is downloaded. A setting that is
not implemented as in diffusers is rejected by the name of its field.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from els_service.denoisers.folder_scheduler import FolderScheduler, scheduler_of
from els_service.denoisers.levels import MAX_SIGMA
from els_service.denoisers.networks.folder import read_weights
from els_service.denoisers.pretrained.flows import EDMS, FLOWS, edm_time, flow_time
from els_service.denoisers.pretrained.time_inputs import TimeInput
from els_service.denoisers.pretrained.timesteps import Timesteps
from els_service.denoisers.pretrained.weights import Inside, find_weights
from els_service.errors import LoadError

Only = Mapping[str, tuple[object, ...]]
"""Field → supported values; others are rejected."""
_SCHEDULER_FILE = "scheduler_config.json"
_SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of betas; the levels of each are those of DDPMScheduler."""
_LEVEL_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_MOST_TIMESTEPS = 100_000
_IMPORTS = threading.Lock()
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_ONLY: Only = {
    "prediction_type": tuple(_PREDICTIONS),
    "thresholding": (False,),
    "use_flow_sigmas": (False, None),
    "timestep_type": ("discrete",),
    "predict_epsilon": (True, None),
    "tensor_format": ("np", "pt", None),
}
"""Scheduler fields that change the meaning of the network's output → supported values. The last two
are of old versions, and have no meaning any more."""
_FIXED = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None)
_LEARNED = ("learned", "learned_range")
_EMA_FIELDS = (
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step"),
    "use_ema_warmup",
)
"""Fields that diffusers' ``EMAModel`` adds to the configuration of the network it averages."""
_DIT_NORM = "ada_norm_zero"
"""Norm of what is a DiT, also under the name of its class before diffusers 0.29."""
_COMPUTED_FIELDS = {"AutoencoderTiny": ("block_out_channels",)}
"""Class → fields that it stores without taking them."""
_HINTS = {"UNet2DConditionModel": "; kind latent takes it"}
"""Class that another kind of model takes → which."""
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
    timesteps: TimeInput
    clip: float | None
    """D is clipped to ±clip, as in diffusers' schedulers with ``clip_sample``."""
    sigma_data: float = 0.5
    """Standard deviation of the data, for the prediction ``edm``."""
    learned_variance: bool = False
    """Whether the second half of the network's output is the variance of a step."""
    scheduler: FolderScheduler | None = None
    """Steps of the scheduler, for requests that ask for them; None if it has no betas."""


def read_trained(inside: Inside, *, whole: bool, has_variance: bool = False) -> Trained:
    """Return the training parameters of the scheduler's configuration, and its steps.

    Args:
        inside: resolver of names in the diffusers folder.
        whole: whether the network takes integer timesteps only.
        has_variance: whether the network's output has twice the channels of its input.

    Raises:
        LoadError: A field is unknown, invalid or not supported; names it.
    """
    beside = not inside.names("scheduler") and _SCHEDULER_FILE in inside.names(".")
    path = inside(_SCHEDULER_FILE if beside else f"scheduler/{_SCHEDULER_FILE}")
    config = _read_config(path)
    kind = _class_of(config, (*_SCHEDULERS, *FLOWS, *EDMS), path)
    own = _fields(kind)
    known = set().union(_ONLY, *(_fields(_diffusers(name)) for name in _SCHEDULERS), own)
    is_flow = kind.__name__ in FLOWS or (config.get("use_flow_sigmas") and "flow_shift" in own)
    for name, value in config.items():
        if name not in known and not _is_off(value):
            raise LoadError(path, f"{name}: expected no such field")
        if not (is_flow and name in ("prediction_type", "use_flow_sigmas")):
            _check_value(name, value, _ONLY, path)
    if is_flow or kind.__name__ in EDMS:
        return _trained_without_betas(kind, {**own, **config}, whole, path)
    # diffusers ignores the fields of other schedulers, too.
    said = {name: config.get(name, default) for name, default in own.items()}
    clip = said.get("clip_sample_range", 1.0) if said.get("clip_sample") else None
    if not (clip is None or (isinstance(clip, int | float) and clip > 0)):
        raise LoadError(path, f"clip_sample_range: expected a positive number, got {clip!r:.80}")
    if "variance_type" in said or "variance_type" in config:
        allowed = (*_FIXED, *_LEARNED) if has_variance else _FIXED
        variance = {**said, **config}["variance_type"]
        _check_value("variance_type", variance, {"variance_type": allowed}, path)
    timesteps = _timesteps(kind, said, whole, path)
    return Trained(
        _PREDICTIONS[said["prediction_type"]],
        timesteps,
        clip,
        learned_variance=said.get("variance_type") in _LEARNED,
        scheduler=scheduler_of(kind.__name__, {**own, **config}, timesteps.sigma, clip),
    )


def _trained_without_betas(
    kind: Any, fields: Mapping[str, Any], whole: bool, path: Path
) -> Trained:
    """Return the training parameters of flow matching or EDM."""
    if whole:
        got = kind.__name__
        raise LoadError(path, f"_class_name: expected one for learned timesteps, got {got}")
    if kind.__name__ in EDMS:
        time_input, sigma_data = edm_time(fields, path)
        return Trained("edm", time_input, None, sigma_data)
    prediction = fields.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        expected = "prediction_type: expected flow_prediction beside use_flow_sigmas"
        raise LoadError(path, f"{expected}, got {prediction!r:.80}")
    shift = "shift" if kind.__name__ in FLOWS else "flow_shift"
    return Trained("flow", flow_time(fields, shift, path), None)


def _timesteps(kind: Any, said: Mapping[str, Any], whole: bool, path: Path) -> Timesteps:
    count = said["num_train_timesteps"]
    if not isinstance(count, int) or not 2 <= count <= _MOST_TIMESTEPS:
        expected = f"2 to {_MOST_TIMESTEPS}"
        raise LoadError(path, f"num_train_timesteps: expected {expected}, got {count!r:.80}")
    levels = {name: said[name] for name in _LEVEL_FIELDS}
    if is_rescaled := bool(said.get("rescale_betas_zero_snr")):
        if said["prediction_type"] == "epsilon":
            expected = (
                "rescale_betas_zero_snr: expected one of False beside prediction_type epsilon"
            )
            raise LoadError(path, f"{expected} (v_prediction would do), got True")
        levels["rescale_betas_zero_snr"] = True
    try:
        # Of the class itself: the last level, without a signal, is infinite or very high.
        schedule: Any = (kind if is_rescaled else _diffusers("DDPMScheduler"))(**levels)
        alpha_bar = schedule.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        if is_rescaled:
            sigma[-1] = min(sigma[-1], MAX_SIGMA)
        return Timesteps(sigma, whole)
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
        part: folder of the module, such as ``unet`` or ``vae``.
        classes: names of the allowed classes of diffusers.
        only: supported values of restricted fields.

    Raises:
        LoadError: The configuration is unreadable or invalid; names the field.
    """
    path = inside(f"{part}/config.json")
    config = _read_config(path)
    if config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == _DIT_NORM:
        config["_class_name"] = "DiTTransformer2DModel"
    kind = _class_of(config, classes, path)
    defaults = _fields(kind)
    for name, value in config.items():
        neutral = (*_EMA_FIELDS, *_COMPUTED_FIELDS.get(kind.__name__, ()))
        if name not in (*defaults, *neutral) and not _is_off(value):
            raise LoadError(path, f"{name}: expected no such field of {kind.__name__}")
        _check_value(name, value, only, path)
    try:
        with torch.device("meta"):
            module = kind(**{name: config[name] for name in config if name in defaults}).eval()
    except Exception as error:
        # Validated by diffusers, with a different exception for each field.
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise LoadError(path, f"expected a configuration of {kind.__name__}, got {text}") from error
    return Part(module, {**defaults, **config}, path)


def load_part(inside: Inside, name: str, part: Part, *, variant: str, device: str) -> None:
    """Read the weights of a part into its module, in float32.

    Args:
        inside: resolver of names in the diffusers folder.
        name: folder of the module, such as ``unet`` or ``vae``.
        part: result of ``build_part``.
        variant: as in ``diffusion_pytorch_model.VARIANT.safetensors``; empty for none, or the only
            one that there is.
        device: device of the weights.

    Raises:
        LoadError: A file is missing, a pickle, or of another module; names the tensor.
    """
    files = find_weights(inside, name, variant)
    expected = part.module.state_dict()
    tensors = read_weights(
        files.path, expected, lambda stored: _current_name(stored, expected), files.shards
    )
    part.module.load_state_dict(tensors, assign=True)
    _compute_positions(part)
    unset = [key for key, buffer in part.module.named_buffers() if buffer.is_meta]
    if unset:
        raise LoadError(part.path, f"expected a module whose state is all stored, got {unset[0]}")
    part.module.to(device).eval().requires_grad_(False)


def _current_name(stored: str, expected: Mapping[str, object]) -> str:
    if stored in expected:
        return stored
    owner, _, tensor = stored.rpartition(".")
    layer, _, last = owner.rpartition(".")
    for old, new in _RENAMED:
        if last == old and f"{layer}.{new}.{tensor}" in expected:
            return f"{layer}.{new}.{tensor}"
    return stored


def _compute_positions(part: Part) -> None:
    """Compute the embedding of a transformer's places, which is not stored."""
    patches: Any = getattr(part.module, "pos_embed", None)
    if patches is not None:
        config = part.config
        patches.pos_embed = type(patches)(
            height=config["sample_size"],
            width=config["sample_size"],
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            embed_dim=config["num_attention_heads"] * config["attention_head_dim"],
        ).pos_embed


def _is_off(value: object) -> bool:
    """Return whether an unknown field is one of a later version that is not used."""
    return value is None or value is False or value in ("", [], {})


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
        hint = _HINTS.get(str(name), "")
        raise LoadError(path, f"_class_name: expected one of {expected}, got {name!r:.80}{hint}")
    kind = _diffusers(name)
    # Without scipy, which only its steps need, a class without fields takes its place.
    return _diffusers("EulerDiscreteScheduler") if hasattr(kind, "_backends") else kind


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
