"""Writes noise.npz, the bits that seeded noise must always have: python tests/golden/make_noise.py

Made without numpy's generators or transcendentals: Philox 4x64-10 (Salmon et al., SC 2011) in
integers, Box-Muller with the math module, rounded once to float32.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

PATH = Path(__file__).parent / "noise.npz"

CASES = [
    (0, 0, 0, 12),
    (0, 1, 0, 7),
    (0, 0, 1, 7),
    (1, 0, 0, 7),
    (2**63, 255, 1000, 5),
    (2**64 - 1, 2**40, 3, 16),
]
"""(seed, image, draw, count)"""

_WORD = 2**64
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def philox(counter: list[int], key: list[int]) -> list[int]:
    """The four words of one counter: ten rounds, the key moved on between them."""
    c, k = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(_MULTIPLIERS[0] * c[0], _WORD)
        high_1, low_1 = divmod(_MULTIPLIERS[1] * c[2], _WORD)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + _WEYL[0]) % _WORD, (k[1] + _WEYL[1]) % _WORD]
    return c


def words(seed: int, image: int, draw: int) -> Iterator[int]:
    """The stream of a draw: numpy moves the counter on before it is used, so it begins at 1."""
    number = 0
    while True:
        number += 1
        yield from philox([number, 0, 0, draw], [seed, image])


def normal(seed: int, image: int, draw: int, count: int) -> npt.NDArray[np.float32]:
    """The noise, a pair of numbers from every two words of which the upper 53 bits count."""
    stream = words(seed, image, draw)
    numbers: list[float] = []
    while len(numbers) < count:
        radius = math.sqrt(-2 * math.log(((next(stream) >> 11) + 1) / 2**53))
        angle = 2 * math.pi * ((next(stream) >> 11) / 2**53)
        numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(numbers[:count], np.float64).astype(np.float32)


def main() -> int:
    """Write the file: what was asked, and what must come."""
    asked = np.array(CASES, np.uint64)
    answers = {f"noise_{i}": normal(*case) for i, case in enumerate(CASES)}
    # The stubs take **answers for the flag allow_pickle.
    np.savez(PATH, cases=asked, **answers)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
