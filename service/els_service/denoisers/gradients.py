"""Products with the Jacobian J = ∂D/∂x of a denoiser: protocol, result, and automatic ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from els_service.denoisers.base import DenoiserInfo, Query

Direction = Literal["vjp", "jvp"]
"""``vjp``: Jᵀg of a cotangent g; ``jvp``: J u of a tangent u."""


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """D(x) and a Jacobian product at x."""

    mean: npt.NDArray[np.float32]
    """[B, C, H, W]: D(x)."""
    product: npt.NDArray[np.float32]
    """[B, C, H, W]: Jᵀg or J u."""


@runtime_checkable
class Differentiable(Protocol):
    """A denoiser with Jacobian products; its info has ``has_gradients``.

    Compute one call at a time, as ``Denoiser``.
    """

    @property
    def info(self) -> DenoiserInfo:
        """Description of the denoiser."""
        ...

    def check(self, query: Query) -> None:
        """Raise InvalidArgumentError if the query is rejected; cheap."""
        ...

    def vjp(self, query: Query, cotangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and Jᵀg of a cotangent g, [B, C, H, W]."""
        ...

    def jvp(self, query: Query, tangent: npt.NDArray[np.float32]) -> Product:
        """Return D(x) and J u of a tangent u, [B, C, H, W]."""
        ...

    def predict_product_seconds(self, query: Query, direction: Direction) -> float:
        """Return the predicted duration of ``vjp`` or ``jvp``."""
        ...


@runtime_checkable
class ReusesEvidence(Differentiable, Protocol):
    """A denoiser of a bank whose products take two passes, the first of which is reusable."""

    def evidence(self, query: Query) -> npt.NDArray[np.float64]:
        """Return the result of the first pass: [B, K, H, W], with a K of the denoiser's own."""
        ...

    def product_from(
        self,
        query: Query,
        along: npt.NDArray[np.float32],
        evidence: npt.NDArray[np.float64],
        direction: Direction,
    ) -> Product:
        """Return a product without the first pass, with the bits of ``vjp`` or ``jvp``."""
        ...

    def predict_evidence_seconds(self, query: Query) -> float:
        """Return the predicted duration of ``evidence``, and of ``product_from``."""
        ...


def automatic_product(
    function: Callable[[Tensor], Tensor],
    x: npt.NDArray[np.float32],
    direction: npt.NDArray[np.float32],
    kind: Direction,
) -> Product:
    """Return a product with the Jacobian of a function by automatic differentiation.

    J u is the derivative of g ↦ Jᵀg in the direction u, which needs no forward-mode formulas.

    Args:
        function: D, [B, C, H, W] → [B, C, H, W] float32 on the CPU, image by image.
        x: [B, C, H, W].
        direction: cotangent or tangent, [B, C, H, W].
        kind: which product.
    """
    # Devices compute in inference mode, whose tensors take no part in differentiation. Fused
    # attention has no second derivative.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        point = torch.tensor(x, requires_grad=True)
        along = torch.tensor(direction)
        mean = function(point)
        if kind == "vjp":
            (product,) = torch.autograd.grad(mean, point, along)
        else:
            dual = torch.zeros_like(mean, requires_grad=True)
            (pulled,) = torch.autograd.grad(mean, point, dual, create_graph=True)
            (product,) = torch.autograd.grad(pulled, dual, along)
    return Product(mean.detach().numpy(), product.contiguous().numpy())


def joined(parts: list[Product]) -> Product:
    """Return the products of several slices of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    return Product(
        np.concatenate([part.mean for part in parts]),
        np.concatenate([part.product for part in parts]),
    )
