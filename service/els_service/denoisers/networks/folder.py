"""Model folders of networks: ``model.yaml`` and ``weights.safetensors``, read and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from els_service.denoisers.files import write_atomically
from els_service.denoisers.networks.config import (
    NetworkDocument,
    describe_network,
)
from els_service.denoisers.networks.denoiser import NetworkDenoiser
from els_service.denoisers.networks.modules import build_network
from els_service.errors import LoadError

MODEL_FILE = "model.yaml"
WEIGHTS_FILE = "weights.safetensors"

_PICKLES = (b"PK\x03\x04", b"\x80")
"""Magic bytes of ``torch.save``, current and before torch 1.6."""
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_network(
    document: NetworkDocument, weights: Path, device: torch.device | str = "cpu"
) -> NetworkDenoiser:
    """Return the denoiser of a network.

    Args:
        document: its configuration and execution options.
        weights: a safetensors file; float16 and bfloat16 tensors are converted to float32.
        device: device to run on.

    Raises:
        LoadError: The weights are unreadable or of another network; names the tensor.
        ValueError: The device does not support the execution options.
    """
    network = build_network(document.config, "meta")
    tensors = read_weights(weights, network.state_dict())
    network.load_state_dict(tensors, assign=True)
    return NetworkDenoiser(network, document, device, weights.parent)


def save_network_folder(
    folder: Path,
    document: NetworkDocument,
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a servable model folder, each file atomically.

    Args:
        folder: created if missing.
        document: content of ``model.yaml``.
        tensors: the network's state.
        dtype: dtype of the stored weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS_FILE, save(stored))
    text = yaml.safe_dump(describe_network(document), sort_keys=False, allow_unicode=True)
    write_atomically(folder / MODEL_FILE, text.encode())


def read_weights(
    path: Path,
    expected: dict[str, Tensor],
    renamed: Callable[[str], str] = str,
    shards: Sequence[Path] = (),
) -> dict[str, Tensor]:
    """Return the tensors of safetensors files as float32, checked against a network's state.

    Args:
        path: the file, or the index of the shards.
        expected: the state, whose names and shapes are required.
        renamed: name in a file → name in the state.
        shards: the files, if there are several.

    Raises:
        LoadError: A file is unreadable, or a tensor is missing, unknown, stored twice, of another
            shape or type, or not finite in float32; names the tensor.
    """
    tensors: dict[str, Tensor] = {}
    sources: dict[str, Path] = {}
    for file in shards or (path,):
        for stored, tensor in _parse(_read(file), file).items():
            name = renamed(stored)
            if name in tensors:
                raise LoadError(file, f"{name}: expected once, but {sources[name].name} has it too")
            tensors[name], sources[name] = tensor, file
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise LoadError(path, f"{name}: expected a tensor, found none")
        if name not in expected:
            raise LoadError(sources[name], f"{name}: expected no such tensor in this architecture")
        tensors[name] = _checked(sources[name], name, tensors[name], expected[name])
    return tensors


def _read(path: Path) -> bytes:
    try:
        # Read, not memory-mapped: overwriting a mapped file would change the network.
        return path.read_bytes()
    except OSError as error:
        reason = f"expected a readable file, got {error.strerror}{pickle_hint(path)}"
        raise LoadError(path, reason) from error


def _parse(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        # Only now: the length of a valid header may begin with the same bytes as a pickle.
        if content.startswith(_PICKLES):
            reason = "expected safetensors: a pickle can execute code when it is read"
            raise LoadError(path, reason) from error
        raise LoadError(path, f"expected a safetensors file: {error}") from error


def pickle_hint(path: Path) -> str:
    """Return text for the error of a missing file: that a pickle in its folder is not read."""
    for other in sorted(path.parent.glob("*")):
        if other.suffix in _PICKLE_SUFFIXES:
            return f"; {other.name} is not read, as a pickle can execute code"
    return ""


def _checked(path: Path, name: str, tensor: Tensor, expected: Tensor) -> Tensor:
    """Return a tensor in float32."""
    if tensor.shape != expected.shape:
        got, wanted = list(tensor.shape), list(expected.shape)
        raise LoadError(path, f"{name}: expected shape {wanted}, got {got}")
    if tensor.dtype not in _FLOATS:
        allowed = "float64, float32, float16 or bfloat16"
        raise LoadError(path, f"{name}: expected {allowed}, got {tensor.dtype}")
    # In float32, where a float64 may be infinite.
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise LoadError(path, f"{name}: expected finite numbers, got NaN or infinity")
    return tensor
