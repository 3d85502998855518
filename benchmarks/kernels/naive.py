"""One step of the circular ELS machine against the naive unfold-and-softmax form: time and memory.

Every form runs in a separate process, to measure its peak memory; results are compared before any
time is reported.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from els_kernels import GEOMETRIES, PatchAttention

Row = dict[str, Any]

IMAGES = 100
SHAPES = ((1, 28, 28), (3, 32, 32))
WINDOWS = (3, 5, 11, 17)
A, S = 0.8, 0.6
BUDGET = 1e-4
"""Maximum ‖difference‖/‖naive‖ of a result whose time is reported."""


def naive(bank: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return the textbook form: all patches of the bank at once, one softmax."""

    def step(x: Tensor, k: int) -> Tensor:
        queries = _patches(x, k)[0]
        keys = _patches(bank, k).flatten(0, 1)
        values = bank.flatten(2).transpose(1, 2).flatten(0, 1)
        logits = torch.addmm(keys.square().sum(1) * (-A * A / 2), queries, keys.T, alpha=A)
        return (logits.div_(S * S).softmax(1) @ values).T.view_as(x[0])

    return step


def ours(implementation: str, bank: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Return patch attention."""
    attention = PatchAttention(bank, implementation=implementation)
    geometry = GEOMETRIES["els", "circular"]

    def step(x: Tensor, k: int) -> Tensor:
        level = {"a": torch.tensor([A]), "s": torch.tensor([S])}
        return attention(x, **level, window=torch.tensor([k]), geometry=geometry).mean[0]

    return step


FORMS: dict[str, Callable[[Tensor], Callable[[Tensor, int], Tensor]]] = {
    "naive": naive,
    "torch": partial(ours, "torch"),
    "native": partial(ours, "native"),
}


def _patches(images: Tensor, k: int) -> Tensor:
    r = k // 2
    return unfold(pad(images, (r, r, r, r), mode="circular"), k).transpose(1, 2)


def measure(form: str, shape: tuple[int, int, int], k: int, repeats: int) -> Any:
    """Return the result, the best time in seconds and the peak memory above the bank in bytes."""
    generator = torch.Generator().manual_seed(0)
    bank = torch.rand(IMAGES, *shape, generator=generator) * 2 - 1
    x = torch.randn(1, *shape, generator=generator)
    step = FORMS[form](bank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = step(x, k)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(x, k)
        times.append(time.perf_counter() - start)
    return result.numpy(), min(times), peak


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``work`` in a new process and return its result."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_child, args=(there, work, arguments))
    child.start()
    there.close()
    answer = here.recv()
    child.join()
    return answer


def _child(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(work(*arguments))


def rows(repeats: int) -> Iterator[Row]:
    """Yield time and peak memory of every form for every shape and window.

    Raises:
        RuntimeError: A form disagrees with the naive one; nothing is timed.
    """
    for shape in SHAPES:
        for k in WINDOWS:
            runs = {form: in_process(measure, form, shape, k, repeats) for form in FORMS}
            expected, naive_s, naive_bytes = runs["naive"]
            row: Row = {"shape": shape, "k": k, "images": IMAGES, "naive_s": naive_s}
            row["naive_mib"] = naive_bytes / 2**20
            for form in ("torch", "native"):
                got, seconds, peak = runs[form]
                error = float(((got - expected) ** 2).sum() ** 0.5 / (expected**2).sum() ** 0.5)
                if not error <= BUDGET:
                    raise RuntimeError(f"{form} {shape} k={k}: error {error:.1e}, not timed")
                row[f"{form}_s"] = seconds
                row[f"{form}_mib"] = peak / 2**20
                row[f"{form}_speedup"] = naive_s / seconds
                row[f"{form}_memory_share"] = peak / naive_bytes
            yield row
