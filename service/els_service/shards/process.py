"""Process of a shard: ``python -m els_service.shards.process FD MEMORY``, started by ``local``.

FD is one end of a pair of Unix sockets, MEMORY a file of shared memory for answers. The process
ends when the other end is closed, in the middle of a computation too, so that none outlives its
server.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time

import torch
from torch import Tensor

from els_kernels import ComputationStoppedError
from els_service.errors import ElsError
from els_service.shards.messages import ARRAYS_AT, ClosedError, Message, Receiver, send
from els_service.shards.part import BankPart, PartSpec
from els_service.shards.shared_control import SharedControl

BEAT_S = 0.25
"""Seconds between two reports of the progress of a computation."""


class _Process:
    """Answers the messages of one connection, one after another."""

    def __init__(self, connection: socket.socket, shared: mmap.mmap) -> None:
        self._connection, self._shared = connection, shared
        self._control = SharedControl(shared)
        self._sending = threading.Lock()
        self._busy = False
        self._part: BankPart | None = None

    def run(self) -> None:
        """Report progress until the connection is closed."""
        # One thread receives and computes, so that a question wakes no other.
        threading.Thread(target=self._work, daemon=True).start()
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        while not poll.poll(1000 * BEAT_S):
            if self._busy:
                progress = self._control.control.progress
                self._send(Message("beat", {"progress": progress, "cpu_s": time.process_time()}))

    def _work(self) -> None:
        receiver = Receiver(self._connection)
        while True:
            try:
                message = receiver.receive()
            except ClosedError:
                return
            self._busy = True
            try:
                with self._control.begin(message.number):
                    answer = self._answer(message)
            except Exception as error:
                answer = failure(error, message.number)
            self._send(answer)
            self._busy = False
            del message, answer

    def _answer(self, message: Message) -> Message:
        if message.op == "load":
            self._part = BankPart(PartSpec.of(message.fields), _memory(self._shared))
            message = Message("sums", number=message.number)
        assert self._part is not None, "load comes first"
        return self._part.answer(message)

    def _send(self, message: Message) -> None:
        with self._sending:
            send(self._connection, message, self._shared)


def _memory(shared: mmap.mmap) -> Tensor:
    """Return the memory of arrays, uint8."""
    return torch.frombuffer(shared, dtype=torch.uint8, offset=ARRAYS_AT)


def failure(error: Exception, number: int) -> Message:
    """Return the answer that says why an operation failed, in plain values."""
    if isinstance(error, ComputationStoppedError):
        kind = "stopped"
    else:
        kind = "memory" if isinstance(error, MemoryError) else "failed"
    text = (
        str(error) if isinstance(error, ElsError | OSError) else f"{type(error).__name__}: {error}"
    )
    return Message("failure", {"kind": kind, "text": text}, number=number)


def do_not_preempt() -> None:
    """Have this thread, and those that it starts, preempt no others when they wake.

    The server, which has just sent a message, goes on to the next shard at once, and not after a
    time slice of 3 ms. A policy that was chosen for the server is kept. A sandbox may forbid the
    call, which then costs those milliseconds.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def main() -> None:
    """Serve the connection and the memory whose file descriptors are the arguments."""
    do_not_preempt()
    # A terminal sends Ctrl-C to all; the server ends its shards itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shared = mmap.mmap(int(sys.argv[2]), 0)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        # Closed while it sent.
        with contextlib.suppress(OSError):
            _Process(connection, shared).run()
        # Not at the end of a computation: no one waits for it.
        os._exit(0)


if __name__ == "__main__":
    main()
