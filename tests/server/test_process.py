"""Memory freed after a burst is returned to the system."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from els_service.server.telemetry import process

MIB = 1 << 20
_BLOCK = 100 << 10
"""Below malloc's threshold for a mapping of its own."""


def resident_mib() -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


async def test_freed_blocks_between_used_ones_are_returned_to_the_system() -> None:
    blocks = [bytearray(_BLOCK) for _ in range(300 * MIB // _BLOCK)]
    large = resident_mib()
    del blocks[1:-1]  # the last stays at the top of the heap
    trimming = asyncio.create_task(process.trim_heap(0.01))
    try:
        async with asyncio.timeout(20):
            while resident_mib() > large - 200:
                await asyncio.sleep(0.01)
    finally:
        trimming.cancel()
    assert len(blocks) == 2
