"""Peak memory of building a bank in parts from an archive larger than its parts.

    python -m benchmarks.bank_memory [--mib 400] [--shard-size 500] [--folder DIR]

Writes a tar archive of pictures, builds a bank of it and, for comparison, one of its first part by
``els-server bank build`` processes, and prints the peak memory (maximum resident set) and time of
both. Fails if the archive costs more than two parts and 16 MiB beyond the first part: memory would
grow with the source.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SERVER = Path(sys.executable).with_name("els-server")
SIDE = 128
PICTURE_BYTES = 3 * SIDE * SIDE
_SLACK_MIB = 16


def write_archive(path: Path, mib: int) -> int:
    """Write an archive of about so many MiB of pictures with labels 0 to 9; return their number."""
    header = f"P6 {SIDE} {SIDE} 255\n".encode()
    random = np.random.default_rng(0)
    count = (mib << 20) // PICTURE_BYTES
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            pixels = random.integers(0, 256, PICTURE_BYTES, np.uint8).tobytes()
            for name, data in (("ppm", header + pixels), ("cls", str(index % 10).encode())):
                (member := tarfile.TarInfo(f"{index:07}.{name}")).size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return count


def measured(*options: str | Path) -> dict[str, float]:
    """Return peak memory in MiB and seconds of a ``bank build`` with these arguments.

    Raises:
        SystemExit: The command failed.
    """
    began = time.monotonic()
    arguments = [str(SERVER), "bank", "build", *map(str, options)]
    with Path(os.devnull).open("wb") as nowhere:
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        child = os.posix_spawn(SERVER, arguments, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(arguments)}: exit code {code}")
    seconds = round(time.monotonic() - began, 1)
    return {"peak_rss_mib": round(usage.ru_maxrss / 1024, 1), "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if memory grows with the source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=400, help="size of the archive")
    parser.add_argument("--shard-size", type=int, default=500, help="images of a part")
    parser.add_argument("--folder", type=Path, help="where archive and banks are written")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        archive = folder / "pictures.tar"
        count = write_archive(archive, options.mib)
        size = ("--shard-size", str(options.shard_size))
        first = measured(archive, folder / "first", *size, "--limit", str(options.shard_size))
        whole = measured(archive, folder / "whole", *size)
        archive_mib = archive.stat().st_size >> 20
    part_mib = options.shard_size * PICTURE_BYTES / 2**20
    beyond = whole["peak_rss_mib"] - first["peak_rss_mib"]
    found = {
        "archive_mib": archive_mib,
        "images": count,
        "part_mib": round(part_mib, 1),
        "first_part": first,
        "whole": whole,
        "beyond_first_part_mib": round(beyond, 1),
    }
    print(json.dumps(found, indent=1))
    return int(beyond > 2 * part_mib + _SLACK_MIB)


if __name__ == "__main__":
    sys.exit(main())
