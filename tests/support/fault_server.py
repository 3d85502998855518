"""``els-server`` with models that are slow, fail, hang or break their device when they are told to.

usage: fault_server.py run [options of els-server run]
"""

from __future__ import annotations

import threading
import time
from unittest.mock import patch

import numpy as np
import torch

from els_service.cli import main
from els_service.denoisers.base import Denoised, Denoiser, DenoiserInfo, Query
from els_service.denoisers.query_checks import check_query
from els_service.engine.registry import ModelRegistry
from els_service.repository import ModelRepository

SHAPE = (1, 6, 5)
FAULT, HANG, BREAK = 1e6, 2e6, 3e6
"""What an image is filled with that makes the computation fail, hang, or break the device."""
IMAGE_S = 0.02
BROKEN = "broken"
"""A model of this name breaks its device when it is warmed."""


class FaultyDenoiser:
    """Answers 2x and, as evidence, the sum over C.

    Args:
        image_s: how long it sleeps for each image.
        memory: images that fit the memory.
    """

    def __init__(self, image_s: float = IMAGE_S, memory: int = 1 << 30) -> None:
        self._image_s, self._memory = image_s, memory

    @property
    def info(self) -> DenoiserInfo:
        return DenoiserInfo(kind="faulty", shape=SHAPE, has_log_evidence=True)

    def check(self, query: Query) -> None:
        check_query(self.info, query)

    def predict_seconds(self, query: Query) -> float:
        return self._image_s * len(query)

    def denoise(self, query: Query) -> Denoised:
        if len(query) > self._memory:
            raise torch.OutOfMemoryError("as told")
        time.sleep(self._image_s * len(query))
        first = set(query.pixels[:, 0, 0, 0].tolist())
        if FAULT in first:
            raise ZeroDivisionError("as told")
        if BREAK in first:
            raise RuntimeError("CUDA error: as told")
        if HANG in first:
            threading.Event().wait()
        return Denoised(2 * query.pixels, np.sum(query.pixels, 1))


class Broken(FaultyDenoiser):
    """Breaks its device at the first question."""

    def denoise(self, query: Query) -> Denoised:
        raise RuntimeError("CUDA error: as told")


def _load_one(self: ModelRepository, name: str, version: int, device: str) -> Denoiser:
    return Broken() if name == BROKEN else _read(self, name, version, device)


async def _load_all(self: ModelRegistry, repository: ModelRepository) -> None:
    self.add("slow", FaultyDenoiser())
    await _load(self, repository)


_load, _read = ModelRegistry.load_all, ModelRepository.load

if __name__ == "__main__":
    loaders = patch.object(ModelRepository, "load", _load_one)
    with patch.object(ModelRegistry, "load_all", _load_all), loaders:
        main()
