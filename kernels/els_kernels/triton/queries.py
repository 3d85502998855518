"""Images of a batch prepared for the kernels, all at once and without waiting for the GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from els_kernels.geometry import Geometry
from els_kernels.triton import layout, precision
from els_kernels.triton.launch import Queries

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Batch:
    """Queries of a batch, and what is added to their logits at the end."""

    queries: Queries
    image: Tensor
    """[B, C, H, W] float64: centred images."""
    precision: Tensor
    """[B, 1, 1] float64: 1 / 2s²."""

    def energy(self, window: int, geometry: Geometry) -> Tensor:
        """Return ‖q[u+Ω]‖² / 2s² of every pixel, [B, H, W] float64."""
        # Sums of fixed order, so that they do not depend on the size of the batch: matmuls and
        # reductions of a GPU are split by it.
        squares = sum_in_order(self.image.square())
        if geometry.whole:
            # The last two axes of one image have the same shape alone and in a batch.
            sums = torch.stack([one.sum() for one in squares])
            return (sums[:, None, None] * self.precision).expand_as(squares)
        r = window // 2
        if geometry.padding == "zeros":
            sums = avg_pool2d(squares[:, None], window, 1, r, divisor_override=1)
        else:
            around = layout.wrap(squares[:, None], r, r)
            sums = avg_pool2d(around, window, 1, divisor_override=1)
        return sums[:, 0] * self.precision


def prepare(
    x: Tensor, levels: list[tuple[float, float]], keys: precision.Keys, terms: int
) -> Batch:
    """Return images centred in units of the keys and scaled by their noise levels.

    Args:
        x: [B, C, H, W] float32.
        levels: a and s of each.
        keys: the bank.
        terms: of half precision of a query.
    """
    factors = [
        (
            a,
            # A query's product with a key in these units is the first term of a logit in base 2 …
            a / s / s * LOG2E * keys.unit,
            # … and the second term is half the key's squared norm times this, never 0: a key beyond
            # the end of its tile has an infinite norm and must get the weight 0.
            -max((a / s) * (a / s) * LOG2E * keys.unit**2, 1e-30),
            1 / (2 * s * s),
        )
        for a, s in levels
    ]
    table = torch.tensor(factors, dtype=torch.float64, device=x.device)
    signal, factor, bias, noise = table.T.contiguous()
    # Kernels address contiguous memory.
    image = x.contiguous() - signal[:, None, None, None] * keys.centre
    scaled = image * factor[:, None, None, None]
    larger, power = precision.scale_queries(scaled)
    queries = Queries(
        precision.split(larger, terms), (1 / power).float(), bias.float(), scaled.float()
    )
    return Batch(queries, image, noise[:, None, None])


def sum_in_order(values: Tensor) -> Tensor:
    """Return the sum over the second axis, which has few entries, one after the other."""
    total = values[:, 0]
    for i in range(1, values.shape[1]):
        total = total + values[:, i]
    return total
