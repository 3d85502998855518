"""Patch attention on a GPU: correctness, then speed against peers and the exp2 bound, then tiles.

    PYTHONPATH=kernels python -m benchmarks.kernels --device cuda --out FILE.json

requires torch, triton and numpy, and takes at most 8 minutes: a wrong answer of any kernel ends it,
timings run in order of interest, and those left at the end are listed. ``--rehearse`` runs all of
it on tiny images without a GPU: the compiled kernels interpreted, as the tests do it.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.kernels import cuda_cases, cuda_tiles
from benchmarks.kernels.cuda_cases import Plan
from benchmarks.kernels.cuda_timing import Row, compare, measure
from els_kernels.triton.chips import architecture
from els_kernels.triton.tuning import Arch

_LIMIT_S = 450.0
_TILES_S = 100.0
"""Seconds of the limit that are kept for tiles."""
_REHEARSED: Arch = "sm90"
"""Chip whose kernels a rehearsal interprets."""


def run(out: Path, *, commit: str, rehearse: bool = False) -> None:
    """Check, measure, and rewrite the JSON file ``out`` after every case.

    Args:
        out: the record.
        commit: that is measured, for the record.
        rehearse: tiny cases on a CPU, interpreted.

    Raises:
        RuntimeError: There is no GPU, or a result is wrong; nothing is timed.
    """
    if rehearse:
        with _interpreted():
            _run(out, cuda_cases.tiny(), torch.device("cpu"), _REHEARSED, commit)
        return
    if not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU that torch {torch.__version__} can use, found none")
    device = torch.device("cuda")
    _run(out, cuda_cases.full(), device, architecture(device), commit)


def _run(out: Path, plan: Plan, device: torch.device, arch: Arch, commit: str) -> None:
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    about, bound = about_run(device, commit)
    errors = [row for case, forms in plan.checks for row in compare(case, forms, device)]
    print(f"correct: {len(errors)} cases, worst error {max(row['error'] for row in errors):.1e}, "
          f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    result: dict[str, Any] = {"about": about, "exp2_bound": bound, "errors": errors}
    todo, rows, tiles = list(plan.timings), list[Row](), list[Row]()
    while todo and time.monotonic() - began < _LIMIT_S - _TILES_S:
        rows.append(measure(todo.pop(0), device, bound))
        print(_line(rows[-1]), flush=True)
        _write(out, result, rows, todo, tiles)
    for case, configs in plan.tiles:
        for row in cuda_tiles.search(case, configs, device, arch, began + _LIMIT_S):
            tiles.append(row)
            print(f"tile            {row}", flush=True)
        _write(out, result, rows, todo, tiles)
    print(f"{len(todo)} timings left out, {time.monotonic() - began:.0f} s")


@contextmanager
def _interpreted() -> Iterator[None]:
    """Let the compiled kernels be interpreted; raise RuntimeError if that finds a fault."""
    # Local import: a GPU needs no tests.
    from tests.kernels.ptx.driver import InterpretingDriver, interpreting

    driver = InterpretingDriver(_REHEARSED)
    with interpreting(driver, _REHEARSED):
        yield
    if str(driver.faults):
        raise RuntimeError(str(driver.faults))


def about_run(device: torch.device, commit: str) -> tuple[dict[str, Any], float]:
    """Return date, commit and machine of this run, and the exp2 bound in pairs a second."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        **record.machine(),
        "chip": platform.machine(),
    }
    if device.type != "cuda":
        return about, 1e9
    properties = torch.cuda.get_device_properties(device)
    # 16 exp2 a clock and multiprocessor; the boost clock of an H200 if torch does not report it.
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    about |= {"chip": properties.name, "clock_hz": clock}
    return about, properties.multi_processor_count * clock * 16


def _write(
    out: Path,
    result: dict[str, Any],
    rows: list[Row],
    todo: list[cuda_cases.Case],
    tiles: list[Row],
) -> None:
    left_out = [asdict(case) for case in todo]
    content = {**result, "rows": rows, "tiles": tiles, "left_out": left_out}
    out.write_text(json.dumps(content, indent=1))


def _line(row: Row) -> str:
    peers_of = {
        name: f"{row['pairs_per_s'] / peer['pairs_per_s']:.0f}x" if "failed" not in peer else "-"
        for name, peer in row.get("peers", {}).items()
    }
    return (
        f"{row['name']:15} {'-'.join(row['machine']):18} {row['shape']!s:12} N={row['images']:<6} "
        f"k={row['window']:<3} B={row['batch']:<3} {row['form'] or '':9} "
        f"{row['pairs_per_s']:.2e} pair/s ({100 * row['of_exp2_bound']:.0f} % of exp2) "
        f"{row['ms_per_image']:.2f} ms/image {peers_of or ''}"
    )
