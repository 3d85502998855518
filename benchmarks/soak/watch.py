"""Samples of a server process over time, and bounds on their growth.

Allocated memory (``malloc_mib``, Python's ``blocks``) grows without bound only if there is a leak:
its slope is per round of the callers. Resident memory includes free memory kept by malloc, which
settles over hours: its bound is looser.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """Resources of a process at one time."""

    seconds: float
    """Seconds since the start of the load."""
    rounds: int
    """Rounds of all callers until then."""
    rss_mib: float
    malloc_mib: float
    """Memory allocated by malloc, mostly by native code."""
    blocks: float
    """Memory blocks of Python, each of at most 512 bytes."""
    fds: int
    threads: int


@dataclass(frozen=True)
class Bounds:
    """Bounds on growth after the warm-up."""

    mib_per_hour: float
    """Slope of resident memory."""
    noise_mib: float
    """Growth allowed in a short run for any slope."""
    bytes_per_round: float
    """Slope of malloc's memory. Detects a leak of 96 bytes, the smallest allocation of a gRPC
    operation, in a kind of caller with two of a hundred rounds."""
    malloc_noise_mib: float
    """Twice the observed variation of free blocks kept by threads, which are counted."""
    blocks_per_round: float
    """Slope of blocks: detects one leaked object per round in one of a hundred rounds."""
    blocks_noise: float
    """Approximate blocks of one request of each caller."""
    fds: int
    """Growth of open files from the first to the last quarter."""
    threads: int


@dataclass(frozen=True)
class Verdict:
    """Measurements after the warm-up, and the bounds exceeded."""

    hours: float
    slope_mib_per_hour: float
    growth_mib: float
    """Slope times duration."""
    rss_mib: float
    """Resident memory at the end."""
    rounds_measured: int
    bytes_per_round: float
    blocks_per_round: float
    fds_growth: float
    threads_growth: float
    faults: tuple[str, ...]


def look(pid: int, page: str, seconds: float, rounds: int) -> Sample:
    """Return the current resources of a process; ``page`` has its metrics."""
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    return Sample(
        seconds=seconds,
        rounds=rounds,
        malloc_mib=_metric(page, "els_malloc_used_bytes") / MIB,
        blocks=_metric(page, "els_python_blocks"),
        rss_mib=int(status["VmRSS"].split()[0]) * 1024 / MIB,
        fds=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
    )


def judge(samples: Sequence[Sample], warm_up: float, bounds: Bounds) -> Verdict:
    """Return the verdict on samples in chronological order.

    Args:
        samples: at least eight.
        warm_up: fraction discarded from the start.
        bounds: allowed growth.
    """
    kept = samples[int(len(samples) * warm_up) :]
    hours = (kept[-1].seconds - kept[0].seconds) / 3600
    slope = theil_sen([s.seconds / 3600 for s in kept], [s.rss_mib for s in kept])
    growth = slope * hours
    rounds = kept[-1].rounds - kept[0].rounds
    malloc = _per_round(kept, lambda s: s.malloc_mib * MIB)
    blocks = _per_round(kept, lambda s: s.blocks)
    handed_out, most = malloc * rounds / MIB, bounds.bytes_per_round * rounds / MIB
    most += bounds.malloc_noise_mib
    objects, most_objects = blocks * rounds, bounds.blocks_per_round * rounds + bounds.blocks_noise
    fds, threads = _growth([s.fds for s in kept]), _growth([s.threads for s in kept])
    allowed = bounds.noise_mib + bounds.mib_per_hour * hours
    checks = {
        f"memory grew by {growth:.2f} MiB, {allowed:.2f} are allowed": growth > allowed,
        f"malloc's memory grew by {handed_out:.2f} MiB, {most:.2f} are allowed": handed_out > most,
        f"Python's blocks grew by {objects:.0f}, {most_objects:.0f} are allowed": objects
        > most_objects,
        f"open files grew by {fds:g}, {bounds.fds} are allowed": fds > bounds.fds,
        f"threads grew by {threads:g}, {bounds.threads} are allowed": threads > bounds.threads,
    }
    return Verdict(
        hours=hours,
        slope_mib_per_hour=slope,
        growth_mib=growth,
        rss_mib=kept[-1].rss_mib,
        rounds_measured=rounds,
        bytes_per_round=malloc,
        blocks_per_round=blocks,
        fds_growth=fds,
        threads_growth=threads,
        faults=tuple(text for text, wrong in checks.items() if wrong),
    )


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs (Theil 1950; Sen 1968).

    Robust against outliers in a quarter of the points, such as one large request.
    """
    points = list(zip(x, y, strict=True))
    # Every few points are enough for a long run.
    points = points[:: -(-len(points) // 600)]
    return statistics.median(
        (y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(points, 2) if x1 > x0
    )


def _per_round(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return theil_sen([s.rounds for s in samples], [of(s) for s in samples])


def _metric(page: str, name: str) -> float:
    """Return a metric without labels; raise ValueError if it is missing."""
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    if found is None:
        raise ValueError(f"metrics: expected {name}, which needs glibc; found none")
    return float(found[1])


def _growth(values: Sequence[int]) -> float:
    """Return the median of the last quarter less that of the first."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[:quarter])
