"""Summary of a comparison: agreement of every machine with the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from els_service.experiments.comparison.agreement import (
    Agreement,
    agreement,
    mean_interval,
    median_interval,
)

_MEASURES = ("pearson_r", "r2", "explained", "mse")
_BASELINE = "ideal"


def summarise(network: Tensor, machines: Mapping[str, Tensor], seed: int = 0) -> dict[str, Any]:
    """Return the agreement of each machine with the network's images, as JSON.

    ``median_pearson_r``, its 95 % bootstrap interval ``pearson_r_interval``, ``mean_pearson_r``,
    its interval ``mean_pearson_r_interval``, the values of all images under ``pearson_r``; likewise
    ``r2``, ``explained`` and ``mse`` (see ``Agreement``). If there is an ideal machine,
    ``share_above_ideal`` is the share of images with a larger Pearson r.

    Args:
        network: [N, C, H, W].
        machines: name → images from the same noise, in the same order.
        seed: seed of the bootstrap.
    """
    found = {name: agreement(images, network) for name, images in machines.items()}
    ideal = found.get(_BASELINE)
    return {
        name: _summary(one, seed) | ({} if ideal is None or one is ideal else _above(one, ideal))
        for name, one in found.items()
    }


def _summary(one: Agreement, seed: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in _MEASURES:
        values = getattr(one, name)
        median, *interval = median_interval(values, seed)
        mean, *about_mean = mean_interval(values, seed)
        summary |= {
            f"median_{name}": median,
            f"{name}_interval": interval,
            f"mean_{name}": mean,
            f"mean_{name}_interval": about_mean,
            name: values.tolist(),
        }
    return summary


def _above(one: Agreement, ideal: Agreement) -> dict[str, float]:
    return {"share_above_ideal": float(np.mean(one.pearson_r > ideal.pearson_r))}
