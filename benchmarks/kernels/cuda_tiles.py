"""Timing of tiles of the diagonal form on a GPU, for the tuning table.

    PYTHONPATH=kernels python -m benchmarks.kernels.cuda_tiles

times every candidate, after comparing its result with the tuned one's; prints the fastest first.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.kernels.cuda import Case, call, make_bank, make_query, seconds
from els_kernels import GEOMETRIES, count_pairs
from els_kernels.triton import tuning
from els_kernels.triton.attention import TritonAttention
from els_kernels.triton.chips import architecture
from els_kernels.triton.tuning import Config

CANDIDATES = [
    Config(block_m, block_n, block_k, warps, stages)
    for block_m, block_n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))
    for block_k in (16, 32, 64)
    for stages in (1, 2, 3)
]


def main() -> None:
    """Time the candidates for gray and coloured images at three windows."""
    device = torch.device("cuda")
    arch = architecture(device)
    for shape, images in (((1, 28, 28), 4000), ((3, 32, 32), 2000)):
        for window in (5, 9, 17):
            case = Case("tile", ("els", "circular"), shape, images, window, 4, "diagonal")
            bank = make_bank(case, device, 0)
            attention = TritonAttention(bank, form="diagonal")
            x = make_query(case, bank, 1)
            want = call(case, attention, x)
            pairs = case.batch * images * count_pairs(GEOMETRIES[case.machine], *shape[1:], window)
            tuned = tuning.DIAGONAL[arch]
            found: list[tuple[float, Config]] = []
            for config in CANDIDATES:
                tuning.DIAGONAL[arch] = dict.fromkeys(tuned, ((1 << 30, config),))
                try:
                    error = float((call(case, attention, x) - want).norm() / want.norm())
                    assert error < 1e-4, (config, error)
                    # mypy cannot infer a lambda whose defaults hold the loop variables.
                    times = seconds(lambda _, a=attention, q=x, c=case: call(c, a, q), device, 0.2)  # type: ignore[misc]
                except Exception as failure:
                    print(f"  {config}: {type(failure).__name__}")
                    continue
                finally:
                    tuning.DIAGONAL[arch] = tuned
                found.append((pairs / statistics.median(times), config))
            print(f"{shape} k={window}")
            for speed, config in sorted(found, key=lambda row: -row[0])[:5]:
                print(f"  {speed:.2e} pair/s {config}", flush=True)


if __name__ == "__main__":
    main()
