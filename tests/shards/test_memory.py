"""Memory of a bank in shards: the server holds none of it, and the shards together one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.preloaded import forked_shards
from tests.support.sharded_models import add_model

from els_service.denoisers.banks import make_bank, save_bank
from els_service.denoisers.base import make_query
from els_service.denoisers.levels import from_sigma
from els_service.repository import ModelRepository
from els_service.shards.shard import ShardOptions

IMAGES, SHAPE = 2048, (1, 32, 32)
"""Four blocks of half a megabyte: two for each of two shards."""
BYTES = IMAGES * SHAPE[1] * SHAPE[2]
PAGE = os.sysconf("SC_PAGE_SIZE")


def mapped_bytes(pid: int, name: str) -> int:
    """Return the bytes of a file in the memory of a process, in parts where others share them."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    entries = re.findall(rf"/{name}\n(?:.*\n)*?Pss: +(\d+) kB", text)
    return sum(1024 * int(size) for size in entries)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRepository]:
    root = tmp_path_factory.mktemp("memory")
    (root / "_banks").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *SHAPE)).astype(np.uint8)
    save_bank(make_bank(pixels), root / "_banks" / "held.safetensors")
    bank = "bank: ../_banks/held.safetensors\nshards: 2\n"
    add_model(root, "fold", f"machine: local\nwindow: 3\nfold: 0.2\n{bank}")
    add_model(root, "plain", f"machine: ideal\n{bank}")
    with forked_shards():
        yield ModelRepository(root, shards=ShardOptions(stall_s=3.0))


def answer(model: Any) -> None:
    model.denoise(make_query(np.zeros((1, *SHAPE), np.float32), from_sigma([1.0])))


def test_a_fold_maps_the_bank_once_in_all_shards_and_not_in_the_server(
    models: ModelRepository,
) -> None:
    model: Any = models.load("fold")
    answer(model)
    shards = model._attention.prepared.images._parts.shards
    held = [mapped_bytes(shard.pid, "held.safetensors") for shard in shards.shards]
    # The file has labels of eight bytes too, and a header.
    assert BYTES - PAGE < sum(held) <= BYTES + 8 * IMAGES + 2 * PAGE, held
    # Verified, and unmapped.
    assert mapped_bytes(os.getpid(), "held.safetensors") == 0


def test_a_packed_slice_is_no_longer_mapped(models: ModelRepository) -> None:
    model: Any = models.load("plain")
    answer(model)
    shards = model.attention.prepared.parts
    held = [mapped_bytes(shard.pid, "held.safetensors") for shard in shards.shards]
    assert max(held) == 0, held
    assert mapped_bytes(os.getpid(), "held.safetensors") == 0
    # An image of the bank is mapped where it is asked for.
    assert model.bank.image(IMAGES - 1).shape == SHAPE
