"""What a server process holds, sampled over time, and whether that is flat.

Two things are told apart. What its allocators have handed out (``malloc_mib``, Python's ``blocks``)
grows for ever only if something is never freed: it is held against the rounds that the callers had.
Resident memory also has what malloc keeps for later, which settles over hours: its bound is looser.
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
    """What a process held at one time."""

    seconds: float
    """Since the load began."""
    rounds: int
    """Of all callers, until then."""
    rss_mib: float
    malloc_mib: float
    """Handed out by malloc; mostly what native code holds."""
    blocks: float
    """Python's, each of 512 bytes or less."""
    fds: int
    threads: int


@dataclass(frozen=True)
class Bounds:
    """What counts as flat after the warm-up."""

    mib_per_hour: float
    """Slope of the resident memory."""
    noise_mib: float
    """Growth that a short run may show whatever its slope."""
    bytes_per_round: float
    """Slope of what malloc handed out. A leak of the least that malloc gives to one operation of
    gRPC's, 96 bytes, shows in each kind of caller that has two of a hundred rounds."""
    malloc_noise_mib: float
    """Twice what the blocks that threads keep for themselves, which count, were seen to vary."""
    blocks_per_round: float
    """A kind of caller that has one of a hundred rounds, and leaks one object in each."""
    blocks_noise: float
    """About what one request of each caller takes."""
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
    rounds_measured: int
    bytes_per_round: float
    blocks_per_round: float
    fds_growth: float
    threads_growth: float
    faults: tuple[str, ...]


def look(pid: int, page: str, seconds: float, rounds: int) -> Sample:
    """Return what a process holds now; ``page`` has its metrics."""
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

    A quarter of the points may be anything: one large request does not make a leak.
    """
    points = list(zip(x, y, strict=True))
    # Of a long run every few points are enough.
    points = points[:: -(-len(points) // 600)]
    return statistics.median(
        (y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(points, 2) if x1 > x0
    )


def _per_round(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    return theil_sen([s.rounds for s in samples], [of(s) for s in samples])


def _metric(page: str, name: str) -> float:
    """Return a metric without labels; ValueError where there is none."""
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    if found is None:
        raise ValueError(f"metrics: expected {name}, which needs glibc; found none")
    return float(found[1])


def _growth(values: Sequence[int]) -> float:
    """Return the median of the last quarter less that of the first."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[:quarter])
