"""Banks in memory, loaded once for all models that use them."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Literal
from weakref import WeakValueDictionary

from els_kernels import FoldedMoments, PatchAttention
from els_service.denoisers.banks import Bank
from els_service.denoisers.folded import fold_of
from els_service.denoisers.mixed_banks import load_any_bank, one_size
from els_service.denoisers.source_banks import SourceBank
from els_service.repository.folders import FileState, file_state
from els_service.shards.fold_shards import fold_of_shards
from els_service.shards.opening import Engine, open_shards
from els_service.shards.shard import ShardOptions
from els_service.shards.shard_set import ShardSet

_Shards = tuple[FileState, int | Literal["auto"], Engine]


class BankCache:
    """Cache of banks and of their patch attention, held while a model uses them.

    Thread-safe: threads that need the same bank wait for the one that loads it.

    Args:
        implementation: implementation of patch attention, as in ``PatchAttention``.
        options: settings of shards.
    """

    def __init__(self, implementation: str = "auto", options: ShardOptions | None = None) -> None:
        self._options = options or ShardOptions()
        self._sharded: WeakValueDictionary[_Shards, ShardSet] = WeakValueDictionary()
        self._sharded_folds: WeakValueDictionary[_Shards, FoldedMoments] = WeakValueDictionary()
        self.implementation = implementation
        """Implementation of patch attention, as in ``PatchAttention``."""
        self._locks: WeakValueDictionary[FileState, Lock] = WeakValueDictionary()
        self._banks: WeakValueDictionary[FileState, SourceBank] = WeakValueDictionary()
        self._attentions: WeakValueDictionary[tuple[FileState, str], PatchAttention] = (
            WeakValueDictionary()
        )
        self._folds: WeakValueDictionary[tuple[FileState, str], FoldedMoments] = (
            WeakValueDictionary()
        )

    def bank(self, path: Path) -> SourceBank:
        """Return the bank of a file.

        Raises:
            LoadError: The file is not a bank.
            OSError: The file cannot be read.
        """
        state = file_state(path)
        with self._lock(state):
            return self._bank(state)

    def attention(self, path: Path, device: str) -> tuple[Bank, PatchAttention]:
        """Return the bank of a file and its patch attention on a device; raises as ``bank``.

        Raises InvalidArgumentError for a bank of images of several sizes.
        """
        state = file_state(path)
        with self._lock(state):
            bank = one_size(self._bank(state), "patch attention")
            attention = self._attentions.get((state, device))
            if attention is None:
                # On a GPU images of bytes are converted block by block, not all on the host.
                pixels = bank.pixels() if device == "cpu" else bank.stored().to(device)
                attention = PatchAttention(pixels, implementation=self.implementation)
                self._attentions[state, device] = attention
            return bank, attention

    def fold(self, path: Path, device: str) -> tuple[SourceBank, FoldedMoments]:
        """Return the bank of a file, and its fold's moments on a device; raises as ``bank``."""
        state = file_state(path)
        with self._lock(state):
            bank, fold = self._bank(state), self._folds.get((state, device))
            if fold is None:
                fold = FoldedMoments(fold_of(bank, device, self.implementation))
                self._folds[state, device] = fold
            return bank, fold

    def sharded(self, path: Path, shards: int | Literal["auto"], engine: Engine) -> ShardSet:
        """Return the shards of the bank of a file; raises as ``open_shards``."""
        state = file_state(path)
        with self._lock(state):
            found = self._sharded.get((state, shards, engine))
            if found is None:
                # The server reads it once, and does not hold it.
                found = open_shards(path, shards, engine, self._options)
                self._sharded[state, shards, engine] = found
            return found

    def sharded_fold(
        self, path: Path, shards: int | Literal["auto"], engine: Engine
    ) -> tuple[ShardSet, FoldedMoments]:
        """Return the shards of the bank of a file and their fold's moments; raises as ``sharded``.

        Raises ShardsUnavailableError if a shard is lost and does not come back in time.
        """
        found, state = self.sharded(path, shards, engine), file_state(path)
        with self._lock(state):
            fold = self._sharded_folds.get((state, shards, engine))
            if fold is None:
                fold = fold_of_shards(found)
                self._sharded_folds[state, shards, engine] = fold
            return found, fold

    def _lock(self, state: FileState) -> Lock:
        return self._locks.setdefault(state, Lock())

    def _bank(self, state: FileState) -> SourceBank:
        bank = self._banks.get(state)
        if bank is None:
            bank = self._banks[state] = load_any_bank(state[0])
        return bank
