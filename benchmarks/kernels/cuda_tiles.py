"""Timing of tiles of the diagonal form on a GPU, for the tuning table.

    python -m benchmarks.kernels.cuda_tiles

times every candidate, after comparing its result with the tuned one's; prints the fastest first.
A run of ``python -m benchmarks.kernels --device cuda`` does the same in the time that it has left.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cuda_cases import Case, call, full, make_bank, make_query
from benchmarks.kernels.cuda_timing import seconds
from els_kernels import count_pairs
from els_kernels.triton import tuning
from els_kernels.triton.attention import TritonAttention
from els_kernels.triton.chips import architecture
from els_kernels.triton.tuning import Arch, Config

Row = dict[str, Any]


def search(
    case: Case, configs: list[Config], device: torch.device, arch: Arch, deadline: float
) -> Iterator[Row]:
    """Yield the speed of each tile, or why it has none, until a time of the monotonic clock."""
    bank = make_bank(case, device, 0)
    attention = TritonAttention(bank, form="diagonal")
    x = make_query(case, bank, 1)
    want = call(case, attention, x)
    pairs = case.batch * case.images * count_pairs(case.geometry, *case.shape[1:], case.window)
    tuned = tuning.DIAGONAL[arch]
    for config in configs:
        if time.monotonic() > deadline:
            return
        row: Row = {"shape": case.shape, "window": case.window, **asdict(config)}
        tuning.DIAGONAL[arch] = dict.fromkeys(tuned, ((1 << 30, config),))
        try:
            yield row | {"pairs_per_s": pairs / _time(case, attention, x, want, device)}
        except Exception as failure:
            yield row | {"failed": f"{type(failure).__name__}: {str(failure)[:200]}"}
        finally:
            tuning.DIAGONAL[arch] = tuned


def _time(
    case: Case, attention: TritonAttention, x: Tensor, want: Tensor, device: torch.device
) -> float:
    """Return the median seconds of a call, after comparing its result."""
    error = float((call(case, attention, x) - want).norm() / want.norm())
    if not error < 1e-4:
        raise ValueError(f"error {error:.1e} against the tuned tile")
    return statistics.median(seconds(lambda _: call(case, attention, x), device, 0.2))


def main() -> None:
    """Time the candidates for gray and coloured images at three windows."""
    device = torch.device("cuda")
    for case, configs in full().tiles:
        rows = list(search(case, configs, device, architecture(device), math.inf))
        print(f"{case.shape} k={case.window}")
        for row in sorted(rows, key=lambda row: -row.get("pairs_per_s", 0))[:5]:
            print(f"  {row}", flush=True)


if __name__ == "__main__":
    main()
