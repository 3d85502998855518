"""Checkpoints: the state of a training run in one safetensors file, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from els_service.denoisers.files import write_atomically
from els_service.errors import LoadError

CHECKPOINT_FILE = "checkpoint.safetensors"
_FORMAT = "els-training-1"


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Seconds spent in all calls."""
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last row of the log."""
    loss_steps: int = 0


@dataclass(frozen=True)
class State:
    """State that training changes."""

    network: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    progress: Progress


def save_checkpoint(folder: Path, state: State, settings: Mapping[str, Any]) -> None:
    """Write the state, with the settings that a resumed run must have."""
    tensors = {f"network/{name}": t for name, t in state.network.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average/{name}": t for name, t in state.average.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        moments = state.optimizer.state[parameter]
        tensors |= {f"optimizer/{name}/{key}": value for key, value in moments.items()}
    metadata = {
        "format": _FORMAT,
        "progress": json.dumps(vars(state.progress)),
        "settings": json.dumps(settings, sort_keys=True),
    }
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / CHECKPOINT_FILE, save(stored, metadata))


def restore_checkpoint(folder: Path, state: State, settings: Mapping[str, Any]) -> bool:
    """Restore the state from a folder's checkpoint; return whether there is one.

    Raises:
        LoadError: Not a checkpoint of this run; names the setting or tensor.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return False
    try:
        data = path.read_bytes()
        tensors = load(data)
        metadata = _metadata(data)
        progress = Progress(**json.loads(metadata["progress"]))
        _check_settings(path, json.loads(metadata["settings"]), settings)
    except LoadError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise LoadError(path, f"expected a checkpoint of a training run: {error}") from error
    try:
        state.network.load_state_dict(_part(tensors, "network/"))
        if state.average is not None:
            state.average.load_state_dict(_part(tensors, "average/"))
        _restore_moments(state, tensors)
    except (RuntimeError, KeyError) as error:
        raise LoadError(path, " ".join(str(error).split())) from error
    vars(state.progress).update(vars(progress))
    return True


def _restore_moments(state: State, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in state.network.named_parameters():
        moments = _part(tensors, f"optimizer/{name}/")
        state.optimizer.state[parameter] = {
            # In the layout of the weights, as the fused update requires.
            key: (torch.empty_like(parameter) if value.ndim else torch.empty_like(value)).copy_(
                value
            )
            for key, value in moments.items()
        }


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file whose header was validated."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    if metadata["format"] != _FORMAT:
        raise ValueError(f"expected format {_FORMAT}, got {metadata['format']}")
    return metadata


def _check_settings(path: Path, found: dict[str, Any], requested: Mapping[str, Any]) -> None:
    requested = json.loads(json.dumps(requested))
    for name in sorted(found.keys() | requested.keys()):
        if found.get(name) != requested.get(name):
            reason = f"{name}: expected {found.get(name)} as begun, got {requested.get(name)}"
            raise LoadError(path, f"{reason}; use another --out to start over")
