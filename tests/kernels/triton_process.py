"""A process of its own for Triton: its interpreter has to be chosen before triton is imported.

Without a GPU the kernels run under ``TRITON_INTERPRET=1`` on CPU tensors; with one, for real.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Query(NamedTuple):
    """The arguments of one call, as a process can be sent them."""

    bank: Floats
    x: Floats
    a: list[float]
    s: list[float]
    window: list[int]
    ranges: list[tuple[int, int]]
    geometry: Any
    form: Literal["direct", "diagonal"] | None = None


def start() -> ProcessPoolExecutor:
    """Return one worker that answers queries with ``attend``."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def attend(query: Query) -> tuple[Floats, Floats]:
    """Return mean and log evidence from the kernels."""
    from els_kernels.triton.machine import TritonAttention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bank, x = (torch.from_numpy(array).to(device) for array in (query.bank, query.x))
    attention = TritonAttention(bank, form=query.form)
    answer = attention(x, query.a, query.s, query.window, query.ranges, query.geometry)
    return answer.mean.cpu().numpy(), answer.log_evidence.cpu().numpy()
