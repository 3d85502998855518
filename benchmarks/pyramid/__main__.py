"""Measures the sampler of pictures and writes a record.

    python -m benchmarks.pyramid [--only speed-9 small memory …] [--seeds 10] [--out FILE.json]

``speed-P`` draws a colour picture of 192x128 pixels by patches of side P, 10 steps a scale, and
``small`` one of 96x64: seconds of the whole sample, the best of several, and, along one more
trajectory, of every denoise call by the native fold and by the exact float32 matmul form from the
same state, one after the other, in one process with the same threads. The matmul form has the
chunk that is fastest at the finest scale; denormal numbers are flushed to zero. ``steps`` compares
every call with the matmul form in float64, ``seeds`` whole pictures of the two forms, ``memory``
measures a server, ``table`` one call by size and patch, and ``sources`` the error of a part of the
patches of photographs above 256x256 (extra ``gallery``). Rows of parts that a run leaves out are
those of an earlier record of the same day and commit.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

PATCHES = (7, 9, 15)
LARGE, SMALL = (128, 192), (64, 96)
BUDGET = 1e-3
"""Largest difference of D from the matmul form, relative to its norm, of a call that is timed."""
ALIKE = 1e-2
"""The same of whole pictures that are alike."""
TABLE_SIDES, TABLE_PATCHES = (64, 128, 256), (5, 9, 15)
_LEVEL = 0.5
"""α and σ of the calls of ``table``."""

Row = dict[str, Any]
Size = tuple[int, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record."""
    # Before torch is imported, as in the server: spinning threads slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks import record

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts")
    parser.add_argument("--repeats", type=int, default=2, help="whole samples; the best counts")
    parser.add_argument("--seeds", type=int, default=10, help="pictures of the part seeds")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="other than 192x128")
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("pyramid", options)
    rows = [row for row in recorder.earlier() if row["part"] not in options.only]
    for part in options.only:
        for row in measured(part, options):
            rows.append({"part": part, **row})
            print(json.dumps(rows[-1]), flush=True)
    print(f"record: {recorder.write(rows)}")


def _speed(patch: int, size: Size, repeats: int) -> Iterator[Row]:
    """Yield the seconds of a whole sample, and those of its calls beside the matmul form."""
    import torch

    from benchmarks.pyramid import matmul

    torch.set_flush_denormal(True)
    case = matmul.case(size, patch)
    whole = min(matmul.timed(lambda: matmul.drawn(case, 1, case.model))[1] for _ in range(repeats))
    chunk = matmul.best_chunk(case)
    both = matmul.Comparison(case.model, matmul.MatmulDenoiser(case, chunk))
    list(matmul.trajectory(case, 1, both))
    worst = max(both.worst.values())
    row: Row = {
        "size": list(size),
        "patch": patch,
        "scales": [list(scale) for scale in case.model.info.scales],
        "threads": torch.get_num_threads(),
        "implementation": case.model.info.implementation,
        "difference": worst,
    }
    if worst > BUDGET:
        yield {**row, "refused": f"difference above {BUDGET}"}
        return
    yield {
        **row,
        "chunk": chunk,
        "whole_s": round(whole, 3),
        "calls_s": round(both.model_s, 3),
        "matmul_calls_s": round(both.other_s, 3),
        "times_faster": round(both.other_s / both.model_s, 2),
    }


def _steps(size: Size) -> Iterator[Row]:
    """Yield the largest difference of a call from the float64 form, by scale, for each patch."""
    import torch

    from benchmarks.pyramid import matmul

    for patch in PATCHES:
        case = matmul.case(size, patch)
        both = matmul.Comparison(case.model, matmul.MatmulDenoiser(case, 256, torch.float64))
        list(matmul.trajectory(case, 1, both))
        errors = [float(f"{both.worst[scale]:.2e}") for scale in sorted(both.worst)]
        yield {"size": list(size), "patch": patch, "errors": errors}


def _seeds(size: Size, count: int) -> Iterator[Row]:
    """Yield how many whole pictures are alike in both forms, and all differences."""
    import torch

    from benchmarks.pyramid import matmul

    torch.set_flush_denormal(True)
    case = matmul.case(size, 9)
    other = matmul.MatmulDenoiser(case, matmul.best_chunk(case))
    found = [
        matmul.difference(matmul.drawn(case, seed, case.model), matmul.drawn(case, seed, other))
        for seed in range(count)
    ]
    yield {
        "size": list(size),
        "patch": 9,
        "seeds": count,
        "alike": sum(one <= ALIKE for one in found),
        "differences": [float(f"{one:.2e}") for one in found],
    }


def _memory(size: Size) -> Iterator[Row]:
    from benchmarks.pyramid.served import memory_row

    yield memory_row(size, 9)


def _sources(side: int | None) -> Iterator[Row]:
    from benchmarks.pyramid import sources

    yield from sources.rows(side or sources.SIDE)


def _table(sides: Sequence[int]) -> Iterator[Row]:
    """Yield the seconds of one call for squares of each side and for each patch."""
    import torch

    from benchmarks.pyramid import matmul

    torch.set_flush_denormal(True)
    for side in sides:
        for patch in TABLE_PATCHES:
            case = matmul.case((side, side), patch)
            denoise = partial(case.answer, case.finest_query(_LEVEL))
            took = min(matmul.timed(denoise)[1] for _ in range(2))
            yield {
                "size": [side, side],
                "patch": patch,
                "call_s": round(took, 4),
                "ns_a_pair": round(took / (side - patch + 1) ** 4 * 1e9, 3),
            }


PARTS = (
    *(f"speed-{patch}" for patch in PATCHES),
    *("small", "steps", "seeds", "memory", "table", "sources"),
)


def measured(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a part."""
    size = tuple(options.size) if options.size else None
    match part:
        case "small":
            return _speed(9, size or SMALL, options.repeats)
        case "steps":
            return _steps(size or (32, 48))
        case "seeds":
            return _seeds(size or SMALL, options.seeds)
        case "memory":
            return _memory(size or LARGE)
        case "table":
            return _table(size[:1] if size else TABLE_SIDES)
        case "sources":
            return _sources(max(size) if size else None)
        case _:
            return _speed(int(part.removeprefix("speed-")), size or LARGE, options.repeats)


if __name__ == "__main__":
    main()
