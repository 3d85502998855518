"""Device on which tensors are made that name none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def made_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which tensors are made on a device.

    torch's own costs microseconds in every operation, so there is none where tensors are made on
    that device already.
    """
    return nullcontext() if torch.get_default_device() == device else device
