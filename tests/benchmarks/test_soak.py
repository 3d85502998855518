"""The soak tells a leak from noise, and a short one of the real server is flat."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.soak.watch import MIB, Bounds, Sample, judge, look, theil_sen

BOUNDS = Bounds(
    mib_per_hour=8,
    noise_mib=2,
    bytes_per_round=2,
    malloc_noise_mib=0.3,
    blocks_per_round=0.01,
    blocks_noise=2000,
    fds=4,
    threads=2,
)
ROUNDS_PER_HOUR = 720_000


def samples(
    mib_per_hour: float = 0.0,
    fds_per_hour: float = 0.0,
    threads_per_hour: float = 0.0,
    bytes_per_round: float = 0.0,
    blocks_per_round: float = 0.0,
) -> list[Sample]:
    """Return an hour of samples: a steep warm-up, then noise, a few spikes, and a slope."""
    rng = random.Random(0)
    rows = []
    for i in range(720):
        hours = i / 720
        rss = 200 + 100 * (1 - 0.98**i) + mib_per_hour * hours + rng.gauss(0, 1)
        rss += 80 * (rng.random() < 0.1)
        rounds = round(ROUNDS_PER_HOUR * hours)
        rows.append(
            Sample(
                seconds=hours * 3600,
                rounds=rounds,
                rss_mib=rss,
                malloc_mib=90 + rng.gauss(0, 0.2) + bytes_per_round * rounds / MIB,
                blocks=700_000 + rng.gauss(0, 3000) + blocks_per_round * rounds,
                fds=round(30 + rng.randint(0, 3) + fds_per_hour * hours),
                threads=round(20 + threads_per_hour * hours),
            )
        )
    return rows


def test_noise_and_spikes_are_flat() -> None:
    assert judge(samples(), 0.4, BOUNDS).faults == ()


@pytest.mark.parametrize(
    ("grows", "by", "told"),
    [
        ("mib_per_hour", 20, "memory grew"),
        ("bytes_per_round", 4, "malloc's memory"),
        ("blocks_per_round", 0.03, "Python's blocks"),
        ("fds_per_hour", 20, "open files"),
        ("threads_per_hour", 20, "threads"),
    ],
)
def test_a_leak_is_told_by_its_name(grows: str, by: float, told: str) -> None:
    (fault,) = judge(samples(**{grows: by}), 0.4, BOUNDS).faults
    assert fault.startswith(told)


def test_a_server_that_does_not_tell_its_memory_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="els_malloc_used_bytes"):
        look(os.getpid(), "els_python_blocks 1.0\n", 0.0, 0)


def test_the_slope_is_that_of_the_line_however_a_quarter_of_the_points_lies() -> None:
    x = [float(i) for i in range(40)]
    y = [3 * value + (1000 if i % 5 == 0 else 0) for i, value in enumerate(x)]
    assert theil_sen(x, y) == pytest.approx(3, abs=0.5)


@pytest.mark.e2e
def test_a_short_soak_of_the_real_server_finds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    loose = (
        *("--noise-mib=40", "--mib-per-hour=0", "--fds=20", "--threads=8"),
        *("--malloc-noise-mib=20", "--blocks-noise=50000"),
    )
    # Pauses four times as long as a soak's: a quarter of the load.
    short = "--dirty", "--minutes=0.1", "--every=0.2", "--pause-ms=200"
    command = sys.executable, "-m", "benchmarks.soak", *short
    done = subprocess.run(
        [*command, *loose, f"--out={out}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["faults"] == []
    assert len(row["rounds"]) == 15
    assert all(row["rounds"].values())
