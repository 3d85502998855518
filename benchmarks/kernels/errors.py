"""Errors of every implementation against float64 over noise levels, with their budgets.

Errors do not depend on the load of the machine. Without a GPU Triton is interpreted, if installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.kernels.cpu import Setting
from els_kernels import GEOMETRIES, Posterior
from els_kernels.attention import IMPLEMENTATIONS, Implementation
from els_kernels.native import Native, instruction_sets

Row = dict[str, Any]

TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98)
WINDOWS = (3, 9)
IMAGES, SIDE = 12, 12
MEAN_BUDGET = 1e-4
"""‖got - float64‖/‖float64‖, from t = .05 on."""


def rows() -> Iterator[Row]:
    """Yield the error of mean and log evidence of each implementation at each noise level."""
    torch.manual_seed(0)
    for channels in (1, 3):
        settings = [Setting(IMAGES, channels, SIDE, t) for t in TIMES]
        bank = settings[0].bank(IMAGES)
        x = torch.cat([setting.query(bank) for setting in settings])
        for k in WINDOWS:
            want = _answer(IMPLEMENTATIONS["reference"](bank), settings, x, k)
            for name, make in contenders().items():
                device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
                got = _answer(make(bank.to(device)), settings, x.to(device), k)
                for i, setting in enumerate(settings):
                    mean = want.mean[i]
                    off = (got.log_evidence[i].cpu().double() - want.log_evidence[i]).abs().max()
                    yield {
                        "part": "errors",
                        **asdict(setting),
                        "k": k,
                        "implementation": name,
                        "mean_error": float((got.mean[i].cpu() - mean).norm() / mean.norm()),
                        "mean_budget": MEAN_BUDGET,
                        "evidence_error": float(off),
                        "evidence_budget": evidence_budget(setting, x[i : i + 1], bank, k),
                    }


def _answer(attend: Implementation, settings: list[Setting], x: Tensor, k: int) -> Posterior:
    """Return the posterior of the boundary-broken machine for one query per setting."""
    a, s = (list(scales) for scales in zip(*(each.level() for each in settings), strict=True))
    size = len(x)
    return attend(x, a, s, [k] * size, [(0, IMAGES)] * size, GEOMETRIES["els", "zeros"])


def contenders() -> dict[str, Callable[[Tensor], Implementation]]:
    """Return all implementations available here, except the reference."""
    found: dict[str, Callable[[Tensor], Implementation]] = {"torch": IMPLEMENTATIONS["torch"]}
    try:
        sets = instruction_sets()
    except RuntimeError as error:
        print(error)
        sets = []
    found |= {f"native {name}": partial(Native, instruction_set=name) for name in sets}
    if find_spec("triton"):
        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
        found["triton"] = IMPLEMENTATIONS["triton"]
    return found


def evidence_budget(setting: Setting, x: Tensor, bank: Tensor, k: int) -> float:
    """Return 8·eps32·(largest logit before centring): (‖x[u+Ω]‖² + a²‖φ[y+Ω]‖²)/2s²."""
    a, s = setting.level()

    def largest(images: Tensor) -> float:
        squares = images.double().square().sum(1, keepdim=True)
        return float(avg_pool2d(squares, k, 1, k // 2, divisor_override=1).max())

    return 8 * torch.finfo(torch.float32).eps * (largest(x) + a * a * largest(bank)) / (2 * s * s)
