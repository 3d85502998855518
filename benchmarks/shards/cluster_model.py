"""Model of a bank of 1.28 million 64×64 images on 8, 64 and 512 devices.

A step takes the pairs of one device at its speed, and then what grows with the number of rows:
they come in over the link of the server, and are merged there.
The measured costs are arguments; what is assumed stands below.
"""

from __future__ import annotations

import math
from typing import Any

from els_kernels import GEOMETRIES, count_pairs

IMAGES, CHANNELS, SIDE, WINDOW = 1_280_000, 3, 64, 11
PAIRS_PER_S = 2e11
"""Assumed of one device: the speed of the records of an H200 for windows of this size, halved."""
LINK_BYTES_PER_S = 12.5e9
"""Assumed of the server's network: 100 Gbit/s."""
DOLLARS_PER_HOUR = 3.0
"""Assumed of one device."""
_ROW_BYTES = (4 + 8 + 8 * CHANNELS) * SIDE * SIDE
_MERGE_THREADS = 16
"""Assumed of the server."""


def cluster_rows(coordination_s: float, merge_s: float) -> list[dict[str, Any]]:
    """Return a row for each number of devices.

    Args:
        coordination_s: measured, of a call of few shards on one machine.
        merge_s: measured, of one number of one row, in one thread.
    """
    pairs = IMAGES * count_pairs(GEOMETRIES["els", "zeros"], SIDE, SIDE, WINDOW)
    rows = []
    for devices in (8, 64, 512):
        # At most 8,192 images, and a block for each device.
        blocks = max(devices, math.ceil(IMAGES / 8192))
        # See els_kernels.blocks: eight processes merge a group each.
        sent = 8 if 8 % devices == 0 else blocks
        compute_s = math.ceil(blocks / devices) / blocks * pairs / PAIRS_PER_S
        receive_s = sent * _ROW_BYTES / LINK_BYTES_PER_S
        merging_s = sent * (1 + CHANNELS) * SIDE * SIDE * merge_s / _MERGE_THREADS
        step_s = compute_s + coordination_s + receive_s + merging_s
        rows.append(
            {
                "model": "64×64 ELS, window 11",
                "images": IMAGES,
                "devices": devices,
                "blocks": blocks,
                "compute_s": round(compute_s, 4),
                "receive_s": round(receive_s, 4),
                "merge_s": round(merging_s, 4),
                "step_s": round(step_s, 4),
                "dollars_per_1000_steps": round(step_s * devices * DOLLARS_PER_HOUR / 3.6, 2),
            }
        )
    return rows
