"""Memory of a model that has answered: ``python -m benchmarks.shards.memory ROOT MODEL``."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.repository import ModelRepository


def main() -> None:
    """Print the PSS of this process and of its children, in MB."""
    root, name = sys.argv[1:]
    model = ModelRepository(Path(root)).load(name)
    x = np.zeros((1, *model.info.shape), np.float32)
    model.denoise(make_query(x, from_sigma([1.0])))
    own = os.getpid()
    parts = [pss_mb(own), *(pss_mb(child) for child in children_of(own))]
    print(json.dumps({"pss_mb": round(sum(parts), 1), "parts_mb": [round(mb, 1) for mb in parts]}))


def pss_mb(pid: int) -> float:
    """Return the proportional set size of a process in MB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def children_of(pid: int) -> list[int]:
    """Return the children of a process, whichever thread started them."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


if __name__ == "__main__":
    main()
