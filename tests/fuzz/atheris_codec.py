"""Fuzzes the decoders, guided by coverage: python -m tests.fuzz.atheris_codec [--seconds 60].

Needs ``pip install atheris``. What it finds it writes to the working folder, and exits 1; keep it
in ``FOUND`` of ``test_decoders``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

# Published for few platforms: no dependency of ours.
import atheris

with atheris.instrument_imports(include=["els_service", "yaml", "safetensors"]):
    from tests.fuzz import decoders


def main() -> None:
    """Fuzz all targets, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[[], *decoders.TARGETS])
    parser.add_argument("--seconds", type=int, default=60, help="how long")
    options = parser.parse_args()
    names = options.targets or list(decoders.TARGETS)
    warnings.simplefilter("error")

    def one(data: bytes) -> None:
        if data:
            decoders.TARGETS[names[data[0] % len(names)]](data[1:])

    with tempfile.TemporaryDirectory() as corpus:
        for i, name in enumerate(names):
            for j, data in enumerate(decoders.seeds()[name]):
                (Path(corpus) / f"{name}-{j}").write_bytes(bytes([i]) + data)
        limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=16384"]
        atheris.Setup([sys.argv[0], f"-max_total_time={options.seconds}", *limits, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
