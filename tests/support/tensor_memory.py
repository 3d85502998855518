"""Account of the memory of tensors: what is alive, and the most that ever was."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory:
    """Bytes of the storages that operations return while the account is open: a context manager.

    Temporary memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __enter__(self) -> TensorMemory:
        # torch's class is not annotated.
        base: Any = TorchDispatchMode
        dispatch = partial(_dispatch, self)
        # A function: torch sets an attribute of it.
        methods = {"__torch_dispatch__": lambda _mode, *call: dispatch(*call)}
        self._mode: Any = type("Mode", (base,), methods)()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size


def _dispatch(
    memory: TensorMemory, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """Count new storages of the results of an operation."""
    result = function(*args, **(kwargs or {}))
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            memory.add(leaf)
    return result


def nbytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors that share no memory."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
