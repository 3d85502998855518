"""A shard as its server has it: asked, it answers or is lost; lost, it comes back."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from els_kernels import ComputationStoppedError
from els_service.errors import ElsError
from els_service.shards.messages import Array, Message


@dataclass(frozen=True)
class ShardOptions:
    """Settings of shards, of the server.

    Attributes:
        ray_address: of the cluster: ``auto``, ``local`` or HOST:PORT.
        stall_s: seconds without progress after which a shard counts as hung.
        restart_s: seconds that a call waits for a lost shard.
        load_s: seconds that a shard has to load.
    """

    ray_address: str = "auto"
    stall_s: float = 10.0
    restart_s: float = 30.0
    load_s: float = 300.0


class ShardLostError(Exception):
    """The process of a shard ended, or hangs; the text says which and why."""


class Shard(Protocol):
    """One shard; its methods may be called by any thread."""

    @property
    def name(self) -> str:
        """Place in logs and metrics: its index."""
        ...

    @property
    def ready(self) -> bool:
        """Whether its slice is loaded and it can be asked."""
        ...

    @property
    def restarts(self) -> int:
        """Number of processes that were started after the first."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not ready; empty if it is, or was not lost."""
        ...

    def ask(self, operation: Message) -> Future[Message]:
        """Return the future answer of an operation, which has a number.

        The future fails with ShardLostError if the shard is lost before it answers, and with what
        ``error_of`` returns if the operation fails.
        """
        ...

    def stop(self, number: int) -> None:
        """Stop an operation between two tiles; it then fails with ComputationStoppedError."""
        ...

    def keep(self, centre: Array) -> None:
        """Pack the bank about its centre after every restart."""
        ...

    def close(self) -> None:
        """End the process."""
        ...


def error_of(message: Message) -> Exception:
    """Return the error of a failed operation."""
    kind, text = message.fields["kind"], message.fields["text"]
    if kind == "stopped":
        return ComputationStoppedError(text)
    return MemoryError(text) if kind == "memory" else ElsError(f"a shard failed: {text}")
