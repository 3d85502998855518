"""The tiles that a GPU takes, and the GPUs that the kernels do not suit."""

from __future__ import annotations

import os

import torch

from els_kernels.triton.tuning import AMD_CHIPS, CAPABILITIES, Arch


def unsuited(device: torch.device) -> str | None:
    """Return why the kernels do not suit a device, or None if they do.

    Under ``TRITON_INTERPRET=1`` a CPU suits too, slowly: for tests.
    """
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"expected a bank on a GPU (device cuda), got one on {device}"
    if torch.version.hip is not None:
        name = _amd_name(device)
        if name in AMD_CHIPS:
            return None
        return f"expected a GPU with matrix units ({', '.join(AMD_CHIPS)}), got {name}"
    major, minor = torch.cuda.get_device_capability(device)
    oldest = min(CAPABILITIES)
    if major >= oldest:
        return None
    return f"expected a GPU of compute capability {oldest}.0 or newer, got {major}.{minor}"


def architecture(device: torch.device) -> Arch:
    """Return the architecture whose tuned tiles a device takes.

    Raises:
        ValueError: the kernels do not suit the device; gives the reason.
    """
    reason = unsuited(device)
    if reason is not None:
        raise ValueError(f"triton: {reason}")
    if device.type != "cuda":
        return "sm80"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return CAPABILITIES.get(major, CAPABILITIES[max(CAPABILITIES)])


def _amd_name(device: torch.device) -> str:
    """Return the name of an AMD chip without its features, such as ``gfx942``."""
    return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
