"""Memory of a model that has answered: ``python -m benchmarks.shards.memory ROOT MODEL``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.repository import ModelRepository

_SHARDS = (b"els_service.shards.process", b"ray::ShardActor")
"""In the command of a process of a shard."""


def main() -> None:
    """Print the PSS of this process, of its shards, and of Ray's own processes, in MB."""
    root, name = sys.argv[1:]
    model = ModelRepository(Path(root)).load(name)
    x = np.zeros((1, *model.info.shape), np.float32)
    model.denoise(make_query(x, from_sigma([1.0])))
    shards: list[float] = []
    others: list[float] = []
    for pid in descendants_of(os.getpid()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        (shards if any(each in command for each in _SHARDS) else others).append(pss_mb(pid))
    own = pss_mb(os.getpid())
    found = {
        "pss_mb": own + sum(shards),
        "server_mb": own,
        "shards_mb": sum(shards),
        "ray_mb": sum(others),
    }
    print(json.dumps({name: round(mb, 1) for name, mb in found.items()}), flush=True)


def pss_mb(pid: int) -> float:
    """Return the proportional set size of a process in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def children_of(pid: int) -> list[int]:
    """Return the children of a process, whichever thread started them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile; its children are then those of another.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, (task / "children").read_text().split())
    return found


def descendants_of(pid: int) -> Iterator[int]:
    """Yield the children of a process, and theirs."""
    for child in children_of(pid):
        yield child
        yield from descendants_of(child)


if __name__ == "__main__":
    main()
