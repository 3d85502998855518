#!/usr/bin/env bash
# Guess: the elementwise product of two tensors is one operation an element, correctly rounded for real dtypes, so
# an element has the same bits wherever it stands, alone or in a batch, with one thread or two.
#
# Real behaviour: true of real dtypes, false of complex ones on a CPU. A run of elements is multiplied in vectors,
# each partial product rounded; what is left at the end of a run by scalar code, which the compiler contracts to
# fused multiply-adds. So the last bit depends on the length of the tensor and, as each thread has a run of its own,
# on the number of threads. An inverse real transform in two dimensions changes with the threads too (MKL).
# Version: torch 2.13.0 (also the wheel's CPU build), CPython 3.11, x86-64 with AVX2.
# Source: aten/src/ATen/native/cpu/Loops.h (vectorized_loop, and the scalar rest behind it); on the way to be changed,
# pytorch pull request 197018.
# Bitten: whoever promises the same bits in any batch or on any machine: filters by FFT, rotary embeddings that are
# complex products (view_as_complex), caches keyed by results. Real arithmetic on view_as_real has no such rest.
#
# Output seen:
#   real product:    elements that differ from the product alone: 0; between 1 and 2 threads: 0
#   complex product: elements that differ from the product alone: 430; between 1 and 2 threads: 18
#   irfft2:          elements that differ between 1 and 2 threads: 16,577 of 37,888
#
# Exits 1 if that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

generator = torch.Generator().manual_seed(0)


def numbers(*shape, dtype):
    return torch.randn(*shape, dtype=dtype, generator=generator)


def threads(count, work):
    torch.set_num_threads(count)
    return work()


found = {}
for name, dtype in (("real", torch.float64), ("complex", torch.complex128)):
    a, b = (numbers(1001, dtype=dtype) for _ in "ab")
    alone = torch.stack([x * y for x, y in zip(a, b)])
    moved = 0
    for length in range(100_001, 100_017):
        c, d = (numbers(length, dtype=dtype) for _ in "cd")
        one, two = (threads(count, lambda: c * d) for count in (1, 2))
        moved += int((one != two).sum())
    found[name] = int((threads(1, lambda: a * b) != alone).sum()), moved
    label = f"{name} product:".ljust(16)
    print(
        f"{label} elements that differ from the product alone: {found[name][0]}; "
        f"between 1 and 2 threads: {found[name][1]}"
    )

spectrum = numbers(37, 32, 17, dtype=torch.complex128)
one, two = (threads(count, lambda: torch.fft.irfft2(spectrum, s=(32, 32))) for count in (1, 2))
moved = int((one != two).sum())
print(f"irfft2:          elements that differ between 1 and 2 threads: {moved:,} of {one.numel():,}")
sys.exit(0 if found["real"] == (0, 0) and all(found["complex"]) and moved else 1)
PYTHON
