"""Banks in memory, loaded once for all models that use them."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from els_kernels import FoldedAttention, FoldedMoments, PatchAttention
from els_service.denoisers.banks import Bank, load_bank
from els_service.repository.folders import FileState, file_state


class BankCache:
    """Cache of banks and of their patch attention, held while a model uses them.

    Thread-safe: threads that need the same bank wait for the one that loads it.

    Args:
        implementation: implementation of patch attention, as in ``PatchAttention``.
    """

    def __init__(self, implementation: str = "auto") -> None:
        self.implementation = implementation
        """Implementation of patch attention, as in ``PatchAttention``."""
        self._locks: WeakValueDictionary[FileState, Lock] = WeakValueDictionary()
        self._banks: WeakValueDictionary[FileState, Bank] = WeakValueDictionary()
        self._attentions: WeakValueDictionary[tuple[FileState, str], PatchAttention] = (
            WeakValueDictionary()
        )
        self._folds: WeakValueDictionary[tuple[FileState, str], FoldedMoments] = (
            WeakValueDictionary()
        )

    def bank(self, path: Path) -> Bank:
        """Return the bank of a file.

        Raises:
            LoadError: The file is not a bank.
            OSError: The file cannot be read.
        """
        state = file_state(path)
        with self._lock(state):
            return self._bank(state)

    def attention(self, path: Path, device: str) -> tuple[Bank, PatchAttention]:
        """Return the bank of a file and its patch attention on a device; raises as ``bank``."""
        state = file_state(path)
        with self._lock(state):
            bank, attention = self._bank(state), self._attentions.get((state, device))
            if attention is None:
                pixels = bank.pixels().to(device)
                attention = PatchAttention(pixels, implementation=self.implementation)
                self._attentions[state, device] = attention
            return bank, attention

    def fold(self, path: Path, device: str) -> tuple[Bank, FoldedMoments]:
        """Return the bank of a file, and its fold's moments on a device; raises as ``bank``."""
        state = file_state(path)
        with self._lock(state):
            bank, fold = self._bank(state), self._folds.get((state, device))
            if fold is None:
                pixels = bank.pixels().to(device)
                attention = FoldedAttention(pixels, implementation=self.implementation)
                fold = self._folds[state, device] = FoldedMoments(attention)
            return bank, fold

    def _lock(self, state: FileState) -> Lock:
        return self._locks.setdefault(state, Lock())

    def _bank(self, state: FileState) -> Bank:
        bank = self._banks.get(state)
        if bank is None:
            bank = self._banks[state] = load_bank(state[0])
        return bank
