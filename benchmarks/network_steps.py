"""Measures how far the images of networks at few DDIM steps are from those at many.

    python -m benchmarks.network_steps mnist-resnet-64 fashion-unet [FOLDER ...]

The machines have as many steps whatever the network has, so that a lower r of theirs at 20 network
steps is the network's own. From the same noise, Pearson's r of each image with that at 150 steps,
median and least over images: at 20 steps; with the first of them cut into four (*cut*), or, to
compare, the tenth (*elsewhere*); and with the answer of the first step, at the highest level,
replaced by the mean of the images at 150 steps (*replaced*). Beside them the largest |D| of the
first step: pixels of images lie in [-1, 1].
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import record
from els_service.denoisers.base import Denoiser, make_query
from els_service.denoisers.levels import NoiseLevel, cosine
from els_service.denoisers.noise import seeded_noise
from els_service.experiments.comparison.agreement import agreement
from els_service.experiments.comparison.sampling import SampleSpec
from els_service.experiments.comparison.subjects import open_network

MANY, FEW, PARTS = 150, 20, 4
Images = npt.NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every row, then write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help="bundled name or folder")
    parser.add_argument("--count", type=int, default=20, help="images")
    parser.add_argument(
        "--many", type=int, default=MANY, help="steps of the images to compare with"
    )
    record.add_arguments(parser)
    options = parser.parse_args(arguments)
    recorder = record.start("network-steps", options)
    rows = []
    for name in options.networks:
        rows.append(measured(name, options.count, options.many))
        print(json.dumps(rows[-1]), flush=True)
    print(f"record: {recorder.write(rows)}")


def measured(name: str, count: int, many: int) -> dict[str, Any]:
    """Return the row of a network: a bundled model, or a folder."""
    network = open_network(name)
    trajectory = _Trajectory(network.denoiser, count)
    few = times(FEW)
    want, _ = trajectory.drawn(times(many))
    plain, largest = trajectory.drawn(few)
    cut, elsewhere = (trajectory.drawn(cut_at(few, step))[0] for step in (0, FEW // 2 - 1))
    replaced, _ = trajectory.drawn(few, first=want.mean(0))
    row: dict[str, Any] = {"network": network.name, "images": count, "steps": FEW, "many": many}
    results = {"r": plain, "cut": cut, "elsewhere": elsewhere, "replaced": replaced}
    for key, images in results.items():
        found = agreement(torch.from_numpy(images), torch.from_numpy(want)).pearson_r
        row |= {key: round(float(np.median(found)), 4), f"{key}_least": round(found.min(), 4)}
    return row | {"largest_first": round(largest, 2)}


def times(steps: int) -> list[float]:
    """Return the times of the levels of a trajectory, from 1 down."""
    return [i / steps for i in range(steps, 0, -1)]


def cut_at(when: Sequence[float], step: int) -> list[float]:
    """Return the times of a trajectory with one step, from 0, cut into ``PARTS``."""
    parts = np.linspace(when[step], when[step + 1], PARTS + 1).tolist()
    return [*when[:step], *parts, *when[step + 2 :]]


class _Trajectory:
    """Trajectories of the images that ``els-server compare`` draws by a network.

    Args:
        denoiser: of the network.
        count: number of images.
    """

    def __init__(self, denoiser: Denoiser, count: int) -> None:
        self._denoiser = denoiser
        self._labels = SampleSpec(label_count=denoiser.info.label_count).labels(0, count)
        self._noise: Images = seeded_noise(0, count, denoiser.info.shape)(0).numpy()

    def drawn(self, when: Sequence[float], first: Images | None = None) -> tuple[Images, float]:
        """Return images [N, C, H, W] by DDIM (Song et al. 2021), and the largest |D| of step one.

        Args:
            when: times of the levels, falling; the last step ends at a = 1, s = 0.
            first: D of the first step, [C, H, W], in the place of the network's.
        """
        x, largest = self._noise, 0.0
        levels = [*cosine(np.array(when)).pairs, (1.0, 0.0)]
        for i, ((a, s), (next_a, next_s)) in enumerate(itertools.pairwise(levels)):
            query = make_query(x, NoiseLevel.of([(a, s)] * len(x)), self._labels)
            mean = self._denoiser.denoise(query).pixels
            if i == 0:
                largest = float(np.abs(mean).max())
                mean = mean if first is None else np.broadcast_to(first, mean.shape)
            x = (next_a * mean + next_s * (x - a * mean) / s).astype(np.float32)
        return x, largest


if __name__ == "__main__":
    main()
