"""Patch attention on GPUs in Triton: direct, diagonal and same-place forms.

Importing this package needs neither triton nor a GPU; creating an implementation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import Tensor

from els_kernels.triton.chips import unsuited

if TYPE_CHECKING:
    from els_kernels.triton.attention import TritonAttention
    from els_kernels.triton.fold import TritonFold
    from els_kernels.triton.fold_moments import TritonFoldMoments
    from els_kernels.triton.moments import TritonMoments

__all__ = ["create", "create_fold", "create_fold_moments", "create_moments", "unavailable"]


def unavailable(bank: Tensor) -> str | None:
    """Return why Triton cannot run on this bank, or None if it can.

    Under ``TRITON_INTERPRET=1`` a bank on the CPU works too, slowly: for tests.
    """
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'els-denoise[gpu]')"
    return unsuited(bank.device)


def create(bank: Tensor) -> TritonAttention:
    """Return the implementation for a bank.

    Raises:
        RuntimeError: triton is not installed, or the bank is not on a GPU that the kernels suit;
            gives the reason.
    """
    reason = unavailable(bank)
    if reason is not None:
        raise RuntimeError(f"implementation triton: {reason}")
    from els_kernels.triton.attention import TritonAttention

    return TritonAttention(bank)


def create_fold(groups: Sequence[Tensor]) -> TritonFold:
    """Return the implementation of the fold for a bank, as groups of images of one size.

    Raises:
        RuntimeError: As ``create``.
    """
    reason = unavailable(groups[0])
    if reason is not None:
        raise RuntimeError(f"implementation triton: {reason}")
    from els_kernels.triton.fold import TritonFold

    return TritonFold(groups)


def create_moments(bank: Tensor) -> TritonMoments:
    """Return the implementation of posterior moments for a bank, float32 or uint8.

    Raises:
        RuntimeError: As ``create``.
    """
    reason = unavailable(bank)
    if reason is not None:
        raise RuntimeError(f"implementation triton: {reason}")
    from els_kernels.triton.moments import TritonMoments

    return TritonMoments(bank)


def create_fold_moments(groups: Sequence[Tensor]) -> TritonFoldMoments:
    """Return the implementation of the moments of a fold for a bank, as ``create_fold``.

    Raises:
        RuntimeError: As ``create``.
    """
    reason = unavailable(groups[0])
    if reason is not None:
        raise RuntimeError(f"implementation triton: {reason}")
    from els_kernels.triton.fold_moments import TritonFoldMoments

    return TritonFoldMoments(groups)
