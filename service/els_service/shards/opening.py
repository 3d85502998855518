"""Shards of a bank's file, started and loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, Protocol

import torch

from els_kernels import PatchAttention, PatchMoments
from els_kernels.blocks import Blocks
from els_kernels.native.block_sums import centre_of
from els_service.denoisers.mapped_banks import MappedBank
from els_service.errors import LoadError
from els_service.shards.local import LocalShard
from els_service.shards.messages import Array
from els_service.shards.part import PartSpec
from els_service.shards.shard import Shard, ShardLostError, ShardOptions
from els_service.shards.shard_set import ShardSet

_NODES = Path("/sys/devices/system/node")
Engine = Literal["local", "ray"]
SHARDED_CALL_S = 2e-3
"""Seconds of a call beside its pairs: messages, and merging (measured)."""


class Loading(Shard, Protocol):
    """A shard that is being loaded."""

    @property
    def sums(self) -> Future[Array]:
        """Sums of its blocks, [K, 1 + C]; fails with ShardLostError."""
        ...


Start = Callable[[list[PartSpec]], Sequence[Loading]]


def open_shards(
    path: Path, shards: int | Literal["auto"], engine: Engine, options: ShardOptions
) -> ShardSet:
    """Return the shards of a bank, all of which are loaded.

    Args:
        path: of a bank of images of one size: a file, or the manifest of its parts.
        shards: number of shards; ``auto``: one for each memory node of the machine, or for each
            node of the cluster.
        engine: where they are.
        options: settings of the server.

    Raises:
        LoadError: The bank is damaged, there are more shards than blocks, a shard cannot be loaded,
            or Ray is not installed.
        OSError: The file cannot be read.
        RuntimeError: The native kernel is not available.
    """
    bank = MappedBank(path)
    whole = Blocks.whole(len(bank))
    start, most = _engine(engine, options)
    count = min(most, whole.count) if shards == "auto" else shards
    if count > whole.count:
        expected = f"expected at most {whole.count}, the number of blocks of this bank"
        raise LoadError(path, f"shards: {expected}, got {count}")
    threads = max(1, torch.get_num_threads() // count) if engine == "local" else 1
    blocks = [whole.shard(index, count) for index in range(count)]
    # Shards answer with the images that were verified here.
    digests = bank.digests(whole.limits)
    specs = [PartSpec(str(path), own, digests[own.first :: count], threads) for own in blocks]
    found = start(specs)
    try:
        return _loaded(path, bank, found, blocks, options)
    except BaseException:
        for shard in found:
            shard.close()
        raise


def memory_nodes() -> int:
    """Return the number of memory nodes of this machine, at least 1."""
    nodes = [each for each in _NODES.glob("node*") if each.name[4:].isdecimal()]
    return max(1, len(nodes))


def _engine(engine: Engine, options: ShardOptions) -> tuple[Start, int]:
    """Return the function that starts shards, and the number of them that ``auto`` means."""
    if engine == "local":
        return lambda specs: [
            LocalShard(str(i), spec, options.stall_s) for i, spec in enumerate(specs)
        ], memory_nodes()
    from els_service.shards.ray_engine import RayCluster

    cluster = RayCluster(options)
    return cluster.start, cluster.nodes


def _loaded(
    path: Path,
    bank: MappedBank,
    found: Sequence[Loading],
    blocks: list[Blocks],
    options: ShardOptions,
) -> ShardSet:
    try:
        sums = [torch.from_numpy(shard.sums.result(options.load_s)) for shard in found]
    except ShardLostError as error:
        raise LoadError(path, f"shards: {error}") from error
    except TimeoutError as error:
        raise LoadError(path, f"shards: not loaded within {options.load_s:g} s") from error
    centre = centre_of(sums[i % len(found)][i // len(found)] for i in range(blocks[0].count))
    name = f"{path.stem}-{bank.fingerprint[:8]}"
    return ShardSet(name, bank, found, blocks, centre, options.restart_s)


def operator_of(shards: ShardSet) -> tuple[PatchAttention, PatchMoments]:
    """Return patch attention of a bank in shards, and its moments; packs the bank."""
    shards.pack()
    attention = PatchAttention.of_parts(shards, largest=1.0)
    # The shape and type of the bank alone: its images are in the shards.
    shape = torch.empty(1, dtype=torch.uint8).expand(len(shards.bank), *shards.shape)
    return attention, PatchMoments(attention, shape)
