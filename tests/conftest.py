"""Settled before anything is imported."""

from __future__ import annotations

import os

import torch

# Without a GPU Triton's kernels are interpreted. Triton asks when it is imported, which may be by
# torch, long before the tests of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
