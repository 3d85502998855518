"""What a process holds, sampled over time, and whether that is flat."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """What a process held at one time."""

    seconds: float
    """Since the load began."""
    rss_mib: float
    fds: int
    threads: int


@dataclass(frozen=True)
class Bounds:
    """What counts as flat after the warm-up."""

    mib_per_hour: float
    """Slope of the resident memory."""
    noise_mib: float
    """Growth that a short run may show whatever its slope."""
    fds: int
    """Growth in open files, first against last quarter."""
    threads: int


@dataclass(frozen=True)
class Verdict:
    """What was measured after the warm-up, and what of it is out of bounds."""

    hours: float
    slope_mib_per_hour: float
    growth_mib: float
    """Slope times length."""
    rss_mib: float
    """At the end."""
    fds_growth: float
    threads_growth: float
    faults: tuple[str, ...]


def look(pid: int, seconds: float) -> Sample:
    """Return what a process holds now."""
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    return Sample(
        seconds=seconds,
        rss_mib=int(status["VmRSS"].split()[0]) * 1024 / MIB,
        fds=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
    )


def judge(samples: Sequence[Sample], warm_up: float, bounds: Bounds) -> Verdict:
    """Return the verdict on samples in order of time.

    Args:
        samples: at least eight.
        warm_up: fraction of them, from the first, that is discarded.
        bounds: what is allowed.
    """
    kept = samples[int(len(samples) * warm_up) :]
    hours = (kept[-1].seconds - kept[0].seconds) / 3600
    slope = theil_sen([s.seconds / 3600 for s in kept], [s.rss_mib for s in kept])
    growth = slope * hours
    fds, threads = _growth([s.fds for s in kept]), _growth([s.threads for s in kept])
    allowed = bounds.noise_mib + bounds.mib_per_hour * hours
    checks = {
        f"memory grew by {growth:.2f} MiB, {allowed:.2f} are allowed": growth > allowed,
        f"open files grew by {fds:g}, {bounds.fds} are allowed": fds > bounds.fds,
        f"threads grew by {threads:g}, {bounds.threads} are allowed": threads > bounds.threads,
    }
    return Verdict(
        hours=hours,
        slope_mib_per_hour=slope,
        growth_mib=growth,
        rss_mib=kept[-1].rss_mib,
        fds_growth=fds,
        threads_growth=threads,
        faults=tuple(text for text, wrong in checks.items() if wrong),
    )


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs (Theil 1950; Sen 1968).

    A quarter of the points may be anything: one large request does not make a leak.
    """
    points = list(zip(x, y, strict=True))
    # Of a long run every few points are enough.
    points = points[:: -(-len(points) // 600)]
    return statistics.median(
        (y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(points, 2)
    )


def _growth(values: Sequence[int]) -> float:
    """Return the median of the last quarter less that of the first."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[:quarter])
